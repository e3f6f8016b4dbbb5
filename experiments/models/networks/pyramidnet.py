"""Pyramidal residual networks (arXiv 1610.02915): every block widens a little."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.networks.layers import conv, logits, norm


class _Block(nn.Module):
    """Two 3×3 convolutions between three BatchNorms, and a shortcut.

    The shortcut has no parameters: it is averaged where the stride is 2, and
    channels that it lacks are zero.
    """

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        layer = functools.partial(conv, self.features, dtype=self.dtype)
        y = layer(stride=self.stride)(norm(train, self.dtype)(x))
        y = layer()(nn.relu(norm(train, self.dtype)(y)))
        y = norm(train, self.dtype)(y)
        if self.stride > 1:
            size = (self.stride, self.stride)
            x = nn.avg_pool(x, size, size, padding='SAME', count_include_pad=False)
        missing = self.features - x.shape[-1]
        return y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))


class PyramidNet(nn.Module):
    """A network of three stages whose blocks have ever more channels.

    Attributes:
        num_classes: the number of logits.
        depth: how many layers there are, 6 n + 2.
        alpha: how many channels the last block has more than the stem.
        width: channels of the stem.
        stem_stride: of the first convolution.
        dtype: what all but the classifier computes in.
    """

    num_classes: int
    depth: int = 110
    alpha: int = 270
    width: int = 16
    stem_stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        blocks = (self.depth - 2) // 6
        x = conv(self.width, stride=self.stem_stride, dtype=self.dtype)(x)
        x = norm(train, self.dtype)(x)
        for number in range(3 * blocks):
            stride = 2 if number and number % blocks == 0 else 1
            features = self.width + round(self.alpha * (number + 1) / (3 * blocks))
            x = _Block(features, stride, self.dtype)(x, train)
        return logits(nn.relu(norm(train, self.dtype)(x)), self.num_classes)
