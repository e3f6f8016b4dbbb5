r"""Learned step size quantization: numbers on a grid whose step is trained.

.. math:: \bar x = \mathrm{round}(\mathrm{clip}(x / s, -Q_N, Q_P)) \cdot s

Rounding has no useful derivative of its own; x̄ is differentiated as if it were x where
x lies inside the grid, and the step takes what rounding adds. Esser et al., *Learned
Step Size Quantization*, arXiv 1902.08153.

A step may be driven to zero or below by an optimizer that knows nothing of it. What
counts is therefore :func:`positive` of the parameter: its size, and never less than
``SMALLEST_STEP``.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# What numbers of a usual size are divided by without overflow, squared too.
SMALLEST_STEP = 1e-8


def levels(bits: int, signed: bool) -> tuple[int, int]:
    """The ends of the grid in steps, -Q_N and Q_P.

    Args:
        bits: how many bits a number has.
        signed: whether numbers may be negative.

    Returns:
        The lowest and the highest integer.
    """
    if signed:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def positive(step: jax.Array) -> jax.Array:
    """The step that the parameter ``step`` stands for."""
    return jnp.maximum(jnp.abs(step), SMALLEST_STEP)


def initial_step(x: jax.Array, high: int) -> jax.Array:
    """Where the step for numbers like ``x`` starts: twice their mean size over √Q_P.

    Args:
        x: the numbers, of any shape. If all are zero they say nothing of their size,
            and the step is that of numbers whose mean size is ½.
        high: Q_P.

    Returns:
        A scalar, float32 or wider.
    """
    mean = jnp.mean(jnp.abs(_widen(x)))
    return positive(jnp.where(mean > 0, 2 * mean, 1) / math.sqrt(high))


def to_levels(x: jax.Array, step: jax.Array, low: int, high: int) -> jax.Array:
    """The whole numbers of steps nearest to ``x``, as floating-point numbers.

    Args:
        x: what is quantized, of any shape.
        step: the positive step, a scalar.
        low: -Q_N.
        high: Q_P.

    Returns:
        An array like ``x``, float32 or wider.
    """
    return jnp.round(jnp.clip(_widen(x) / step, low, high))


def quantize(
    x: jax.Array, step: jax.Array, *, bits: int, signed: bool, count: int
) -> jax.Array:
    r"""The numbers of the grid nearest to ``x``.

    The derivative with respect to x is 1 inside the grid and 0 outside, and with
    respect to s

    .. math:: \frac{1}{\sqrt{n Q_P}} \cdot \begin{cases}
        \mathrm{round}(x/s) - x/s & -Q_N < x/s < Q_P \\
        -Q_N \text{ or } Q_P & \text{outside} \end{cases}

    Args:
        x: what is quantized, of any shape. It is divided and rounded in float32 or
            wider, and the result rounded to the dtype of ``x``.
        step: the parameter of the step, a scalar.
        bits: how many bits a number of the grid has.
        signed: whether the grid has negative numbers.
        count: n, weights of a tensor or features of an example, which the gradient of
            the step is scaled with.

    Returns:
        An array like ``x``.
    """
    low, high = levels(bits, signed)
    gain = 1 / math.sqrt(count * high)
    return _on_grid(_widen(x), positive(step), low, high, gain).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _on_grid(
    x: jax.Array, step: jax.Array, low: int, high: int, gain: float
) -> jax.Array:
    del gain
    return to_levels(x, step, low, high) * step


@_on_grid.defjvp
def _on_grid_jvp(
    low: int, high: int, gain: float, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    x, step = primals
    x_tangent, step_tangent = tangents
    place = x / step
    inside = (place > low) & (place < high)
    # One difference per element: differences of sums over them would cancel.
    slope = jnp.where(inside, jnp.round(place) - place, jnp.clip(place, low, high))
    tangent = jnp.where(inside, x_tangent, 0) + gain * slope * step_tangent
    return _on_grid(x, step, low, high, gain), tangent


class Quantizer(nn.Module):
    """A grid with a learned step, which starts from the first numbers that it sees.

    These are the weights, or the activations of the batch that ``init`` runs on.

    Attributes:
        bits: how many bits a number of the grid has.
        signed: whether the grid has negative numbers.
        has_batch: whether the first axis is that of examples, which do not count among
            the features.
    """

    bits: int
    signed: bool
    has_batch: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The numbers of the grid nearest to ``x``, in its shape and dtype."""
        _, high = levels(self.bits, self.signed)
        step = self.param('step', lambda _: initial_step(x, high))
        count = math.prod(x.shape[1:] if self.has_batch else x.shape)
        return quantize(x, step, bits=self.bits, signed=self.signed, count=count)


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
