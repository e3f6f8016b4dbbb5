"""Whether a step is sampled, as far as it is decided while a step is traced.

*Traced*: nobody says, and the plan in the state decides inside one program, with
``jax.lax.cond``. *Planned*: the host says so beforehand, and no conditional is made.
The host's word reaches ``update`` through a context that is part of the keys of jit's
caches, whatever stands between the two.
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
    """Within it, an update that is not told otherwise is sampled, or is not."""
    return _context(sample)


def resolve(
    sample: Any, rule: Callable[[], jax.Array], *, always: bool
) -> bool | jax.Array:
    """What decides this step: a Python bool (planned) or a traced bool.

    Args:
        sample: the caller's decision: None follows the context's, or else the rule's.
        rule: says what the sampling rule does, by the plan or by the gradient.
        always: whether every step is sampled anyway.

    Returns:
        A Python bool if the decision is known by now, else a bool scalar.
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
    """Runs one of two functions; a conditional is made only if it must be."""
    if isinstance(sample, bool):
        return sampled() if sample else unsampled()
    # The first pass may stand in the outermost computation, this one does not.
    return jax.lax.cond(sample, convolutions.canonical(sampled), unsampled)


def _known(decision: jax.Array) -> bool | jax.Array:
    # Outside of all tracing a conditional would be compiled anew at every step.
    return decision if _is_traced(decision) else bool(decision)


def _is_traced(x: jax.Array) -> bool:
    # Constants are concrete inside of jit too; what is made there is not.
    return isinstance(x, core.Tracer) or isinstance(lax.full((), 0), core.Tracer)


def _advance(step: jax.Array) -> jax.Array:
    return jnp.asarray(optax.safe_increment(step))


# Under a name of its own, by which updates are counted in the program of a step.
_advance.__name__ = 'vsam_jax_update'
advance = jax.jit(_advance)


def num_updates(program: Any) -> int:
    """How often a traced program updates the state of a method, at most.

    Args:
        program: a ``Jaxpr`` or ``ClosedJaxpr``.

    Returns:
        The number; in a loop of unknown length each update counts twice.
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
