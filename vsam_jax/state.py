"""The state of a sharpness-aware transformation, and how to find it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import core

from vsam_jax.statistics import Rings


class VSAMState(NamedTuple):
    """Everything that a sharpness-aware transformation keeps between updates.

    All fields are arrays, trees of arrays or None; their structure, shapes and
    dtypes never change from update to update. *Statistics dtype* is float32, or
    the widest dtype of the parameters where that is wider.

    Attributes:
        step: int32 scalar, the number of updates made.
        position: int32 scalar in [0, K), which step of the plan comes next.
        plan: bool array [K], which steps of the current window are sampled. All
            True during warm-up. The last update of a window already leaves the plan
            of the next window here, so that a host can read it before that starts.
        budget: scalar in the statistics dtype, b; after warm-up ⌊b⌋ steps of a
            window are sampled. Where steps are sampled at random, the expected number.
        psf: the latest usable PSF (projection of the second-order gradient onto
            the first-order one), a tree like the parameters in their dtypes or in
            ``psf_dtype``; zeros at first. None in methods that reuse nothing.
        age: int32 scalar, how many updates ago the latest usable sample was taken.
            Before the first one it starts at an age at which nothing is reused, in
            methods whose reuse ends; at 0 in the others.
        rings: statistics of the last K samples, [K] each, in the statistics dtype;
            None in methods that use no statistics.
        grad_norm: scalar in the statistics dtype, ‖g‖ of the latest usable sample.
        psf_norm: the same of ‖s‖.
        sampled: bool scalar, whether the latest update took a second gradient.
        num_samples: int32 scalar, how many updates took a second gradient.
        num_rejected: int32 scalar, how many of those were not finite and were
            therefore neither kept nor counted in the statistics.
    """

    step: jax.Array
    position: jax.Array
    plan: jax.Array
    budget: jax.Array
    psf: Any
    age: jax.Array
    rings: Rings | None
    grad_norm: jax.Array
    psf_norm: jax.Array
    sampled: jax.Array
    num_samples: jax.Array
    num_rejected: jax.Array


def find_state(tree: Any) -> VSAMState:
    """The only :class:`VSAMState` inside any state: chained, wrapped, a train state.

    Args:
        tree: a pytree with exactly one ``VSAMState`` in it.

    Returns:
        That state.

    Raises:
        ValueError: if ``tree`` holds none or several.

    Example:
        >>> import jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(vsam_jax.vsam(), optax.sgd(0.1))
        >>> print(vsam_jax.find_state(tx.init(jnp.ones(2))).step)
        0
    """
    return locate_state(tree)[1]


def locate_state(tree: Any) -> tuple[int, VSAMState]:
    """Like :func:`find_state`; also the index of its first leaf among all leaves."""
    nodes = jax.tree.leaves(tree, is_leaf=is_state)
    found = [i for i, node in enumerate(nodes) if is_state(node)]
    if len(found) != 1:
        raise ValueError(
            'state must hold exactly one VSAMState, which holds plan and statistics,'
            f' but it holds {len(found)}. Put one sharpness-aware transformation,'
            ' outside optax.partition, into the optimizer.'
        )
    return len(jax.tree.leaves(nodes[: found[0]])), nodes[found[0]]


def is_state(node: Any) -> bool:
    """Whether a node of a tree is a :class:`VSAMState`."""
    return isinstance(node, VSAMState)


def states_in(tree: Any) -> list[VSAMState]:
    """All of them inside any state, none or more."""
    return list(filter(is_state, jax.tree.leaves(tree, is_leaf=is_state)))


def is_accumulated(tree: Any) -> bool:
    """Whether ``optax.MultiSteps`` stands around a method, inside any state."""
    is_wrapper = lambda node: isinstance(node, optax.MultiStepsState)
    wrappers = filter(is_wrapper, jax.tree.leaves(tree, is_leaf=is_wrapper))
    return any(states_in(wrapper.inner_opt_state) for wrapper in wrappers)


def holds_an_array_twice(tree: Any) -> bool:
    """Whether one array object stands in two places."""
    arrays = [id(x) for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    return len({*arrays}) < len(arrays)


def with_own_buffers(tree: Any) -> Any:
    """The same tree, with a copy of every array whose memory another one has too.

    A buffer can be donated once only, and optimizers that keep the parameters of
    the start (mechanic, prodigy, dog) put the same arrays into their state.
    """
    seen: set[Any] = set()

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        buffers = _buffers(leaf)
        if buffers & seen:
            return jnp.copy(leaf)
        seen.update(buffers)
        return leaf

    return jax.tree.map(own, tree)


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
