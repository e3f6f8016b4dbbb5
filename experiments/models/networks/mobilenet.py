"""MobileNet, version 1 (arXiv 1704.04861), for small images."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.networks.layers import conv, logits, norm

# Channels of the blocks as multiples of the stem's, and their strides.
_BLOCKS = (
    (2, 1),
    (4, 2),
    (4, 1),
    (8, 2),
    (8, 1),
    (16, 2),
    *[(16, 1)] * 5,
    (32, 2),
    (32, 1),
)


class MobileNet(nn.Module):
    """Convolutions of one channel each, in turn with 1×1 ones of all channels.

    Attributes:
        num_classes: the number of logits.
        width: channels of the stem, a 3×3 convolution of stride 1.
        dtype: what all but the classifier computes in.
    """

    num_classes: int
    width: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        layer = functools.partial(conv, dtype=self.dtype)
        x = nn.relu(norm(train, self.dtype)(layer(self.width)(x)))
        for multiple, stride in _BLOCKS:
            features = x.shape[-1]
            x = layer(features, stride=stride, groups=features)(x)
            x = nn.relu(norm(train, self.dtype)(x))
            x = nn.relu(
                norm(train, self.dtype)(layer(self.width * multiple, size=1)(x))
            )
        return logits(x, self.num_classes)
