"""The block that transformers are made of."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def norm() -> nn.LayerNorm:
    """A LayerNorm in float32."""
    return nn.LayerNorm(dtype=jnp.float32)


def _attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool, **_: Any
) -> jax.Array:
    # Unlike Flax's own it keeps the softmax, and nothing else, in float32.
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal)


class Block(nn.Module):
    """Attention between the tokens, then dense layers on each of them.

    Attributes:
        heads: attention heads; they share the width.
        dtype: what attention and dense layers compute in.
        causal: whether a token sees those before it alone.
    """

    heads: int
    dtype: Any
    causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Tokens [batch, tokens, width] of such."""
        width = x.shape[-1]
        attend = nn.MultiHeadDotProductAttention(
            self.heads,
            dtype=self.dtype,
            attention_fn=functools.partial(_attention, causal=self.causal),
        )
        x += attend(norm()(x))
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype)(norm()(x)))
        return x + nn.Dense(width, dtype=self.dtype)(y)
