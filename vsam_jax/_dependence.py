"""Detects a ``grad_fn`` that returns the first gradient again.

Training would then continue as if there were no method. A gradient that depends on
nothing passes, because tests use such numbers. Traced values know what they were
computed from. JAX does not guarantee how they store it, so if they do not say, the
check passes.
"""

from typing import Any

import jax

from vsam_jax._types import PyTree


def is_first_again(second: PyTree, first: PyTree, params: PyTree) -> bool:
    """Whether a second gradient is certainly the first one, computed at w.

    Args:
        second: the second gradient.
        first: the first gradient.
        params: w.

    Returns:
        True if it certainly is; False if that is not known. (A gradient computed at w
        a second time looks like one at a w + ε that the caller made.)
    """
    known, given = ({id(x) for x in jax.tree.leaves(tree)} for tree in (first, params))
    given -= known  # A gradient that is w itself does not show its origin.
    pending, seen = jax.tree.leaves(second), set()
    if not all(id(x) in known for x in pending):
        return False
    while pending:
        x = pending.pop()
        if id(x) in given:
            return True
        equation: Any = getattr(x, 'parent', None)
        if equation is not None and id(equation) not in seen:
            seen.add(id(equation))
            pending.extend(getattr(equation, 'in_tracers', ()))
    return False
