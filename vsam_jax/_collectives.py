"""Gradients over a mapped axis: each device's own, and their mean.

For functions that run once per device, under ``jax.shard_map`` or ``jax.pmap``.
Without an axis name all of it does nothing.
"""

import jax
import jax.numpy as jnp

from vsam_jax._types import PyTree

AxisName = str | tuple[str, ...] | None


def mean(tree: PyTree, axis_name: AxisName) -> PyTree:
    """The mean over the devices, the same bits on each of them."""
    if axis_name is None:
        return tree
    # Whole numbers and flags (counters) are the same on all devices already.
    reduce = lambda x: (
        jax.lax.pmean(x, axis_name)
        if jnp.issubdtype(x.dtype, jnp.inexact)
        else jax.lax.pmax(x, axis_name)
    )
    return jax.tree.map(reduce, tree)


def largest(tree: PyTree, axis_name: AxisName) -> PyTree:
    """The largest numbers of all devices, the same on each of them."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.pmax(x, axis_name), tree)


def own_copy(params: PyTree, axis_name: AxisName) -> PyTree:
    """Replicated parameters as a value that each device has for itself.

    The gradient with respect to a value that all devices share is summed over
    them by ``shard_map``; with respect to this copy it is each device's own.
    """
    if axis_name is None:
        return params
    for name in _names(axis_name):
        params = jax.tree.map(lambda p, name=name: _vary(p, name)[0], params)
    return params


def check_own(name: str, grads: PyTree, axis_name: AxisName) -> None:
    """Raises where ``grads`` have already been summed over the devices."""
    if axis_name is None:
        return
    for axis in _names(axis_name):
        # Without shard_map's bookkeeping (pmap, check_vma=False) nothing is summed by
        # itself and nothing can be told apart: not even the axis index varies.
        if not _vary(jax.lax.axis_index(axis), axis)[1]:
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
            if not _vary(leaf, axis)[1]:
                where = jax.tree_util.keystr(path) or 'its root'
                raise ValueError(
                    f"{name} must be each device's own gradient, because"
                    f' axis_name={axis_name!r} was given, but at {where} it is the'
                    f' same on all devices of {axis!r}: shard_map sums the gradient'
                    ' with respect to replicated parameters. Take it with respect to'
                    f' jax.lax.pcast(params, {axis!r}, to="varying").'
                )


def _names(axis_name: str | tuple[str, ...]) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else axis_name


def _vary(x: jax.Array, name: str) -> tuple[jax.Array, bool]:
    """``x`` cast to varying over one axis, and whether it was that already."""
    if name not in jax.sharding.get_abstract_mesh().manual_axes:
        return x, True  # The axis is that of a vmap, which sums nothing by itself.
    try:
        return jax.lax.pcast(x, name, to='varying'), False
    except ValueError:
        return x, True
