"""A vision transformer (arXiv 2010.11929) for small images."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.networks.attention import Block, norm
from experiments.models.networks.layers import logits


class ViT(nn.Module):
    """A transformer on square patches; their mean is classified.

    Attributes:
        num_classes: the number of logits.
        patch: height and width of a patch.
        width: numbers per token.
        depth: how many blocks there are.
        heads: attention heads of a block; they share the width.
        dtype: what attention and dense layers compute in.
    """

    num_classes: int
    patch: int = 4
    width: int = 192
    depth: int = 6
    heads: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        del train  # Nothing in it behaves differently.
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, padding='VALID', dtype=self.dtype)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x += self.param(
            'positions', nn.initializers.normal(0.02), (1, *x.shape[1:]), jnp.float32
        )
        for number in range(self.depth):
            # First weights follow from the names of layers; these have not changed.
            x = Block(self.heads, self.dtype, name=f'_Block_{number}')(x)
        return logits(norm()(x), self.num_classes)
