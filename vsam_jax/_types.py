"""Types of arguments that several modules share."""

from collections.abc import Callable
from typing import Any

import chex
import optax

# Any tree of arrays. jax has no type for it that a user's own nodes would satisfy.
PyTree = Any
# What a caller may give as a dtype. (jax.typing.DTypeLike leaves None out.)
DTypeLike = Any
# Maps parameters to the gradient of one mini-batch, or to (value, gradient).
GradFn = Callable[[PyTree], PyTree]
# A tree of booleans, or a callable that makes one from the parameters.
Mask = PyTree | Callable[[PyTree], PyTree]
# ρ: a number, a scalar array, or a schedule of the update count.
Radius = chex.Numeric | optax.Schedule
