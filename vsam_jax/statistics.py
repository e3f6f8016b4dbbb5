r"""Statistics of the last K samples, by which a sampling rule may decide.

They are kept in rings. A ring is an array of length K with the newest value last. Rings
start at zero. ``filled`` says how many values have been pushed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vsam_jax._types import DTypeLike

__all__ = [
    'Rings',
    'init_rings',
    'push_sample',
    'relative_change',
    'segment_variance',
]


class Rings(NamedTuple):
    """Statistics of the last K samples, each an array [K], oldest first.

    Attributes:
        norms: N, the norms ‖s‖ of the projection of the second-order gradient.
        ratios: Q, the norms ‖s‖ relative to the gradient's, ‖s‖ / ‖g‖.
        variances: V, the variance of N within its segments (see
            :func:`segment_variance`), each computed right after its ‖s‖ was pushed.
        filled: int32 scalar, how many samples have been pushed, at most K.
    """

    norms: jax.Array
    ratios: jax.Array
    variances: jax.Array
    filled: jax.Array


def init_rings(window: int, dtype: DTypeLike) -> Rings:
    """Returns empty rings of length ``window``."""
    return Rings(
        norms=jnp.zeros((window,), dtype),
        ratios=jnp.zeros((window,), dtype),
        variances=jnp.zeros((window,), dtype),
        filled=jnp.zeros((), jnp.int32),
    )


def push_sample(
    rings: Rings, grad_norm: jax.Array, psf_norm: jax.Array, *, segments: int
) -> Rings:
    """Pushes one sample: ‖s‖, ‖s‖ / ‖g‖ and the new segment variance.

    Args:
        rings: the rings before the sample.
        grad_norm: ‖g‖, a finite scalar. If it is zero, the ratio is zero.
        psf_norm: ‖s‖, a finite scalar.
        segments: S, see :func:`segment_variance`.

    Returns:
        The rings with the sample as the newest value. All values are finite.
    """
    limits = jnp.finfo(rings.norms.dtype)
    measurable = grad_norm >= limits.tiny
    ratio = jnp.where(measurable, psf_norm / jnp.where(measurable, grad_norm, 1), 0)
    norms = _push(rings.norms, psf_norm)
    variance = segment_variance(norms, segments)
    window = rings.norms.shape[0]
    return Rings(
        norms=norms,
        ratios=_push(rings.ratios, jnp.minimum(ratio, limits.max)),
        variances=_push(rings.variances, jnp.minimum(variance, limits.max)),
        filled=jnp.minimum(rings.filled + 1, window).astype(jnp.int32),
    )


def _push(ring: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.concatenate([ring[1:], value.astype(ring.dtype)[None]])


def segment_variance(norms: jax.Array, segments: int) -> jax.Array:
    """Returns the variance of the norms within groups of similar norms.

    Args:
        norms: N, an array [K].
        segments: S, which divides K.

    Returns:
        A scalar. sort(N) is cut into S segments of K/S consecutive values. The result
        is the mean of the unbiased variances of the segments. Sorting removes the
        trend, so the result shows how unevenly the norms are spread.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsam_jax import statistics
        >>> print(statistics.segment_variance(jnp.array([9., 1., 3., 9.]), 2))
        1.0
    """
    groups = jnp.sort(norms).reshape(segments, -1)
    return groups.var(axis=1, ddof=1).mean()


def relative_change(ring: jax.Array, filled: jax.Array) -> jax.Array:
    r"""Returns the mean relative change from one sample to the next, in [−1, 1].

    .. math::
      \mathrm{rel}(x) = \mathrm{clip}\Big(\frac{1}{K-1} \sum_{i=1}^{K-1}
      \frac{x_i - x_{i-1}}{x_{i-1}}, -1, 1\Big)

    The mean leaves out pairs that do not exist yet (with fewer than K samples). It also
    leaves out pairs that start at zero, whose relative change is not finite.

    Args:
        ring: x, an array [K] of finite values >= 0, oldest first.
        filled: how many of the last values are samples.

    Returns:
        A finite scalar; zero if there is no pair.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsam_jax import statistics
        >>> ring = jnp.array([0.0, 0.0, 2.0, 3.0])
        >>> print(statistics.relative_change(ring, filled=2))
        0.5
    """
    window = ring.shape[0]
    previous, current = ring[:-1], ring[1:]
    exists = jnp.arange(1, window, dtype=jnp.int32) > window - filled
    # Below the smallest normal number some devices divide by zero.
    valid = exists & (previous >= jnp.finfo(ring.dtype).tiny)
    change = jnp.where(valid, (current - previous) / jnp.where(valid, previous, 1), 0)
    number = valid.sum(dtype=ring.dtype)
    mean = change.sum() / jnp.maximum(number, 1)
    return jnp.clip(mean, -1, 1).astype(ring.dtype)
