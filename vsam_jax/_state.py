"""The state of a sharpness-aware transformation, and how to find it in a tree."""

from typing import Any, NamedTuple

import jax
import optax
from jax import core

from vsam_jax.statistics import Rings


class VSAMState(NamedTuple):
    """The state of all methods but :func:`vsam_jax.msam`.

    All fields are arrays, trees of arrays or None. Their structure, shapes and dtypes
    never change between updates. The *statistics dtype* is float32, or the widest dtype
    of the parameters if that is wider.

    ``optax.tree.get(opt_state, 'VSAMState')`` finds it in the state of a chain or of a
    wrapper. ``optax.tree.get(opt_state, 'budget')`` finds one of its fields.

    Attributes:
        step: int32 scalar, the number of updates made.
        position: int32 scalar in [0, K), the index of the next step in the plan.
        plan: bool array [K], which steps of the current window are sampled. All True
            during warm-up. The last update of a window stores the plan of the next
            window, so that a host can read it before that window starts. All False if
            the rule decides from the gradient.
        budget: scalar in the statistics dtype, b. After warm-up ⌊b⌋ steps of a window
            are sampled. If steps are sampled at random, the expected number.
        psf: the latest usable PSF (projection of the second-order gradient onto
            the first-order one), a tree like the parameters in their dtypes or in
            ``psf_dtype``; zeros at first. None in methods that reuse nothing.
        age: int32 scalar, how many updates ago the latest usable sample was taken. In
            methods that stop reusing old PSFs it starts at an age at which nothing is
            reused, in the others at 0.
        rings: statistics of the last K samples, [K] each, in the statistics dtype.
            None in methods that use no statistics.
        grad_norm: scalar in the statistics dtype, ‖g‖ of the latest usable sample.
        psf_norm: scalar in the statistics dtype, ‖s‖ of that sample.
        sharpness: scalar in the statistics dtype, the rise in the loss
            L(w + ε) − L(w) of that sample. NaN until ``value`` is passed and
            ``grad_fn`` returns the loss too.
        sampled: bool scalar, whether the latest update took a second gradient.
        num_samples: int32 scalar, how many updates took a second gradient.
        num_rejected: int32 scalar, how many of those were not finite. They were not
            stored and do not count in the statistics.
        perturbation_memory: the memory of the perturbation, for instance an average of
            gradients. None in methods whose ε depends only on the current gradient.
        sampling_memory: the memory of a sampling rule that decides from the current
            gradient. None if there is a plan.
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
    sharpness: jax.Array
    sampled: jax.Array
    num_samples: jax.Array
    num_rejected: jax.Array
    perturbation_memory: Any = None
    sampling_memory: Any = None


def is_state(node: Any) -> bool:
    """Whether a node of a tree is a :class:`VSAMState`."""
    return isinstance(node, VSAMState)


def states_in(tree: Any, kind: Any = VSAMState) -> list[Any]:
    """All states of a type inside a tree."""
    is_kind = lambda node: isinstance(node, kind)
    return list(filter(is_kind, jax.tree.leaves(tree, is_leaf=is_kind)))


def only_state(tree: Any) -> VSAMState:
    """Returns the only :class:`VSAMState` inside a tree, however deep.

    Args:
        tree: a pytree that contains exactly one ``VSAMState``: the state of a chain or
            of a wrapper, a train state.

    Returns:
        That state.

    Raises:
        ValueError: if ``tree`` contains none or several.
    """
    found = states_in(tree)
    if len(found) != 1:
        raise ValueError(
            'state must hold exactly one VSAMState, which holds plan and statistics,'
            f' but it holds {len(found)}. Put one sharpness-aware transformation,'
            ' outside optax.partition, into the optimizer.'
        )
    return found[0]


def is_consumed(x: Any) -> bool:
    """Whether ``x`` is an array whose memory was donated."""
    is_array = isinstance(x, jax.Array) and not isinstance(x, core.Tracer)
    return is_array and x.is_deleted()


def check_alive(x: Any, what: str = 'The state') -> None:
    """Raises if ``x``, an array of a state, was donated."""
    if is_consumed(x):
        raise RuntimeError(consumed(what))


def consumed(what: str) -> str:
    """The text of an error for arrays that were donated."""
    return (
        f'{what} was consumed by an earlier call, perhaps one that failed, which reused'
        ' its memory (donate_state=True, donate_argnums): continue with the result of'
        ' that call. To keep a state, copy it before, jax.tree.map(jnp.copy, state), or'
        ' give PlannedStep donate_state=False.'
    )


def is_accumulated(tree: Any) -> bool:
    """Whether a state contains ``optax.MultiSteps`` around a method."""
    wrappers = states_in(tree, optax.MultiStepsState)
    return any(states_in(wrapper.inner_opt_state) for wrapper in wrappers)
