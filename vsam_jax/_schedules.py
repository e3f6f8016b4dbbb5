"""A radius that follows the learning rate."""

import jax
import jax.numpy as jnp
import optax

from vsam_jax import _checks


def rho_schedule(
    learning_rate: optax.Schedule,
    *,
    max_rho: float,
    min_rho: float,
    max_rate: float,
    min_rate: float = 0.0,
) -> optax.Schedule:
    r"""A schedule of ρ that follows the learning rate between two bounds, as in GSAM.

    .. math:: ρ_t = ρ_\min + (ρ_\max - ρ_\min) \,
      \frac{r_t - r_\min}{r_\max - r_\min}

    The learning rate r_t is clipped to its bounds.

    Args:
        learning_rate: an optax schedule.
        max_rho: ρ_max >= ρ_min, at the largest learning rate.
        min_rho: ρ_min >= 0, at the smallest.
        max_rate: r_max > r_min, the largest learning rate.
        min_rate: r_min.

    Returns:
        A schedule that you pass as ``rho``. It counts updates of the method. (It cannot
        follow a rate that is constant or not known beforehand.)

    Raises:
        TypeError, ValueError: for bounds out of order, or a ``learning_rate`` that is
            not a schedule.

    References:
        Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
        <https://arxiv.org/abs/2203.08065>`_, 2022

    Example:
        >>> import optax, vsam_jax
        >>> rate = optax.cosine_decay_schedule(0.1, decay_steps=100)
        >>> rho = vsam_jax.rho_schedule(rate, max_rho=0.4, min_rho=0.1, max_rate=0.1)
        >>> for step in (0, 50, 100):
        ...   print(f'{rho(step):.2f}')
        0.40
        0.25
        0.10
        >>> tx = optax.chain(vsam_jax.gsam(rho, alpha=0.1), optax.sgd(rate))
    """
    if not callable(learning_rate):
        raise TypeError(
            'learning_rate must be a schedule, a function of the update count, got'
            f' {_checks.shown(learning_rate)}. With a constant rate give a constant'
            ' rho.'
        )
    min_rho = _checks.real('min_rho', min_rho)
    max_rho = _checks.real('max_rho (from min_rho on)', max_rho, low=min_rho)
    min_rate = _checks.real('min_rate', min_rate)
    max_rate = _checks.real(
        'max_rate (above min_rate)', max_rate, low=min_rate, open_low=True
    )

    def schedule(count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        share = (learning_rate(count) - min_rate) / (max_rate - min_rate)
        return min_rho + (max_rho - min_rho) * jnp.clip(share, 0, 1)

    return schedule
