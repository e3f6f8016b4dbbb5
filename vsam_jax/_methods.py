r"""The methods with a name: each one choice of where, when and how.

=============== ======================= ============= =========================
method          where (perturbation)    when          how (reuse)
=============== ======================= ============= =========================
``vsam``        ball of radius ρ        by variation  decayed difference
``steady_vsam`` ball of radius ρ        every k steps difference, noise limited
``lean_sam``    of a share of examples  every k steps difference, noise limited
``sam``         ball of radius ρ        every step    not at all
``asam``        scaled by |w|           every step    not at all
``looksam``     ball of radius ρ        every k steps rescaled orthogonal part
=============== ======================= ============= =========================

The others: :mod:`vsam_jax._family`.
"""

from typing import Any

import optax

from vsam_jax import _checks, _portions, perturbation, reuse, sampling
from vsam_jax._transform import sharpness_aware
from vsam_jax._types import DTypeLike, Mask, Radius


def vsam(
    rho: Radius = 0.05,
    *,
    window: int = 50,
    segments: int = 5,
    warmup_steps: int | None = None,
    norm_gain: float = 0.13,
    variance_gain: float = 0.13,
    decay: float = 0.7,
    reuse_steps: int = 6,
    max_rate: float = 0.8,
    stats_mask: Mask | None = None,
    perturb_mask: Mask | None = None,
    psf_dtype: DTypeLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Variation-based SAM: a second gradient on some steps, reused on the others.

    Stands first in a chain and turns the gradient g = ∇L(w) into a
    sharpness-aware direction. On a *sampled* step it takes a second gradient,

    .. math::
      ε = ρ \, g / (‖g‖_2 + 10^{-12}), \quad s = ∇L(w + ε) - g, \quad
      \text{direction} = g + s,

    on the others it reuses s, the PSF (projection of the second-order gradient
    onto the first-order one), a steps old by then:

    .. math::
      \text{direction} = g + c(a) \, s, \quad c(a) = β^a \; (a ≤ R), \;
      0 \; (a > R).

    The first W steps are all sampled. After that ⌊b⌋ of every K steps are; b
    starts at 1 and is scaled at the start of each window,

    .. math::
      b \leftarrow \mathrm{clip}\big(b \, (1 + α_1 \mathrm{rel}(Q)
      + α_2 \mathrm{rel}(V)), 1, ⌊K p_{max}⌋\big),

    by the mean relative changes (:func:`vsam_jax.statistics.relative_change`)
    of the last K ratios ‖s‖/‖g‖ (Q) and of the variance of the last K norms ‖s‖
    inside S segments of similar ones (V). Which steps of a window are sampled is
    decided before it starts (:func:`vsam_jax.sampling.window_plan`).

    ``update`` takes two more arguments by keyword. ``grad_fn(params) -> grads`` is
    the gradient of the same mini-batch, with the same dropout key, called at most
    once. ``sample`` decides this step: None follows the plan in the state, inside
    one program (*traced*, a ``jax.lax.cond``) or as :class:`vsam_jax.PlannedStep`
    says (*planned*); a Python bool compiles a step without a conditional; a boolean
    array overrides the plan in a traced step. Outside of ``jax.jit`` the plan is
    read, and nothing is compiled.

    With ``value``, the loss L(w) of the first pass, ``grad_fn`` may return
    ``(value, grads)`` as ``jax.value_and_grad`` does: the state then keeps by how much
    the loss rises, L(w + ε) − L(w), as its ``sharpness``.

    *From a slice of the mini-batch.* s is a small correction, and a part of the
    mini-batch tells it for a part of the price. ``psf_grad_fn(params) -> grads`` is
    the gradient of that part: the same examples and the same dropout key at each call.
    With it a sampled step takes g′ = ∇L′(w) and g′_SAM = ∇L′(w + ε), ε made of g′, and
    s = g′_SAM − g′; the direction is g + s, with g of the whole mini-batch as ever. It
    counts as a sample only if ‖g‖, ‖g′‖ and ‖s‖ are finite, and Q is ‖s‖/‖g′‖.
    ``grad_fn`` is not needed then. The builders do it by ``psf_share``. Gradients of
    fewer examples are longer, so ρ should be smaller: start with SAM's times the
    square root of the share. It is wrong where the part is no sample of the whole, and
    where it holds a handful of examples (above all with BatchNorm, which takes its
    statistics). It does not pay where a part cannot fill the accelerator.
    (:func:`lean_sam` is that, with SAM's ρ.)

    *Several devices.* Under ``jax.jit`` one program sees all of them, and nothing need
    be said. A function that runs once per device (``jax.shard_map``, ``jax.pmap``)
    says how gradients are made there, by two more arguments of ``update``.
    ``axis_name`` is the name of the mapped axis or a tuple of such names: ``updates``
    and the result of ``grad_fn`` are each device's own gradients, and are averaged.
    ``axis_name=()`` says that they are means already. ``per_device=True``: each device
    perturbs along its own gradient and the second gradients are averaged
    (m-sharpness, m being a device's share of the mini-batch). That is another
    objective, and the authors of SAM found smaller m to generalize better. It changes
    with the number of devices. The first mean is then not needed before the second
    pass, so the two can overlap. With ``per_device=False`` (the default) there is one
    perturbation, from the mean gradient, so that the result is that of ``jax.jit`` on
    any number of devices. Either way s, its norms and the plan are those of the mean
    gradients, the same on all devices.

    Args:
        rho: ρ, the radius of the perturbation: a number >= 0 (0 gives the base
            optimizer), a scalar array, or an optax schedule of the update count.
        window: K >= 2, how many steps one plan covers and how many samples the
            statistics look back on.
        segments: S, divides K into groups of at least two.
        warmup_steps: W, how many first steps are all sampled. None gives 2K − 1, the
            least with which all statistics are complete when the first window starts.
            With fewer (or with rejected samples among them) the variance of ‖s‖ grows
            for some windows only because its ring fills, and the budget with it.
        norm_gain: α₁ >= 0, the gain on the change of ‖s‖/‖g‖.
        variance_gain: α₂ >= 0, the gain on the change of the variance of ‖s‖.
        decay: β in [0, 1], the decay of a reused PSF per step of age.
        reuse_steps: R >= 0, the oldest age at which a PSF is reused.
        max_rate: p_max in (0, 1], the largest share of a window to be sampled.
        stats_mask: which tensors the norms of the statistics are taken over: a tree
            of booleans like the parameters (or a prefix), or a callable that makes
            one of them. None takes all.
        perturb_mask: which tensors are perturbed, in the same convention. Tensors
            at False (a frozen backbone) keep ε = 0.
        psf_dtype: dtype in which s is stored; ``jnp.bfloat16`` halves its memory and
            rounds s to 8 bits, in the direction of sampled steps too. None stores it
            in the parameters' dtypes.
        seed: an integer in [0, 2³²), chooses which steps of a window are sampled.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

        Parameters are real floating-point arrays of 16 bits or more. ε, norms,
        statistics and directions are computed in float32 or wider; w + ε is
        rounded to the parameters' dtypes, and for bfloat16 or float16 parameters
        much of ε is lost in that (:func:`vsam_jax.perturbation.perturb`). The
        direction has the dtypes of the gradient.

        A second gradient that is not finite, or one whose norm overflows the
        statistics dtype, makes the direction of that step NaN everywhere, so that
        a guard after vsam can act on it, and leaves no trace: the older PSF is
        kept and ages, the statistics stay, ``num_rejected`` counts it.

        Under ``jax.vmap`` a conditional becomes a select: both gradients are taken
        on every step.

    Raises:
        TypeError, ValueError: for arguments out of the ranges above; from
            ``update`` for missing ``params`` or ``grad_fn``, for a ``grad_fn`` that
            returns another tree, shape or dtype than the gradient's, for trees that do
            not match, and for a missing ``axis_name`` where replicas could part.

    .. warning::
      Clip *after* vsam. Clipped before, g is no longer the gradient that the
      second one is compared with, and s = g_SAM − clip(g) no PSF.

      Accumulate gradients *inside* one update: with
      ``grad = optax.microbatching.microbatch(jax.grad(loss), 1, microbatch_size,
      optax.microbatching.AccumulationType.MEAN)`` give ``grad(params, batch)`` to
      ``update`` and ``lambda p: grad(p, batch)`` as ``grad_fn``. It is a loop: for
      convolutions on the CPU wrap the inner gradient in
      :func:`vsam_jax.convolutions.canonical`, as the step builders do
      (``num_micro_batches`` of :func:`vsam_jax.linen.make_train_step`).
      ``optax.MultiSteps`` around vsam runs the inner update on every
      mini-step; it is right in a traced step if ``sample=False`` on all but the
      last one, whose ``grad_fn`` covers the whole batch, and an error if no mini-step
      says so. After vsam, as in
      ``chain(vsam, MultiSteps(sgd, k).gradient_transformation())``, it averages the
      directions of mini-batches that have a perturbation each.

    References:
        Deng et al., `Effective Gradient Sample Size via Variation Estimation for
        Accelerating Sharpness aware Minimization
        <https://arxiv.org/abs/2403.08821>`_, 2024

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(
        ...     vsam_jax.vsam(rho=0.05),
        ...     optax.add_decayed_weights(5e-4),
        ...     optax.sgd(0.1, momentum=0.9))
        >>> def loss(w, x):
        ...   return jnp.mean((x @ w - 1.0) ** 2)
        >>> @jax.jit
        ... def train_step(w, opt_state, x):
        ...   grads = jax.grad(loss)(w, x)
        ...   updates, opt_state = tx.update(
        ...       grads, opt_state, w, grad_fn=lambda w: jax.grad(loss)(w, x))
        ...   return optax.apply_updates(w, updates), opt_state
        >>> x = jax.random.normal(jax.random.key(0), (16, 4))
        >>> w = jnp.zeros(4)
        >>> opt_state = tx.init(w)
        >>> for _ in range(3):
        ...   w, opt_state = train_step(w, opt_state, x)
        >>> print(int(opt_state[0].num_samples))
        3
    """
    if warmup_steps is None:
        warmup_steps = 2 * _checks.integer('window', window, low=2) - 1
    rule = sampling.ByVariation(
        window=window,
        segments=segments,
        warmup_steps=warmup_steps,
        norm_gain=norm_gain,
        variance_gain=variance_gain,
        max_rate=max_rate,
        seed=seed,
    )
    return sharpness_aware(
        perturbation.l2_ascent,
        rule,
        reuse.DecayedDifference(decay, reuse_steps),
        rho,
        stats_mask=stats_mask,
        perturb_mask=perturb_mask,
        psf_dtype=psf_dtype,
    )


def steady_vsam(
    rho: Radius = 0.05,
    *,
    every: int = 3,
    tolerance: float = 0.3,
    stats_mask: Mask | None = None,
    perturb_mask: Mask | None = None,
    psf_dtype: DTypeLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""vSAM for runs of any length: every third step, from the first one on.

    The second gradient is taken on steps 0, k, 2k, …, where the direction is that of
    SAM, g + s; on the k − 1 steps after each it is reused at one weight,

    .. math::
      \text{direction} = g + w \, s, \quad
      w = \min\Big(1, \frac{\sqrt{k (1 + η + η ‖g‖^2 / ‖s‖^2)} - 1}{k - 1}\Big),

    with ‖g‖ and ‖s‖ of that sample. At w = 1 the PSF acts as strongly as in SAM, so
    that SAM's ρ carries over; :func:`vsam`, whose weights 1, β, β² have a mean of
    0.73 even when every third step is sampled, needs a larger one. But a PSF that is
    used k times also brings its mini-batch's noise k times, and where PSFs are as
    long as gradients training suffers from that. Hence w: the noise of the
    directions is at most 1 + η times that of SAM's
    (:func:`vsam_jax.reuse.steady_weight`).

    Unlike in :func:`vsam` there is no warm-up, no statistics are kept and nothing
    depends on how long the run is: the plan is the same in every window.

    Args:
        rho: ρ, as in :func:`vsam`. What suits SAM is the value to start with; where
            training goes on until ‖s‖ outgrows ‖g‖, a larger one is better.
        every: k >= 1, a second gradient every so many steps; 1 is SAM, and stores
            nothing.
        tolerance: η >= 0, by how much the noise of the directions may exceed that
            of SAM's, as a share. Larger values bring w closer to 1.
        stats_mask: which tensors ‖g‖ and ‖s‖ are taken over, as in :func:`vsam`.
        perturb_mask: which tensors are perturbed, as in :func:`vsam`.
        psf_dtype: dtype in which s is stored, as in :func:`vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`. Dtypes and samples that are not finite are
        treated as in :func:`vsam`; a PSF serves for 2k − 1 steps at most, if the
        sample that should have followed it is rejected.

    References:
        Sampling and reuse are those of Deng et al., `Effective Gradient Sample Size
        via Variation Estimation for Accelerating Sharpness aware Minimization
        <https://arxiv.org/abs/2403.08821>`_, 2024; the weight is this library's own.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(vsam_jax.steady_vsam(rho=0.1), optax.sgd(0.1))
        >>> w, loss = jnp.ones(2), lambda w: jnp.sum(w**4)
        >>> opt_state = tx.init(w)
        >>> for _ in range(6):
        ...   updates, opt_state = tx.update(
        ...       jax.grad(loss)(w), opt_state, w, grad_fn=jax.grad(loss))
        ...   w = optax.apply_updates(w, updates)
        >>> print(int(opt_state[0].num_samples))
        2
    """
    return _steady(
        rho,
        every,
        tolerance,
        stats_mask=stats_mask,
        perturb_mask=perturb_mask,
        psf_dtype=psf_dtype,
    )


def lean_sam(
    rho: Radius = 0.05,
    *,
    share: float = 1 / 8,
    every: int = 3,
    tolerance: float = 0.5,
    stats_mask: Mask | None = None,
    perturb_mask: Mask | None = None,
    psf_dtype: DTypeLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM from a share of the examples on some of the steps: few gradients more.

    :func:`steady_vsam`, whose second gradient is taken of a part of the mini-batch: two
    passes over ``share`` of the examples on every ``every``-th step, which by default
    are 8 % more examples than SGD goes through. The part must be told where the step is
    written::

      tx.update(grads, state, params, psf_grad_fn=gradient_of_the_part)
      vsam_jax.linen.make_train_step(loss_fn, psf_share=1 / 8)

    ρ is meant as SAM's. The gradient of a part is longer and points elsewhere, so that
    the radius in use is smaller, a start value:

    .. math:: ρ_\text{part} = ρ \sqrt{\text{share}}

    It is wrong where a part is too little to measure anything on: mini-batches of some
    ten examples, BatchNorm with a handful of them. Accelerators that a part cannot fill
    gain less.

    Args:
        rho: ρ, as in :func:`vsam`; what suits SAM is the value to start with.
        share: 1/k, the share of the mini-batch.
        every: a second gradient every so many steps.
        tolerance: η >= 0, as in :func:`steady_vsam`.
        stats_mask: which tensors ‖g‖ and ‖s‖ are taken over, as in :func:`vsam`.
        perturb_mask: which tensors are perturbed, as in :func:`vsam`.
        psf_dtype: dtype in which s is stored, as in :func:`vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

    Raises:
        ValueError: from ``update`` if the second gradient is taken of another share, as
            far as that can be seen: without ``psf_grad_fn``, or by a builder with
            another ``psf_share``.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(
        ...     vsam_jax.lean_sam(rho=0.05, share=1 / 4), optax.sgd(0.1))
        >>> grad = jax.grad(lambda w, x: jnp.mean((x @ w - 1.0) ** 2))
        >>> @jax.jit
        ... def train_step(w, opt_state, x):
        ...   updates, opt_state = tx.update(
        ...       grad(w, x), opt_state, w, psf_grad_fn=lambda w: grad(w, x[::4]))
        ...   return optax.apply_updates(w, updates), opt_state
        >>> x = jax.random.normal(jax.random.key(0), (16, 4))
        >>> w = jnp.zeros(4)
        >>> opt_state = tx.init(w)
        >>> for _ in range(4):
        ...   w, opt_state = train_step(w, opt_state, x)
        >>> print(int(opt_state[0].num_samples))
        2
    """
    share = 1 / _portions.parts_of(share, 'share')
    scale = share**0.5
    rho = _checks.radius('rho', rho)
    scaled = scale * rho if not callable(rho) else _scaled(rho, scale)
    return _steady(
        scaled,
        every,
        tolerance,
        stats_mask=stats_mask,
        perturb_mask=perturb_mask,
        psf_dtype=psf_dtype,
        share=share,
    )


def sam(
    rho: Radius = 0.05,
    *,
    perturb_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization: the second gradient on every step.

    .. math:: \text{direction} = ∇L(w + ε), \quad ε = ρ \, g / (‖g‖_2 + 10^{-12})

    Used like :func:`vsam`; there is never a conditional, and nothing is stored but
    counters and the latest norms.

    Args:
        rho: ρ, as in :func:`vsam`.
        perturb_mask: which tensors are perturbed, as in :func:`vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
        Generalization <https://arxiv.org/abs/2010.01412>`_, 2021

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(vsam_jax.sam(rho=0.1), optax.sgd(1.0))
        >>> w, loss = jnp.array(1.0), lambda w: w**2 / 2
        >>> updates, _ = tx.update(
        ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
        >>> print(f'{updates:.2f}')
        -1.10
    """
    return every_step(perturbation.l2_ascent, reuse.NoReuse(), rho, perturb_mask)


def asam(
    rho: Radius = 0.5,
    *,
    eta: float = 0.0,
    scale_mask: Mask | None = None,
    perturb_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: each weight is perturbed in proportion to its size.

    .. math::
      \text{direction} = ∇L(w + ε), \quad ε = ρ \, T^2 g / (‖T g‖_2 + 10^{-12}),
      \quad T = |w| + η

    The default (η = 0, every tensor scaled) is the form of most libraries; an
    element that is zero stays where it is. The authors' own form has η = 0.01
    and T = 1 for biases, so that tensors which are all zero move too::

      vsam_jax.asam(eta=0.01, scale_mask=vsam_jax.perturbation.all_but_biases)

    Args:
        rho: ρ, as in :func:`vsam`; about ten times that of SAM.
        eta: η >= 0.
        scale_mask: which tensors have T = \|w| + η; the others have T = 1. A mask
            in the convention of :func:`vsam`. None scales all.
        perturb_mask: which tensors are perturbed, as in :func:`vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

    References:
        Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for
        Scale-Invariant Learning of Deep Neural Networks
        <https://arxiv.org/abs/2102.11600>`_, 2021

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(vsam_jax.asam(rho=0.1), optax.sgd(1.0))
        >>> w, loss = jnp.array(2.0), lambda w: w**2 / 2
        >>> updates, _ = tx.update(
        ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
        >>> print(f'{updates:.2f}')
        -2.20
    """
    return every_step(
        perturbation.elementwise_ascent(eta, scale_mask),
        reuse.NoReuse(),
        rho,
        perturb_mask,
    )


def looksam(
    rho: Radius = 0.05,
    *,
    every: int = 5,
    gain: float = 0.7,
    perturb_mask: Mask | None = None,
    psf_dtype: DTypeLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: the second gradient every k steps, its orthogonal part between.

    On steps 0, k, 2k, … the direction is g_SAM = ∇L(w + ε), and g_v is its part
    orthogonal to g. On the others it is g + α (‖g‖ / ‖g_v‖) g_v.

    Args:
        rho: ρ, as in :func:`vsam`.
        every: k >= 1; 1 is SAM, and stores nothing.
        gain: α >= 0.
        perturb_mask: which tensors are perturbed, as in :func:`vsam`.
        psf_dtype: dtype in which g_v / ‖g_v‖ is stored, as in :func:`vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`, whose ``psf`` holds g_v / ‖g_v‖.

    References:
        Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
        <https://arxiv.org/abs/2203.02714>`_, 2022

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(vsam_jax.looksam(rho=0.1, every=2), optax.sgd(0.1))
        >>> w, loss = jnp.ones(2), lambda w: jnp.sum(w**4)
        >>> opt_state = tx.init(w)
        >>> for _ in range(6):
        ...   updates, opt_state = tx.update(
        ...       jax.grad(loss)(w), opt_state, w, grad_fn=jax.grad(loss))
        ...   w = optax.apply_updates(w, updates)
        >>> print(int(opt_state[0].num_samples))
        3
    """
    rule = sampling.Periodic(every)
    # Checked also where nothing is reused.
    rescaled = reuse.RescaledOrthogonal(gain)
    return sharpness_aware(
        perturbation.l2_ascent,
        rule,
        reuse.NoReuse() if rule.always else rescaled,
        rho,
        perturb_mask=perturb_mask,
        psf_dtype=psf_dtype,
    )


def every_step(
    perturb: perturbation.Perturbation,
    rule: reuse.ReuseRule,
    rho: Radius,
    perturb_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A method that takes a second gradient on every step."""
    return sharpness_aware(
        perturb, sampling.Periodic(1), rule, rho, perturb_mask=perturb_mask
    )


def _scaled(rho: optax.Schedule, scale: float) -> optax.Schedule:
    return lambda count: scale * _checks.scheduled_radius('rho', rho(count))


def _steady(
    rho: Radius, every: int, tolerance: float, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """Every k-th step sampled, one weight in between; at k = 1 nothing is stored."""
    rule = sampling.Periodic(every)
    # Checked also where nothing is reused.
    difference = reuse.SteadyDifference(max(rule.every, 2), tolerance)
    return sharpness_aware(
        perturbation.l2_ascent,
        rule,
        reuse.NoReuse() if rule.always else difference,
        rho,
        **settings,
    )
