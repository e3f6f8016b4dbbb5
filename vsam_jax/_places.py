"""The place of a transformation in a chain, found from the calls around its update.

optax does not tell a transformation its place. But if a gradient is clipped before it
reaches a method, it is not the one that ``grad_fn`` returns, and the numbers do not
show it. The Python calls that led to an update do. They are inspected while a step is
traced. If another version of optax makes other calls, the check passes.
"""

import sys
import weakref
from types import FrameType
from typing import NamedTuple

import optax

# Wrappers of a method in which at least one mini-step passed ``sample``.
_told: weakref.WeakSet[optax.MultiSteps] = weakref.WeakSet()


class Place(NamedTuple):
    """The place of a transformation whose update is running.

    Attributes:
        before: how many transformations of an ``optax.chain`` were called before it.
        after: how many will be called after it.
        accumulation: the ``optax.MultiSteps`` around it, or None.
    """

    before: int
    after: int
    accumulation: optax.MultiSteps | None


def place(frame: FrameType | None) -> Place:
    """The place of the transformation whose update this frame called."""
    before, after, accumulation = 0, 0, None
    # JAX frames are in between if a wrapper calls its inner update in a conditional.
    while frame is not None and (package := _package(frame)) in ('optax', 'jax'):
        values = frame.f_locals if package == 'optax' else {}
        # The local variables of optax.chain, and of optax.named_chain.
        functions = values.get('update_fns', values.get('transforms'))
        made = values.get('new_state')
        if isinstance(functions, (tuple, list)) and isinstance(made, (list, dict)):
            before += len(made)
            after += len(functions) - len(made) - 1
        if isinstance(values.get('self'), optax.MultiSteps):
            accumulation = values['self']
        frame = frame.f_back
    return Place(before, after, accumulation)


def check_method(*, sample_is_told: bool) -> None:
    """Raises if a method would compare gradients that do not belong together.

    Call it from the update of the method.

    Args:
        sample_is_told: whether the caller of the update passed ``sample``.
    """
    found = place(sys._getframe(2))
    if found.before:
        raise ValueError(
            'The method must be the first transformation in optax.chain, got'
            f' {found.before} before it. What comes before (clipping, weight decay,'
            ' another method, an optimizer) changes the gradient, but not the one that'
            ' grad_fn returns, so that it would be lost on sampled steps. Write'
            ' optax.chain(vsam(...), optax.clip_by_global_norm(1.0), optax.sgd(0.1)).'
        )
    if found.accumulation is None:
        return
    if sample_is_told:
        _told.add(found.accumulation)
    elif found.accumulation not in _told:
        raise ValueError(
            'sample must be given where optax.MultiSteps is around the method, got'
            ' None: it runs on every mini-step, and the second gradient would be that'
            ' of one mini-step alone. Give sample=False on all mini-steps but the last,'
            ' whose grad_fn covers the whole batch. Or put optax.MultiSteps around what'
            ' comes after the method: optax.chain(vsam(...), optax.MultiSteps('
            'optax.sgd(0.1), 4).gradient_transformation()).'
        )


def check_last() -> None:
    """Raises unless the transformation that calls this is the last in its chain."""
    found = place(sys._getframe(2))
    if found.after:
        raise ValueError(
            'vsam_jax.msam must be the last transformation in optax.chain, after the'
            f' learning rate, got {found.after} after it, which would change by how'
            ' much the parameters are moved. Write optax.chain(optax.sgd(0.1,'
            ' momentum=0.9), vsam_jax.msam(0.3)).'
        )


def _package(frame: FrameType) -> str:
    return frame.f_globals.get('__name__', '').partition('.')[0]
