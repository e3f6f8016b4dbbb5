"""Whether a second gradient was taken at the parameters that it should be taken at.

Taken at w, and not at w + ε, it is the first one again: training goes on as if there
were no method. Traced values know what they were made of. JAX promises nothing of how
they do, so where they do not say it, nothing is claimed.
"""

from typing import Any

import jax
from jax import core
from jax.extend.core import Literal

from vsam_jax._types import PyTree


def is_first_again(
    second: PyTree, perturbed: PyTree, first: PyTree, params: PyTree
) -> bool:
    """Whether a second gradient was surely made of w, and not of w + ε.

    Args:
        second: the second gradient.
        perturbed: w + ε, only what is not w.
        first: the first gradient.
        params: w.

    Returns:
        True if it was made of w and of nothing in w + ε; False where that cannot be
        told, and where it was made of neither, or of the first gradient.
    """
    wanted, known, given = (
        {id(x) for x in jax.tree.leaves(tree)} for tree in (perturbed, first, params)
    )
    given -= known  # A gradient that is w itself says nothing of where it is from.
    pending = jax.tree.leaves(second)
    if all(id(x) in known for x in pending):
        known = set()  # Whether that was made of w is what is left to see.
    seen, is_made_of_params = set(), False
    while pending:
        x = pending.pop()
        if id(x) in wanted:
            return False
        is_made_of_params |= id(x) in given
        # Numbers do not know where they come from, and the first gradient is known.
        if not isinstance(x, core.Tracer) or id(x) in known:
            continue
        if not hasattr(x, 'parent'):
            return False
        equation: Any = x.parent
        if equation is None:
            pending += _outside(x)
            continue
        if id(equation) in seen:
            continue
        # What is read from a mutable array does not say what was written to it.
        if not hasattr(equation, 'in_tracers') or getattr(equation, 'effects', True):
            return False
        seen.add(id(equation))
        pending.extend(equation.in_tracers)
    return is_made_of_params


def _outside(x: Any) -> list[Any]:
    """What a traced value stands for in the program around that of a branch."""
    frame = getattr(getattr(x, '_trace', None), 'frame', None)
    name = getattr(x, 'val', None)
    if frame is None or name is None or isinstance(name, Literal):
        return []
    found = getattr(frame, 'constvar_to_val', {}).get(name)
    return [] if found is None else [found]
