"""Networks, in Flax Linen: ``model.apply(variables, images, train=...)``.

Convolutions and dense layers compute in ``dtype``; parameters, BatchNorm and the
logits are float32.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from experiments.common import configuration
from experiments.models.networks.decoder import Decoder
from experiments.models.networks.layers import conv, logits, norm
from experiments.models.networks.mobilenet import MobileNet
from experiments.models.networks.pyramidnet import PyramidNet
from experiments.models.networks.resnet import Bottleneck, ResNet
from experiments.models.networks.vit import ViT
from experiments.models.networks.wide_resnet import WideResNet

PyTree = Any


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
            x = nn.relu(norm(train)(x))
        return logits(x, self.num_classes)


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
                x = conv(self.width * 2**stage, dtype=self.dtype)(x)
                x = nn.relu(norm(train)(x))
            if stage == 0:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return logits(x, self.num_classes)


# --- What a configuration may say of each -------------------------------------


def _floating(name: str) -> Any:
    dtype = jnp.dtype(name)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f'dtype must be a floating-point dtype, got {name!r}.')
    return dtype


def _mlp(
    num_classes: int, width: int = 32, depth: int = 1, dtype: str = 'float32'
) -> nn.Module:
    return MLP(num_classes, width, depth, _floating(dtype))


def _cnn(num_classes: int, width: int = 32, dtype: str = 'float32') -> nn.Module:
    return CNN(num_classes, width, _floating(dtype))


def _small_resnet(
    num_classes: int,
    width: int = 16,
    blocks: int = 1,
    stem_stride: int = 1,
    dtype: str = 'float32',
) -> nn.Module:
    return ResNet(
        num_classes,
        (blocks,) * 3,
        width,
        stem_stride=stem_stride,
        dtype=_floating(dtype),
    )


def _resnet18(num_classes: int, width: int = 64, dtype: str = 'float32') -> nn.Module:
    return ResNet(num_classes, (2, 2, 2, 2), width, dtype=_floating(dtype))


def _resnet50(num_classes: int, width: int = 64, dtype: str = 'float32') -> nn.Module:
    return ResNet(num_classes, (3, 4, 6, 3), width, Bottleneck, dtype=_floating(dtype))


def _wide_resnet(
    num_classes: int,
    depth: int = 28,
    width: int = 10,
    stem_stride: int = 1,
    dtype: str = 'float32',
) -> nn.Module:
    _check_depth(depth, 4)
    return WideResNet(num_classes, depth, width, stem_stride, _floating(dtype))


def _pyramidnet(
    num_classes: int,
    depth: int = 110,
    alpha: int = 270,
    width: int = 16,
    stem_stride: int = 1,
    dtype: str = 'float32',
) -> nn.Module:
    _check_depth(depth, 2)
    return PyramidNet(num_classes, depth, alpha, width, stem_stride, _floating(dtype))


def _mobilenet(num_classes: int, width: int = 32, dtype: str = 'float32') -> nn.Module:
    return MobileNet(num_classes, width, _floating(dtype))


def _vit(
    num_classes: int,
    patch: int = 4,
    width: int = 192,
    depth: int = 6,
    heads: int = 3,
    dtype: str = 'float32',
) -> nn.Module:
    _check_heads(width, heads)
    return ViT(num_classes, patch, width, depth, heads, _floating(dtype))


def _decoder(
    num_classes: int,
    width: int = 64,
    depth: int = 3,
    heads: int = 2,
    dtype: str = 'float32',
) -> nn.Module:
    _check_heads(width, heads)
    return Decoder(num_classes, width, depth, heads, _floating(dtype))


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f'width must be a multiple of heads ({heads}), got {width}.')


def _check_depth(depth: int, rest: int) -> None:
    if depth < 6 + rest or depth % 6 != rest:
        raise ValueError(
            f'depth must be 6 n + {rest} with n >= 1, got {depth!r}: there are three'
            ' stages of n blocks with two layers each.'
        )


MODELS: dict[str, Callable[..., nn.Module]] = {
    'mlp': _mlp,
    'cnn': _cnn,
    'small_resnet': _small_resnet,
    'resnet18': _resnet18,
    'resnet50': _resnet50,
    'wide_resnet': _wide_resnet,
    'pyramidnet': _pyramidnet,
    'mobilenet': _mobilenet,
    'vit': _vit,
    'decoder': _decoder,
}


def create(name: str, settings: Any, num_classes: int) -> nn.Module:
    """The network of ``config.model`` with the settings ``config.models[name]``."""
    builder, where = configuration.pick('config.model', MODELS, name), 'config.models'
    for key, value in dict(settings).items():
        if isinstance(value, int):
            # Some networks may have no hidden layer, or no growth.
            low = 0 if key in ('depth', 'alpha') else 1
            configuration.integer(f'{where}.{name}.{key}', value, low)
    return configuration.call(
        builder, f'{where}.{name}', settings, num_classes=num_classes
    )


# --- The order of tensors -----------------------------------------------------


def parameter_paths(
    model: nn.Module, image_shape: tuple[int, ...]
) -> list[tuple[str, ...]]:
    """The paths of the parameters in the order in which the network makes them.

    That is the order of its layers. The leaves of a tree of parameters come sorted
    by name instead, ``Dense_11`` before ``Dense_9``. Nothing is computed.

    Args:
        model: the network.
        image_shape: height, width and channels of an image.

    Returns:
        A list of paths, each a tuple of keys.
    """
    paths: list[tuple[str, ...]] = []

    def note_paths(key: jax.Array, images: jax.Array) -> None:
        # Here the dictionaries are still as they were filled: leaving a traced
        # function sorts them.
        params = model.init(key, images, train=False)['params']
        paths.extend(traverse_util.flatten_dict(params))

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    jax.eval_shape(note_paths, jax.random.key(0), images)
    return paths


def last_tensors(
    model: nn.Module, image_shape: tuple[int, ...], n: int
) -> Callable[[PyTree], PyTree]:
    """A mask that picks the last n parameter tensors of a network.

    Args:
        model: the network.
        image_shape: height, width and channels of an image.
        n: how many tensors are picked; BatchNorm's scale and bias are two.

    Returns:
        A function from a tree of parameters to a tree of booleans, as
        ``stats_mask`` of :func:`vsam_jax.vsam` takes it.

    Raises:
        ValueError: if there are fewer than n tensors, or n is not positive.
    """
    paths = parameter_paths(model, image_shape)
    if not 1 <= n <= len(paths):
        raise ValueError(
            f'n must be an integer in [1, {len(paths)}], the number of parameter'
            f' tensors, got {n!r}.'
        )
    picked = frozenset(paths[-n:])

    def mask(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: tuple(entry.key for entry in path) in picked, params
        )

    return mask
