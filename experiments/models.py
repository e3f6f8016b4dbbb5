"""Networks, in Flax Linen: ``model.apply(variables, images, train=...)``.

Convolutions and dense layers compute in ``dtype``; parameters, BatchNorm and the
logits are float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import configuration

_conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def _conv(features: int, size: int = 3, stride: int = 1, dtype: Any = None) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding='SAME',
        use_bias=False,
        dtype=dtype,
        kernel_init=_conv_init,
    )


def _norm(train: bool, **kwargs: Any) -> nn.BatchNorm:
    # Mean and variance of a batch lose too much in a narrow dtype.
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, dtype=jnp.float32, **kwargs
    )


class MLP(nn.Module):
    """Dense layers with BatchNorm: what compiles in no time.

    Attributes:
        num_classes: the number of logits.
        width: units of a hidden layer.
        depth: how many hidden layers.
        dtype: what dense layers compute in.
    """

    num_classes: int
    width: int = 32
    depth: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(self.depth):
            x = nn.Dense(self.width, use_bias=False, dtype=self.dtype)(x)
            x = nn.relu(_norm(train)(x))
        return nn.Dense(self.num_classes, dtype=jnp.float32)(x)


class CNN(nn.Module):
    """Four convolutions with BatchNorm for small images, pooled once between.

    Attributes:
        num_classes: the number of logits.
        width: channels of the first two convolutions; the others have twice that.
        dtype: what convolutions compute in.
    """

    num_classes: int
    width: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        for stage in range(2):
            for _ in range(2):
                x = _conv(self.width * 2**stage, dtype=self.dtype)(x)
                x = nn.relu(_norm(train)(x))
            if stage == 0:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=jnp.float32)(x)


class _BasicBlock(nn.Module):
    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(_conv, self.features, dtype=self.dtype)
        y = conv(stride=self.stride)(x)
        y = conv()(nn.relu(_norm(train)(y)))
        y = _norm(train)(y)
        if x.shape != y.shape:
            x = _norm(train)(conv(size=1, stride=self.stride)(x))
        return nn.relu(x + y)


class SmallResNet(nn.Module):
    """A ResNet of basic blocks in three stages, small enough for a CPU.

    Attributes:
        num_classes: the number of logits.
        width: channels of the first stage; each further one doubles them and
            halves height and width.
        blocks: basic blocks of a stage.
        dtype: what convolutions compute in.
    """

    num_classes: int
    width: int = 16
    blocks: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        x = nn.relu(_norm(train)(_conv(self.width, dtype=self.dtype)(x)))
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                x = _BasicBlock(self.width * 2**stage, stride, self.dtype)(x, train)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=jnp.float32)(x)


def _mlp(
    num_classes: int, width: int = 32, depth: int = 1, dtype: str = 'float32'
) -> nn.Module:
    return MLP(num_classes, width, depth, jnp.dtype(dtype))


def _cnn(num_classes: int, width: int = 32, dtype: str = 'float32') -> nn.Module:
    return CNN(num_classes, width, jnp.dtype(dtype))


def _small_resnet(
    num_classes: int, width: int = 16, blocks: int = 1, dtype: str = 'float32'
) -> nn.Module:
    return SmallResNet(num_classes, width, blocks, jnp.dtype(dtype))


MODELS: dict[str, Callable[..., nn.Module]] = {
    'mlp': _mlp,
    'cnn': _cnn,
    'small_resnet': _small_resnet,
}


def create(name: str, settings: Any, num_classes: int) -> nn.Module:
    """The network of ``config.model`` with the settings ``config.models[name]``."""
    builder = configuration.pick('config.model', MODELS, name)
    return configuration.call(
        builder, f'config.models.{name}', settings, num_classes=num_classes
    )
