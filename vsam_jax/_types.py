"""Argument types that several modules share."""

from collections.abc import Callable
from typing import Any

import chex
import optax

# Any tree of arrays. jax has no type for it that user-defined nodes satisfy.
PyTree = Any
# Anything accepted as a dtype. (jax.typing.DTypeLike excludes None.)
DTypeLike = Any
# Maps parameters to the gradient on one mini-batch, or to (value, gradient).
GradFn = Callable[[PyTree], PyTree]
# A tree of booleans, or a callable that makes such a tree from the parameters.
Mask = PyTree | Callable[[PyTree], PyTree]
# ρ: a number, a scalar array, or a schedule of the update count.
Radius = chex.Numeric | optax.Schedule
