"""SAM on some of the steps, with a larger perturbation's part: no memory is needed."""

from typing import Any

import optax

import vsam_jax


def amplified(
    rho: Any = 0.05, *, every: int = 3, perturb_mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    """On every k-th step g + k s, on the others g; s is the PSF.

    Args:
        rho: ρ, as in :func:`vsam_jax.vsam`.
        every: k >= 1; 1 is SAM.
        perturb_mask: as in :func:`vsam_jax.vsam`.

    Returns:
        An optax transformation.
    """
    return vsam_jax.sharpness_aware(
        vsam_jax.perturbation.l2_ascent,
        vsam_jax.sampling.Periodic(every),
        vsam_jax.reuse.Amplified(float(every)),
        rho,
        perturb_mask=perturb_mask,
    )
