"""Decides during tracing whether a step is sampled, as far as that is known.

*Traced*: the host makes no decision. The plan in the state decides inside one program,
with ``jax.lax.cond``. *Planned*: the host decides beforehand, so there is no
conditional. The host's decision reaches ``update`` through a context, whatever code is
between the two. The context is part of the keys of jit's caches.
"""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import core, lax

from vsam_jax import _checks, convolutions

T = TypeVar('T')

_context = jax.make_user_context(default_value=None)


def decided(sample: bool | None) -> contextlib.AbstractContextManager[Any]:
    """A context that sets ``sample`` for updates that do not set it themselves."""
    return _context(sample)


def resolve(
    sample: Any, rule: Callable[[], jax.Array], *, always: bool
) -> bool | jax.Array:
    """The decision for this step: a Python bool (planned) or a traced bool.

    Args:
        sample: the caller's decision. None follows the context, or else the rule.
        rule: returns the decision of the sampling rule, by the plan or the gradient.
        always: whether every step is sampled anyway.

    Returns:
        A Python bool if the decision is already known, else a bool scalar.
    """
    if sample is None:
        sample = _context.value
    if sample is None:
        return True if always else _known(rule())
    if isinstance(sample, (bool, np.bool_)):
        return bool(sample)
    if isinstance(sample, (jax.Array, np.ndarray)) and sample.dtype == jnp.bool_:
        if sample.shape:
            raise ValueError(
                'sample must be None, a Python bool or a boolean scalar array, got an'
                f' array of shape {sample.shape}.'
            )
        return jnp.asarray(sample)
    raise TypeError(
        'sample must be None, a Python bool or a boolean scalar array, got'
        f' {_checks.shown(sample)}.'
    )


def choose(
    sample: bool | jax.Array,
    sampled: Callable[[], T],
    unsampled: Callable[[], T],
) -> T:
    """Runs one of two functions, with a conditional only if necessary."""
    if isinstance(sample, bool):
        return sampled() if sample else unsampled()
    # The first pass may be in the outermost computation, but this one is not.
    return jax.lax.cond(sample, convolutions.canonical(sampled), unsampled)


def _known(decision: jax.Array) -> bool | jax.Array:
    # Outside all tracing, a conditional would be compiled again at every step.
    return decision if _is_traced(decision) else bool(decision)


def _is_traced(x: jax.Array) -> bool:
    # Inside jit constants are concrete too, but new arrays are not.
    return isinstance(x, core.Tracer) or isinstance(lax.full((), 0), core.Tracer)


def _advance(step: jax.Array) -> jax.Array:
    return jnp.asarray(optax.safe_increment(step))


# Has its own name, by which updates are counted in the program of a step.
_advance.__name__ = 'vsam_jax_update'
advance = jax.jit(_advance)


def num_updates(program: Any) -> int:
    """How often a traced program updates the state of a method, at most.

    Args:
        program: a ``Jaxpr`` or ``ClosedJaxpr``.

    Returns:
        The number. In a loop of unknown length each update counts twice.
    """
    total = 0
    for equation in getattr(program, 'jaxpr', program).eqns:
        if equation.params.get('name') == _advance.__name__:
            total += 1
            continue
        inside = [num_updates(p) for x in equation.params.values() for p in _in(x)]
        kind = equation.primitive.name
        if kind == 'cond':
            total += max(inside, default=0)
        else:
            rounds = {'scan': equation.params.get('length'), 'while': 2}.get(kind, 1)
            total += rounds * sum(inside)
    return total


def _in(parameter: Any) -> list[Any]:
    """The programs in a parameter of an equation."""
    if isinstance(parameter, (tuple, list)):
        return [program for x in parameter for program in _in(x)]
    return (
        [parameter] if hasattr(getattr(parameter, 'jaxpr', parameter), 'eqns') else []
    )
