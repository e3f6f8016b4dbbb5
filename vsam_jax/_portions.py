"""Parts of a mini-batch: micro-batches and slices.

A slice is every k-th example, not the first few. So if a mini-batch is spread over
several devices, each has a share of the slice, and no data moves between them.
"""

import fractions
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vsam_jax import _checks
from vsam_jax._types import PyTree


def parts_of(psf_share: Any, name: str = 'psf_share') -> int:
    """The number k for a share of 1/k; raises for other shares."""
    allowed = 'one divided by an integer, such as 1/4, or 1 for the whole mini-batch'
    is_real = isinstance(psf_share, numbers.Real) and not isinstance(
        psf_share, (bool, np.bool_)
    )
    if not is_real:
        raise TypeError(f'{name} must be {allowed}, got {_checks.shown(psf_share)}.')
    share = float(psf_share)
    parts = round(1 / share) if 0 < share <= 1 else 0
    if not parts or abs(parts * share - 1) > 1e-6:
        hint = ''
        if 0 < share < 1:
            near = fractions.Fraction(1, max(parts, 1))
            hint = f' The nearest is {near}.'
        raise ValueError(
            f'{name} must be {allowed}, got {_checks.shown(psf_share)}.{hint}'
        )
    return parts


def check_examples(name: str, batch: PyTree) -> None:
    """Raises unless all arrays of a mini-batch have the examples as leading axis.

    Args:
        name: the name of the argument that cuts the mini-batch.
        batch: the mini-batch.
    """
    first = None
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        shape = jnp.shape(x)
        if not shape or (first is not None and shape[0] != first[1]):
            other = '' if first is None else f', at {first[0]} there are {first[1]}'
            raise ValueError(
                f'{name} must divide the leading axis of every array of the mini-batch,'
                ' which must be that of its examples, but at'
                f' {_checks.where(path)} is an array of shape {shape}{other}. Repeat'
                ' for each example what has no axis of examples (weights of classes, a'
                ' number), or let loss_fn close over it; where one example has several'
                ' parts, make them a second axis.'
            )
        first = first or (_checks.where(path), shape[0])


def slice_of(batch: PyTree, parts: int) -> PyTree:
    """Every ``parts``-th example of each array, along its leading axis."""
    if parts == 1:
        return batch
    return jax.tree.map(lambda x: _every(x, parts), batch)


def _every(x: Any, parts: int) -> jax.Array:
    shape = jnp.shape(x)
    devices = _devices_of(x)
    if not shape or shape[0] % (parts * devices):
        own = shape[0] // devices if shape and not shape[0] % devices else 0
        good = [f'1/{k}' for k in range(2, own + 1) if not own % k]
        each = f' on each of {devices} devices' if devices > 1 else ''
        raise ValueError(
            'psf_share must divide the leading axis of every array of the mini-batch'
            f'{each}, got psf_share=1/{parts} for an array of shape {shape}. Shares'
            f' that do: {", ".join(good[:8]) or "none but 1"}.'
        )
    # Split so that an axis over devices stays with the examples that are kept.
    grouped = jnp.reshape(x, (shape[0] // parts, parts, *shape[1:]))
    return jax.lax.index_in_dim(grouped, 0, axis=1, keepdims=False)


def _devices_of(x: Any) -> int:
    """How many devices the examples are spread over, by the type of the array."""
    sharding = getattr(jax.typeof(x), 'sharding', None)
    if sharding is None or sharding.mesh.empty or not jnp.shape(x):
        return 1
    axes = (*sharding.spec, None)[0]
    axes = axes if isinstance(axes, tuple) else (axes,)
    sizes = dict(sharding.mesh.shape)
    return int(np.prod([sizes[axis] for axis in axes if axis in sizes], dtype=int))
