"""Dtypes and norms: all statistics are computed in float32 or wider."""

import jax
import jax.numpy as jnp
import optax

from vsam_jax._types import DTypeLike, PyTree


def widen(x: jax.Array) -> jax.Array:
    """Casts an array to float32, or leaves it as it is if it is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def statistics_dtype(tree: PyTree) -> jnp.dtype:
    """The widest of float32 and the dtypes of the leaves of ``tree``."""
    leaves = jax.tree.leaves(tree)
    # In JAX's dtypes: those of NumPy arrays may be wider.
    dtypes = (jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in leaves)
    return jnp.result_type(jnp.float32, *dtypes)


def wide_norm(tree: PyTree, dtype: DTypeLike = None) -> jax.Array:
    """The L2 norm of a tree, a scalar of ``dtype`` (None: the dtype of the sum).

    The squares are summed in float32 or wider. In float16 they would overflow from a
    norm of 256 on, and in bfloat16 a sum of many squares would stop growing.
    """
    if not jax.tree.leaves(tree):
        return jnp.zeros((), dtype or jnp.float32)
    norm = optax.tree.norm(jax.tree.map(widen, tree))
    return norm if dtype is None else norm.astype(dtype)


def add_scaled(x: jax.Array, weight: jax.Array | float, y: jax.Array) -> jax.Array:
    """``x + weight · y``, computed in float32 or wider, in the dtype of ``x``."""
    return (widen(x) + weight * widen(y)).astype(x.dtype)
