"""Weights after training, rounded to a few bits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.models import lsq

PyTree = Any

BITS = (8, 4)


@functools.partial(jax.jit, static_argnames='bits')
def rounded(params: PyTree, bits: int) -> PyTree:
    r"""Matrices on grids of a few bits, the rest as it is.

    Each output of a layer (the last axis: a column of a matrix, a filter of a
    convolution) has a grid of its own, which reaches to its largest weight,

    .. math:: \bar w = s \, \mathrm{round}(w / s), \quad
        s = \max |w| / (2^{b - 1} - 1).

    Args:
        params: a tree of arrays; those of fewer than two axes (biases, norms) stay.
        bits: b, at least 2.

    Returns:
        A tree like ``params``.

    Raises:
        ValueError: for fewer bits.

    Example:
        >>> rounded({'kernel': jnp.array([[0.7], [0.26], [-0.24]])}, bits=4)['kernel']
        Array([[ 0.7],
               [ 0.3],
               [-0.2]], dtype=float32)
    """
    if bits < 2:
        raise ValueError(f'bits must be an integer >= 2, got {bits!r}.')
    high = 2 ** (bits - 1) - 1

    def of_leaf(w: jax.Array) -> jax.Array:
        if w.ndim < 2:
            return w
        largest = jnp.max(jnp.abs(w), axis=tuple(range(w.ndim - 1)), keepdims=True)
        step = lsq.positive(largest / high)
        return (lsq.to_levels(w, step, -high, high) * step).astype(w.dtype)

    return jax.tree.map(of_leaf, params)
