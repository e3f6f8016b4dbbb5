"""Whether a second gradient is the first one, handed on.

Training then goes on as if there were no method. A gradient that was made of nothing is
let through: tests give such numbers. Traced values know what they were made of; JAX
promises nothing of how they do, so where they do not say it, nothing is claimed.
"""

from typing import Any

import jax

from vsam_jax._types import PyTree


def is_first_again(second: PyTree, first: PyTree, params: PyTree) -> bool:
    """Whether a second gradient is surely the first one, which was made of w.

    Args:
        second: the second gradient.
        first: the first gradient.
        params: w.

    Returns:
        True if it surely is; False where that cannot be told. (A gradient taken at w
        once more looks like one that somebody took at a w + ε of their own.)
    """
    known, given = ({id(x) for x in jax.tree.leaves(tree)} for tree in (first, params))
    given -= known  # A gradient that is w itself says nothing of where it is from.
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
