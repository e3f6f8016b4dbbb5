"""Arrays that are donated: each needs memory that nothing else holds.

A buffer can be donated once only. Optimizers that keep the parameters of the start
(mechanic, prodigy, dog) put the same arrays into their state, and callers pass arrays
in two arguments.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import core


def with_own_buffers(tree: Any) -> Any:
    """The same tree, with a copy of every array whose memory another one has too."""
    seen: set[Any] = set()
    return jax.tree.map(lambda leaf: _own(leaf, seen), tree)


def make_own(donated: Sequence[Any], others: Any) -> list[Any]:
    """Gives donated arguments memory that neither they nor the others hold twice.

    Args:
        donated: arguments of a step. Variables of NNX in them are changed in place.
        others: the arguments that are not donated.

    Returns:
        The donated arguments, with copies where memory is shared.
    """
    seen: set[Any] = set()
    for leaf in jax.tree.leaves(others):
        if isinstance(leaf, jax.Array):
            seen.update(_buffers(leaf))
    return [_replace(tree, lambda leaf: _own(leaf, seen)) for tree in donated]


def repeats(leaves: Sequence[Any]) -> bool:
    """Whether one array object stands in two places; looks at no memory."""
    arrays = [id(x) for x in leaves if isinstance(x, jax.Array)]
    return len({*arrays}) < len(arrays)


def _replace(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Maps the leaves of a tree; objects that hold variables stay what they are."""
    # Without importing Flax: who passes its objects has done so.
    nnx: Any = sys.modules.get('flax.nnx')
    is_variable = lambda x: nnx is not None and isinstance(x, nnx.Variable)
    nodes = jax.tree.leaves(tree, is_leaf=is_variable)
    variables = {id(x): x for x in nodes if is_variable(x)}
    if not variables:
        return jax.tree.map(function, tree)
    for variable in variables.values():
        variable.set_value(jax.tree.map(function, variable.get_value()))
    return tree


def _own(leaf: Any, seen: set[Any]) -> Any:
    if not isinstance(leaf, jax.Array):
        return leaf
    buffers = _buffers(leaf)
    if buffers & seen:
        return jnp.copy(leaf)
    seen.update(buffers)
    return leaf


def _buffers(x: jax.Array) -> set[Any]:
    """What tells the memory of an array on this process's devices from others."""
    if isinstance(x, core.Tracer) or x.is_deleted() or not x.size:
        return {id(x)}  # No memory yet, or none that could be donated.
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return {
        (shard.device, shard.data.unsafe_buffer_pointer())
        for shard in x.addressable_shards
    }
