r"""Relatives of SAM, each as its authors define it.

Each combines a choice of where, when and how in :func:`vsam_jax.sharpness_aware`.
``update``, masks and state work as in :func:`vsam_jax.vsam`, and so does the place:
first in ``optax.chain``. Tests compare most of them with recorded runs of their
authors' programs. docs/evidence/conformance.md names each program and the largest
difference. Defaults are starting points, not always the authors' own.
"""

import optax

from vsam_jax import _checks, perturbation, reuse, sampling
from vsam_jax._methods import every_step
from vsam_jax._transform import sharpness_aware
from vsam_jax._types import Mask, Radius


def gsam(
    rho: Radius = 0.05,
    alpha: float = 0.1,
    *,
    perturb_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GSAM: SAM that also shrinks the surrogate gap L(w + ε) − L(w).

    Take it where you can afford SAM and can tune α as well as ρ.

    .. math:: \text{direction} = g_\text{SAM} - α \, g_⊥, \quad
      g_⊥ = g - \frac{⟨g, g_\text{SAM}⟩}{‖g_\text{SAM}‖^2} \, g_\text{SAM}

    The authors let ρ follow the learning rate, as :func:`vsam_jax.rho_schedule` does.

    Args:
        rho: ρ, as in :func:`vsam_jax.vsam`.
        alpha: α >= 0; 0 is SAM. The authors use 0.01 to 0.4.
        perturb_mask: the tensors to perturb, as in :func:`vsam_jax.vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

    References:
        Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
        <https://arxiv.org/abs/2203.08065>`_, 2022

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(vsam_jax.gsam(rho=0.1, alpha=0.2), optax.sgd(0.1))
        >>> w, loss = jnp.array([1.0, 2.0]), lambda w: jnp.sum(w**4)
        >>> updates, _ = tx.update(
        ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
        >>> print(f'{updates[0]:.2f} {updates[1]:.2f}')
        -0.41 -3.70
    """
    return every_step(
        perturbation.l2_ascent, reuse.SurrogateGap(alpha), rho, perturb_mask
    )


def wsam(
    rho: Radius = 0.05,
    gamma: float = 0.9,
    *,
    perturb_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""WSAM (coupled form): SAM with a weight on the sharpness term.

    Take it where sharpness should count for more, or less, than in SAM.

    .. math:: \text{direction} = g + \frac{γ}{1 - γ} \, s, \quad s = g_\text{SAM} - g

    This is the gradient of L(w) + γ/(1 − γ) (L(w + ε) − L(w)) with ε held fixed. The
    decoupled form, which keeps s out of the base optimizer's momentum, is not
    implemented.

    Args:
        rho: ρ, as in :func:`vsam_jax.vsam`.
        gamma: γ in [0, 1); 0 is the base optimizer, 1/2 is SAM.
        perturb_mask: the tensors to perturb, as in :func:`vsam_jax.vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

    References:
        Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
        Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(vsam_jax.wsam(rho=0.1, gamma=0.75), optax.sgd(1.0))
        >>> w, loss = jnp.array(1.0), lambda w: w**2 / 2
        >>> updates, _ = tx.update(
        ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
        >>> print(f'{updates:.2f}')
        -1.30
    """
    gamma = _checks.real('gamma', gamma, high=1.0, open_high=True)
    return every_step(
        perturbation.l2_ascent, reuse.Amplified(gamma / (1 - gamma)), rho, perturb_mask
    )


def fsam(
    rho: Radius = 0.05,
    sigma: float = 1.0,
    decay: float = 0.6,
    *,
    perturb_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""F-SAM (friendly SAM): perturbs along the gradient minus its running average.

    Take it to perturb along what is specific to the mini-batch, not along what all
    mini-batches share.

    .. math:: v_t = g_t - σ \, m_{t-1}, \quad ε_t = ρ \, v_t / (‖v_t‖_2 + 10^{-12}),
      \quad m_t = λ \, m_{t-1} + (1 - λ) \, g_t

    At the first step v = g, and m becomes g. Every step updates the average. It takes
    as much memory as the parameters.

    Args:
        rho: ρ, as in :func:`vsam_jax.vsam`.
        sigma: σ >= 0, how much of the average is subtracted; 0 is SAM.
        decay: λ in [0, 1], the decay of the average (the authors' ``lmbda``).
        perturb_mask: the tensors to perturb, as in :func:`vsam_jax.vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

    References:
        Li et al., `Friendly Sharpness-Aware Minimization
        <https://arxiv.org/abs/2403.12350>`_, 2024

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(vsam_jax.fsam(rho=0.1), optax.sgd(0.1))
        >>> w, loss = jnp.ones(2), lambda w: jnp.sum(w**4)
        >>> opt_state = tx.init(w)
        >>> for _ in range(2):
        ...   updates, opt_state = tx.update(
        ...       jax.grad(loss)(w), opt_state, w, grad_fn=jax.grad(loss))
        ...   w = optax.apply_updates(w, updates)
        >>> print(f'{opt_state[0].perturbation_memory.mean[0]:.1f}')
        2.6
    """
    return every_step(
        perturbation.Along(perturbation.without_mean(sigma, decay)),
        reuse.NoReuse(),
        rho,
        perturb_mask,
    )


def vasso(
    rho: Radius = 0.05,
    theta: float = 0.4,
    *,
    perturb_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""VaSSO: perturbs along a running average of gradients.

    Take it where gradients of single mini-batches are noisy: the average is less so.

    .. math:: d_t = (1 - θ) \, d_{t-1} + θ \, g_t, \quad
      ε_t = ρ \, d_t / (‖d_t‖_2 + 10^{-12})

    The average starts at the first gradient, and every step updates it. It takes as
    much memory as the parameters.

    Args:
        rho: ρ, as in :func:`vsam_jax.vsam`.
        theta: θ in (0, 1]; 1 is SAM.
        perturb_mask: the tensors to perturb, as in :func:`vsam_jax.vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

    References:
        Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
        Suppression <https://arxiv.org/abs/2309.15639>`_, 2023

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(vsam_jax.vasso(rho=0.1), optax.sgd(0.1))
        >>> w, loss = jnp.ones(2), lambda w: jnp.sum(w**4)
        >>> _, opt_state = tx.update(
        ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
        >>> print(opt_state[0].perturbation_memory.mean)
        [4. 4.]
    """
    return every_step(
        perturbation.Along(perturbation.running_mean(theta)),
        reuse.NoReuse(),
        rho,
        perturb_mask,
    )


def asyncsam(
    rho: Radius = 0.05,
    *,
    perturb_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AsyncSAM: perturbs along the gradient of the previous step.

    Take it to compare with the published method; on one device it is no faster than
    SAM.

    .. math:: \text{direction} = ∇L_t(w_t + ε_t), \quad
      ε_t = ρ \, g_{t-1} / (‖g_{t-1}‖_2 + 10^{-12})

    The first step is not perturbed. The direction of a step does not depend on its own
    g, so both gradients of a step can be computed at the same time. The authors save
    time this way, and by computing g_{t−1} on fewer examples. In one program on one
    device it costs as much as SAM. ``per_device=True`` raises an error, because the
    stored gradient is the mean over devices.

    Args:
        rho: ρ, as in :func:`vsam_jax.vsam`.
        perturb_mask: the tensors to perturb, as in :func:`vsam_jax.vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`, whose ``perturbation_memory`` is the g of the
        latest step.

    References:
        Jo, Lim and Lee, `Asynchronous Sharpness-Aware Minimization For Fast and
        Accurate Deep Learning
        <https://arxiv.org/abs/2503.11147>`_, 2025

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(vsam_jax.asyncsam(rho=0.1), optax.sgd(1.0))
        >>> w, loss = jnp.array(1.0), lambda w: w**2 / 2
        >>> updates, _ = tx.update(
        ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
        >>> print(f'{updates:.2f}')
        -1.00
    """
    return every_step(
        perturbation.Along(perturbation.delayed(), uses_gradient=False),
        reuse.NoReuse(),
        rho,
        perturb_mask,
    )


def aesam(
    rho: Radius = 0.05,
    *,
    steps: int,
    delta: float = 0.9,
    lambda1: float = -1.0,
    lambda2: float = 1.0,
    stats_mask: Mask | None = None,
    perturb_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AE-SAM: a SAM step where the gradient is unusually large, else a plain step.

    Take it where the gradients should decide when to take a second one. A step is a
    SAM step if

    .. math:: ‖g_t‖^2 ≥ μ_t + c_t \, σ_t, \quad
      c_t = \frac{t}{T} λ_1 + \Big(1 - \frac{t}{T}\Big) λ_2

    Here μ is an exponential average of ‖g‖², and σ² one of (‖g‖² − μ)². Both are
    updated before the comparison (:class:`vsam_jax.sampling.ByGradientNorm`). The
    current gradient decides, so there is no plan. Use ``jax.jit`` for the step:
    :class:`vsam_jax.PlannedStep` raises an error.

    Args:
        rho: ρ, as in :func:`vsam_jax.vsam`.
        steps: T >= 1, the length of the run. After T steps c = λ₁.
        delta: δ in [0, 1), the decay of the averages.
        lambda1: λ₁, the c at the end. A smaller one samples more steps.
        lambda2: λ₂, the c at the start.
        stats_mask: the tensors over which ‖g‖ is taken, as in :func:`vsam_jax.vsam`.
        perturb_mask: the tensors to perturb, as in :func:`vsam_jax.vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

    References:
        Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
        <https://arxiv.org/abs/2304.14647>`_, 2023

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(vsam_jax.aesam(rho=0.1, steps=20), optax.sgd(0.02))
        >>> loss = lambda w: jnp.sum(w**4)
        >>> @jax.jit
        ... def train_step(w, opt_state):
        ...   updates, opt_state = tx.update(
        ...       jax.grad(loss)(w), opt_state, w, grad_fn=jax.grad(loss))
        ...   return optax.apply_updates(w, updates), opt_state
        >>> w = jnp.ones(2)
        >>> opt_state = tx.init(w)
        >>> for _ in range(20):
        ...   w, opt_state = train_step(w, opt_state)
        >>> print(0 < int(opt_state[0].num_samples) < 20)
        True
    """
    rule = sampling.ByGradientNorm(
        steps=steps, delta=delta, lambda1=lambda1, lambda2=lambda2
    )
    return sharpness_aware(
        perturbation.l2_ascent,
        rule,
        reuse.NoReuse(),
        rho,
        stats_mask=stats_mask,
        perturb_mask=perturb_mask,
    )
