"""Dtypes and norms: all statistics are computed in float32 or wider."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from vsam_jax._types import DTypeLike, PyTree


def wide_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The widest of float32 and some dtypes, whatever ``numpy_dtype_promotion`` says.

    Raises:
        TypePromotionError: for a dtype that jax cannot promote (8 bits and fewer).
    """
    # In JAX's dtypes: those of NumPy arrays may be wider.
    known = (jax.dtypes.canonicalize_dtype(dtype) for dtype in dtypes)
    with jax.numpy_dtype_promotion('standard'):
        return jnp.result_type(jnp.float32, *known)


def widen(x: jax.Array) -> jax.Array:
    """Casts an array to float32, or leaves it as it is if it is wider."""
    return x.astype(wide_dtype(x.dtype))


def statistics_dtype(tree: PyTree) -> jnp.dtype:
    """The widest of float32 and the dtypes of the leaves of ``tree``."""
    return wide_dtype(*(leaf.dtype for leaf in jax.tree.leaves(tree)))


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """The square root, with a derivative of zero at zero.

    A norm is not differentiable at zero. Whoever differentiates through a step would
    get NaN from the derivative of the square root, which is infinite there.
    """
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    y = root(x)
    return y, jnp.where(x == 0, 0, tangent / (2 * jnp.where(x == 0, 1, y)))


@jax.custom_jvp
def first_at_zero(radius: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """The second gradient, with the bits of the first at a radius of zero.

    The derivative is that of the second gradient, at a radius of zero too. Without
    this, ρ = 0 would have a derivative of zero, and learning ρ could not leave it.
    """
    return jnp.where(radius == 0, first, second)


@first_at_zero.defjvp
def _first_at_zero_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return first_at_zero(*primals), tangents[2]


def wide_norm(tree: PyTree, dtype: DTypeLike = None) -> jax.Array:
    """The L2 norm of a tree, a scalar of ``dtype`` (None: the dtype of the sum).

    The squares are summed in float32 or wider. In float16 they would overflow from a
    norm of 256 on, and in bfloat16 a sum of many squares would stop growing.
    """
    if not jax.tree.leaves(tree):
        return jnp.zeros((), dtype or jnp.float32)
    norm = root(optax.tree.norm(jax.tree.map(widen, tree), squared=True))
    return norm if dtype is None else norm.astype(dtype)


def add_scaled(x: jax.Array, weight: jax.Array | float, y: jax.Array) -> jax.Array:
    """``x + weight · y``, computed in float32 or wider, in the dtype of ``x``."""
    return (widen(x) + weight * widen(y)).astype(x.dtype)
