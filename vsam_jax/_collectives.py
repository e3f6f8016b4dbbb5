"""Gradients over a mapped axis: each device's own, and their mean.

For functions that run once per device, under ``jax.shard_map`` or ``jax.pmap``.
Without an axis these functions do nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from vsam_jax import _checks
from vsam_jax._types import PyTree

# The argument of callers: None if nothing is mapped, () if gradients are means.
AxisName = str | tuple[str, ...] | None
# The axes to average over.
Axes = tuple[str, ...]


def axes_of(axis_name: Any) -> Axes:
    """The axes to average over; () for None; raises for an unmapped axis.

    Args:
        axis_name: the caller's argument.

    Returns:
        The names.
    """
    axis_name = _checks.axis_name('axis_name', axis_name)
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    for axis in axes:
        try:
            jax.lax.axis_index(axis)
        except NameError:
            raise ValueError(
                'axis_name must name an axis that is mapped here, got'
                f' {_checks.shown(axis_name)}: nothing around this call maps {axis!r}.'
                ' Under jax.jit alone leave axis_name out, because one program sees all'
                ' devices; in jax.shard_map or jax.pmap give the name of its axis.'
            ) from None
    return axes


def check_per_device(per_device: Any, axis_name: AxisName) -> bool:
    """Returns ``per_device``; raises if it is True without an axis."""
    if _checks.flag('per_device', per_device) and not axis_name:
        raise ValueError(
            'per_device must be False where axis_name is'
            f' {_checks.shown(axis_name)}, got True: name the axis of shard_map or pmap'
            ' that runs over the devices.'
        )
    return per_device


def check_told(axis_name: AxisName, name: str, values: PyTree, params: PyTree) -> None:
    """Raises if replicas would silently diverge because no axis was named.

    Args:
        axis_name: the caller's argument. Anything but None passes.
        name: a name for ``values``: the gradient passed to an update, or a loss, whose
            gradient ``shard_map`` sums over the devices but does not average.
        values: the gradient or the loss.
        params: the parameters.
    """
    if axis_name is not None:
        return
    for axis in jax.sharding.get_abstract_mesh().manual_axes:
        answers = (
            f' If each device has the gradient of its share of the mini-batch, give'
            f' axis_name={axis!r}: update takes the mean. If gradients are means'
            ' already, or each device trains a model of its own, give axis_name=().'
        )
        if not _is_checked(axis):
            raise ValueError(
                f'axis_name must be given inside a function mapped over {axis!r}'
                ' (jax.pmap, or jax.shard_map with check_vma=False), got None: it'
                ' is not known here whether each device has its own gradient, and if'
                f' so, parameters silently diverge between devices.{answers}'
            )
        for path, leaf in jax.tree_util.tree_leaves_with_path(values):
            if _vary(leaf, axis)[1] and not all(
                _vary(p, axis)[1] for p in jax.tree.leaves(params)
            ):
                raise ValueError(
                    f'axis_name must be given here, got None: at {_checks.where(path)}'
                    f' {name} differs between the devices of {axis!r}, which'
                    f' share the parameters.{answers}'
                )


def mean(tree: PyTree, axes: Axes) -> PyTree:
    """The mean over the devices, with the same bits on each."""
    if not axes:
        return tree

    def reduce(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jax.lax.pmean(x, axes)
        # Integers, flags and keys are already the same on all devices. This makes
        # their types say so.
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            words = jax.lax.pmax(jax.random.key_data(x), axes)
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
        return jax.lax.pmax(x, axes)

    return jax.tree.map(reduce, tree)


def largest(tree: PyTree, axes: Axes) -> PyTree:
    """The elementwise maximum over the devices, the same on each."""
    if not axes:
        return tree
    return jax.tree.map(lambda x: jax.lax.pmax(x, axes), tree)


def own_copy(tree: PyTree, axes: Axes) -> PyTree:
    """Turns replicated values into copies that each device has for itself.

    ``shard_map`` sums the gradient with respect to a replicated value over the devices.
    With respect to this copy, the gradient is each device's own.
    """
    for axis in axes:
        tree = jax.tree.map(lambda p, axis=axis: _vary(p, axis)[0], tree)
    return tree


def own_key(key: jax.Array, axes: Axes) -> jax.Array:
    """A random key that differs between devices."""
    return jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key


def check_own(name: str, grads: PyTree, axes: Axes) -> None:
    """Raises if ``grads`` have already been summed over the devices."""
    for axis in axes:
        if not _is_checked(axis):
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
            if not _vary(leaf, axis)[1]:
                raise ValueError(
                    f"{name} must be each device's own gradient, because"
                    f' axis_name={axis!r} was given, but at {_checks.where(path)} it is'
                    f' the same on all devices of {axis!r}: shard_map sums the gradient'
                    ' with respect to replicated parameters. Take it with respect to'
                    f' jax.lax.pcast(params, {axis!r}, to="varying"), or give'
                    ' axis_name=() if it is the mean already.'
                )


def _is_checked(axis: str) -> bool:
    """Whether types say which values differ between the devices of an axis.

    Without this bookkeeping of ``shard_map`` (pmap, check_vma=False), nothing is summed
    automatically, and types do not show differences: not even that of the axis index.
    """
    return _vary(jax.lax.axis_index(axis), axis)[1]


def _vary(x: jax.Array, axis: str) -> tuple[jax.Array, bool]:
    """``x`` cast to varying over one axis, and whether it already was."""
    if axis not in jax.sharding.get_abstract_mesh().manual_axes:
        return x, True  # The axis of a vmap, which sums nothing automatically.
    try:
        return jax.lax.pcast(x, axis, to='varying'), False
    except ValueError:
        return x, True
