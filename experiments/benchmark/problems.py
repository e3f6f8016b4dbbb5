"""Networks and mini-batches to measure steps on."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.networks.resnet import ResNet
from experiments.models.networks.vit import ViT
from experiments.models.networks.wide_resnet import WideResNet


class Problem(NamedTuple):
    """A network, its mini-batch and its optimizer.

    Attributes:
        title: for tables, without the batch size.
        model: called as ``model.apply(variables, images, train=True)``; its
            ``dtype`` is what it computes in.
        shape: of a mini-batch of inputs.
        num_classes: the number of logits.
        base: the optimizer without a second gradient, ``'SGD'`` or ``'AdamW'``.
    """

    title: str
    model: nn.Module
    shape: tuple[int, ...]
    num_classes: int = 10
    base: str = 'SGD'

    @property
    def batch_size(self) -> int:
        """Examples of a mini-batch."""
        return self.shape[0]

    @property
    def full_title(self) -> str:
        """The title with the batch size."""
        return f'{self.title}, batch {self.batch_size}'

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Random inputs of ``shape``, float32, and labels [batch], int32."""
        rng = np.random.default_rng(0)
        inputs = rng.normal(size=self.shape).astype(np.float32)
        labels = rng.integers(self.num_classes, size=self.batch_size, dtype=np.int32)
        return inputs, labels

    def shapes(self) -> Any:
        """Shapes and dtypes of the variables; nothing is computed."""
        inputs = jax.ShapeDtypeStruct(self.shape, jnp.float32)
        return jax.eval_shape(
            lambda key, x: self.model.init(key, x, train=True),
            jax.random.key(0),
            inputs,
        )

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        leaves = jax.tree.leaves(self.shapes()['params'])
        return sum(math.prod(leaf.shape) for leaf in leaves)


class MLP(nn.Module):
    """Dense layers alone: little computation for many parameters.

    Attributes:
        num_classes: the number of logits.
        width: units of a hidden layer.
        depth: how many hidden layers.
        dtype: what the layers compute in.
    """

    num_classes: int
    width: int
    depth: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, classes] of inputs [batch, features]."""
        del train  # Nothing in it behaves differently.
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width, dtype=self.dtype)(x))
        return nn.Dense(self.num_classes, dtype=jnp.float32)(x)


def mlp(width: int, batch_size: int, depth: int = 4) -> Problem:
    """An MLP of ``depth`` layers of width × width, and a small classifier."""
    return Problem(
        f'MLP of {depth} × {width}²', MLP(10, width, depth), (batch_size, width)
    )


def images(title: str, model: nn.Module, batch_size: int, **kwargs: Any) -> Problem:
    """A network on 32×32 colour images.

    Args:
        title: for tables.
        model: the network, of ten classes.
        batch_size: images of a mini-batch.
        **kwargs: further fields of :class:`Problem`.

    Returns:
        The problem.
    """
    return Problem(title, model, (batch_size, 32, 32, 3), **kwargs)


def _resnet18(batch_size: int) -> Problem:
    model = ResNet(10, (2, 2, 2, 2), dtype=jnp.bfloat16)
    return images('ResNet-18, bfloat16', model, batch_size)


def _wide_resnet(batch_size: int) -> Problem:
    model = WideResNet(10, dtype=jnp.bfloat16)
    return images('WideResNet-28-10, bfloat16', model, batch_size)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    'convolutions': lambda: images(
        'small ResNet, width 32, 32×32 images', ResNet(10, (1, 1, 1), 32), 128
    ),
    'wide_resnet': lambda: images(
        'WideResNet-16-2, 32×32 images', WideResNet(10, depth=16, width=2), 64
    ),
    'transformer': lambda: images(
        'ViT of 4 blocks, width 192, 64 tokens', ViT(10, depth=4), 64, base='AdamW'
    ),
    # The worst case: little computation for many parameters.
    'mlp': lambda: mlp(1024, 256),
    'resnet18_128': lambda: _resnet18(128),
    'resnet18_1024': lambda: _resnet18(1024),
    'wide_resnet_28_10_128': lambda: _wide_resnet(128),
    'wide_resnet_28_10_1024': lambda: _wide_resnet(1024),
    'vit_base': lambda: images(
        'ViT of 12 blocks, width 768, 64 tokens, bfloat16',
        ViT(10, width=768, depth=12, heads=12, dtype=jnp.bfloat16),
        256,
        base='AdamW',
    ),
    # For trying the command out.
    'tiny': lambda: mlp(16, 8, depth=1),
    'tiny_convolutions': lambda: images(
        'small ResNet, width 4', ResNet(10, (1, 1, 1), 4, stem_stride=2), 4
    ),
}

ON_CPU = ('convolutions', 'wide_resnet', 'transformer', 'mlp')
ON_ACCELERATOR = (
    'resnet18_128',
    'resnet18_1024',
    'wide_resnet_28_10_128',
    'wide_resnet_28_10_1024',
    'vit_base',
)


def default_names() -> tuple[str, ...]:
    """The problems that suit the device at hand."""
    return ON_CPU if jax.default_backend() == 'cpu' else ON_ACCELERATOR
