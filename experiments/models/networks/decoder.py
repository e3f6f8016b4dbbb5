"""A transformer that predicts the next byte of a text."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.networks.attention import Block, norm


class Decoder(nn.Module):
    """Causal attention over bytes, as GPT-2 has it (norms first, learned positions).

    Attributes:
        num_classes: the number of logits, 256 for bytes.
        width: numbers per byte.
        depth: how many blocks there are.
        heads: attention heads of a block; they share the width.
        dtype: what attention and dense layers compute in.
    """

    num_classes: int
    width: int = 64
    depth: int = 3
    heads: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, length, classes] of bytes [batch, 1, length, 1].

        The bytes are whole numbers in any dtype: pictures of one row, so that they
        are batched and kept as images are.
        """
        del train  # Nothing in it behaves differently.
        tokens = x[:, 0, :, 0].astype(jnp.int32)
        y = nn.Embed(self.num_classes, self.width, dtype=self.dtype)(tokens)
        y += self.param(
            'positions', nn.initializers.normal(0.02), (1, *y.shape[1:]), jnp.float32
        )
        for _ in range(self.depth):
            y = Block(self.heads, self.dtype, causal=True)(y)
        return nn.Dense(self.num_classes, dtype=jnp.float32)(norm()(y))
