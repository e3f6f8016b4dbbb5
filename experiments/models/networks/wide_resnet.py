"""Wide residual networks (arXiv 1605.07146): fewer layers, more channels."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.networks.layers import conv, logits, norm


class _Block(nn.Module):
    """Two 3×3 convolutions, each after its BatchNorm and ReLU, and a shortcut."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        layer = functools.partial(conv, self.features, dtype=self.dtype)
        active = nn.relu(norm(train, self.dtype)(x))
        y = layer(stride=self.stride)(active)
        y = layer()(nn.relu(norm(train, self.dtype)(y)))
        if x.shape != y.shape:
            x = layer(size=1, stride=self.stride)(active)
        return x + y


class WideResNet(nn.Module):
    """A network of three stages of pre-activated basic blocks.

    Attributes:
        num_classes: the number of logits.
        depth: how many layers there are, 6 n + 4.
        width: the channels of the first stage, in sixteens.
        stem_stride: of the first convolution.
        dtype: what all but the classifier computes in.
    """

    num_classes: int
    depth: int = 28
    width: int = 10
    stem_stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        x = conv(16, stride=self.stem_stride, dtype=self.dtype)(x)
        for stage in range(3):
            for number in range((self.depth - 4) // 6):
                stride = 2 if stage and not number else 1
                features = 16 * self.width * 2**stage
                x = _Block(features, stride, self.dtype)(x, train)
        return logits(nn.relu(norm(train, self.dtype)(x)), self.num_classes)
