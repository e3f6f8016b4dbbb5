"""Donated arrays: each needs memory that nothing else uses.

A buffer can be donated only once. But optimizers that keep the initial parameters
(mechanic, prodigy, dog) put the same arrays into their state, and callers may pass one
array in two arguments.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import core


def with_own_buffers(tree: Any) -> Any:
    """The same tree, with a copy of every array that shares memory with another."""
    seen: set[Any] = set()
    return jax.tree.map(lambda leaf: _own(leaf, seen), tree)


def make_own(donated: Any, others: Any) -> Any:
    """Copies arrays so that donated arguments share no memory with any other.

    Args:
        donated: a tree of arguments. NNX variables in it are changed in place.
        others: the arguments that are not donated.

    Returns:
        The donated arguments, with copies of arrays whose memory was shared.
    """
    seen: set[Any] = set()
    # nnx.jit treats one variable in two arguments as one array.
    own = {id(x) for x in _variables(donated)}
    variables = [x for x in _variables(others) if id(x) not in own]
    plain = jax.tree.map(
        lambda x: None if _is_object(x) else x, others, is_leaf=_is_object
    )
    for leaf in jax.tree.leaves((plain, [x.get_value() for x in variables])):
        if isinstance(leaf, jax.Array):
            seen.update(_buffers(leaf))
    return _replace(donated, lambda leaf: _own(leaf, seen))


def repeats(leaves: Sequence[Any]) -> bool:
    """Whether one array object occurs twice; does not look at memory."""
    arrays = [id(x) for x in leaves if isinstance(x, jax.Array)]
    return len({*arrays}) < len(arrays)


def _nnx() -> Any:
    """Flax's module if it is imported, as it is once a caller has NNX objects."""
    return sys.modules.get('flax.nnx')


def _is_variable(x: Any) -> bool:
    return (nnx := _nnx()) is not None and isinstance(x, nnx.Variable)


def _is_object(x: Any) -> bool:
    return (nnx := _nnx()) is not None and isinstance(x, (nnx.Variable, nnx.Pytree))


def _variables(tree: Any) -> list[Any]:
    """The NNX variables in a tree."""
    return list(filter(_is_variable, jax.tree.leaves(tree, is_leaf=_is_variable)))


def _replace(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Maps the leaves of a tree; NNX objects are changed in place."""
    changed: set[int] = set()  # A variable may occur twice.

    def replace(node: Any) -> Any:
        if not _is_object(node):
            return function(node)
        for x in _variables(node):
            if id(x) not in changed:
                changed.add(id(x))
                x.set_value(jax.tree.map(function, x.get_value()))
        return node

    return jax.tree.map(replace, tree, is_leaf=_is_object)


def _own(leaf: Any, seen: set[Any]) -> Any:
    if not isinstance(leaf, jax.Array):
        return leaf
    buffers = _buffers(leaf)
    if buffers & seen:
        return jnp.copy(leaf)
    seen.update(buffers)
    return leaf


def _buffers(x: jax.Array) -> set[Any]:
    """Identifies the memory of an array on this process's devices."""
    if isinstance(x, core.Tracer) or x.is_deleted() or not x.size:
        return {id(x)}  # No memory yet, or none that can be donated.
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return {
        (shard.device, shard.data.unsafe_buffer_pointer())
        for shard in x.addressable_shards
    }
