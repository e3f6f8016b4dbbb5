"""Residual networks (arXiv 1512.03385) for small images."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.networks.layers import conv, logits, norm


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut.

    Attributes:
        features: channels of the block.
        stride: of the first convolution.
        dtype: what all but the classifier computes in.
    """

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The block's output."""
        layer = functools.partial(conv, self.features, dtype=self.dtype)
        y = layer(stride=self.stride)(x)
        y = layer()(nn.relu(norm(train, self.dtype)(y)))
        return _join(x, norm(train, self.dtype)(y), self.stride, train, self.dtype)


class Bottleneck(nn.Module):
    """A 3×3 convolution between two of 1×1, and a shortcut.

    Attributes:
        features: channels of the 3×3 convolution; the block returns four times that.
        stride: of the 3×3 convolution.
        dtype: what all but the classifier computes in.
    """

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The block's output."""
        y = conv(self.features, size=1, dtype=self.dtype)(x)
        y = nn.relu(norm(train, self.dtype)(y))
        y = conv(self.features, stride=self.stride, dtype=self.dtype)(y)
        y = nn.relu(norm(train, self.dtype)(y))
        y = conv(4 * self.features, size=1, dtype=self.dtype)(y)
        return _join(x, norm(train, self.dtype)(y), self.stride, train, self.dtype)


def _join(
    x: jax.Array, y: jax.Array, stride: int, train: bool, dtype: Any
) -> jax.Array:
    """The shortcut of a block, projected where the shape changes, plus its path."""
    if x.shape != y.shape:
        x = norm(train, dtype)(conv(y.shape[-1], size=1, stride=stride, dtype=dtype)(x))
    return nn.relu(x + y)


class ResNet(nn.Module):
    """A ResNet whose stem is one 3×3 convolution, without pooling.

    Attributes:
        num_classes: the number of logits.
        stages: blocks of each stage; each further stage doubles the channels and
            halves height and width.
        width: channels of the first stage.
        block: what a stage is made of.
        stem_stride: of the first convolution; 2 makes everything after it a quarter
            of the work.
        dtype: what all but the classifier computes in.
    """

    num_classes: int
    stages: tuple[int, ...]
    width: int = 64
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    stem_stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        x = conv(self.width, stride=self.stem_stride, dtype=self.dtype)(x)
        x = nn.relu(norm(train, self.dtype)(x))
        for stage, blocks in enumerate(self.stages):
            for number in range(blocks):
                stride = 2 if stage and not number else 1
                x = self.block(self.width * 2**stage, stride, self.dtype)(x, train)
        return logits(x, self.num_classes)
