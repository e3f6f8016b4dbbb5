r"""The main named methods. Each chooses where, when and how.

=============== ======================= ============= =========================
method          where (perturbation)    when          how (reuse)
=============== ======================= ============= =========================
``vsam``        ball of radius ρ        by variation  decayed difference
``steady_vsam`` ball of radius ρ        every k steps difference, noise limited
``lean_sam``    ball, from a slice      every k steps difference, noise limited
``sam``         ball of radius ρ        every step    not at all
``asam``        scaled by |w|           every step    not at all
``looksam``     ball of radius ρ        every k steps rescaled orthogonal part
=============== ======================= ============= =========================

:mod:`vsam_jax._family` holds the others.
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
    r"""vSAM: takes a second gradient on some steps and reuses it on the others.

    This is variation-based SAM as published, for long runs: it adapts how often it
    takes the second gradient. For runs of any length take :func:`steady_vsam`.

    Put it first in ``optax.chain``, before the optimizer. On its own it returns a
    direction that goes uphill, as a gradient does: it turns g = ∇L(w) into a
    sharpness-aware gradient. On a *sampled* step it takes a second gradient,

    .. math::
      ε = ρ \, g / (‖g‖_2 + 10^{-12}), \quad s = ∇L(w + ε) - g, \quad
      \text{direction} = g + s,

    On the other steps it reuses s, which by then is a steps old. The paper calls s
    the PSF (projection of the second-order gradient onto the first-order one):

    .. math::
      \text{direction} = g + c(a) \, s, \quad c(a) = β^a \; (a ≤ R), \;
      0 \; (a > R).

    The first W steps are all sampled. After that, ⌊b⌋ steps of every window of K
    steps are sampled. The budget b starts at 1 and changes at the start of each
    window:

    .. math::
      b \leftarrow \mathrm{clip}\big(b \, (1 + α_1 \mathrm{rel}(Q)
      + α_2 \mathrm{rel}(V)), 1, ⌊K p_{max}⌋\big),

    Q holds the last K ratios ‖s‖/‖g‖. V holds the variance of the last K norms ‖s‖
    within S segments of similar norms. rel is the mean relative change
    (:func:`vsam_jax.statistics.relative_change`). The plan of a window, which says
    which of its steps are sampled, is made before the window starts
    (:func:`vsam_jax.sampling.window_plan`).

    ``update`` takes these two keyword arguments:

    - ``grad_fn(params) -> grads`` computes the gradient on the same mini-batch with
      the same dropout key. It is called at most once.
    - ``sample`` decides this step. None follows the plan in the state, either inside
      one program (*traced*, with ``jax.lax.cond``) or through
      :class:`vsam_jax.PlannedStep` (*planned*). A Python bool compiles a step without
      a conditional. A boolean array overrides the plan in a traced step. Outside
      ``jax.jit`` the plan is read directly and nothing is compiled.

    If you pass ``value``, the loss L(w) of the first pass, ``grad_fn`` may return
    ``(value, grads)`` as ``jax.value_and_grad`` does. The state then keeps the rise in
    the loss, L(w + ε) − L(w), as its ``sharpness``.

    *From a slice of the mini-batch.* s is a small correction, so a slice of the
    mini-batch can estimate it at a fraction of the cost. Pass
    ``psf_grad_fn(params) -> grads``, the gradient on that slice: the same examples and
    the same dropout key at each call. A sampled step then takes g′ = ∇L′(w) and
    g′_SAM = ∇L′(w + ε), with ε computed from g′, and s = g′_SAM − g′. The direction is
    g + s, where g is still the gradient of the whole mini-batch. The step counts as a
    sample only if ‖g‖, ‖g′‖ and ‖s‖ are finite, and Q is ‖s‖/‖g′‖. ``grad_fn`` is not
    needed. The builders do all this if you set ``psf_share``.

    Gradients of fewer examples are longer, so ρ should be smaller: start with SAM's ρ
    times the square root of the share. (:func:`lean_sam` does that for you: give it
    SAM's ρ.) Do not use a slice that is not a random sample of the mini-batch, or one
    of only a few examples, above all with BatchNorm, which would take its statistics
    from them. A slice too small to fill the accelerator saves nothing.

    *Several devices.* Under ``jax.jit`` one program sees all devices, and you need no
    further arguments. In a function that runs once per device (``jax.shard_map``,
    ``jax.pmap``), two more arguments of ``update`` say how to combine gradients.

    - ``axis_name`` is the name of the mapped axis, or a tuple of names. ``updates`` and
      the result of ``grad_fn`` are then each device's own gradients, and are averaged.
      ``axis_name=()`` says that they are already means.
    - ``per_device=False`` (the default) makes one perturbation, from the mean
      gradient. The result is that of ``jax.jit`` on any number of devices.
    - ``per_device=True`` perturbs along each device's own gradient and averages the
      second gradients. This is m-sharpness, where m is a device's share of the
      mini-batch. It is a different objective, which changes with the number of
      devices; the authors of SAM found that smaller m generalizes better. The second
      pass need not wait for the first mean, so the two can overlap.

    In both cases s, its norms and the plan come from mean gradients and are the same
    on all devices.

    Args:
        rho: ρ, the radius of the perturbation: a number >= 0 (0 gives the base
            optimizer), a scalar array, or an optax schedule of the update count.
        window: K >= 2, the number of steps in a plan, and of samples in the
            statistics.
        segments: S, divides K into groups of at least two.
        warmup_steps: W, the number of initial steps that are all sampled. None gives
            2K − 1, the fewest that complete all statistics before the first window
            starts. With fewer, or with rejected samples among them, the variance of
            ‖s‖ grows for some windows just because its buffer is filling up, and the
            budget grows with it.
        norm_gain: α₁ >= 0, the gain on the change of ‖s‖/‖g‖.
        variance_gain: α₂ >= 0, the gain on the change of the variance of ‖s‖.
        decay: β in [0, 1], the decay of a reused PSF per step of age.
        reuse_steps: R >= 0, the oldest age at which a PSF is reused.
        max_rate: p_max in (0, 1], the largest share of a window's steps that may be
            sampled.
        stats_mask: the tensors over which the statistics take their norms: a tree
            of booleans like the parameters (or a prefix of one), or a callable that
            makes such a tree from them. None takes all.
        perturb_mask: the tensors to perturb, in the same form. Tensors at False (a
            frozen backbone) keep ε = 0.
        psf_dtype: the dtype in which s is stored. ``jnp.bfloat16`` halves its memory
            and rounds s to 8 bits, also in the direction of sampled steps. None stores
            it in the parameters' dtypes.
        seed: an integer in [0, 2³²). It chooses which steps of a window are sampled.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

        Parameters must be real floating-point arrays of 16 bits or more. ε, norms,
        statistics and directions are computed in float32 or wider. w + ε is then
        rounded to the parameters' dtypes. For bfloat16 or float16 parameters, that
        rounding loses much of ε (:func:`vsam_jax.perturbation.perturb`). The direction
        has the dtypes of the gradient.

        If the second gradient is not finite, or its norm overflows the statistics
        dtype, the direction of that step is NaN everywhere, so that a guard after vsam
        can skip it. The sample is rejected: the older PSF is kept and ages, the
        statistics stay as they were, and ``num_rejected`` counts it.

        Under ``jax.vmap`` a conditional becomes a select, so both gradients are
        computed on every step.

    Raises:
        TypeError, ValueError: for arguments outside the ranges above. From ``update``:
            for missing ``params`` or ``grad_fn``, for a ``grad_fn`` whose result
            differs from the gradient in tree, shape or dtype, for trees that do
            not match, and for a missing ``axis_name`` where replicas could diverge.

    .. warning::
      Clip *after* vsam. If you clip before it, s = g_SAM − clip(g) compares a clipped
      gradient with one that is not, and is not a PSF.

      Accumulate gradients *inside* one update: with
      ``grad = optax.microbatching.microbatch(jax.grad(loss), 1, microbatch_size,
      optax.microbatching.AccumulationType.MEAN)`` pass ``grad(params, batch)`` to
      ``update`` and ``lambda p: grad(p, batch)`` as ``grad_fn``. This is a loop: for
      convolutions on the CPU wrap the inner gradient in
      :func:`vsam_jax.convolutions.canonical`, as the step builders do
      (``num_micro_batches`` of :func:`vsam_jax.linen.make_train_step`).

      ``optax.MultiSteps`` *around* vsam runs the inner update on every mini-step. It is
      correct in a traced step if you pass ``sample=False`` on all mini-steps but the
      last, whose ``grad_fn`` must cover the whole batch. It is an error if no mini-step
      passes ``sample``. ``optax.MultiSteps`` *after* vsam, as in
      ``chain(vsam, MultiSteps(sgd, k).gradient_transformation())``, averages the
      directions of mini-batches, each with its own perturbation.

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
    r"""vSAM on a fixed schedule: takes a second gradient on every third step.

    Take it for runs of any length, with the ρ that suits SAM. Put it first in
    ``optax.chain``, before the optimizer. On its own it returns a direction that goes
    uphill, as a gradient does.

    On steps 0, k, 2k, … it takes the second gradient, and the direction is SAM's,
    g + s. On the k − 1 steps in between it reuses the last correction s, scaled down
    when s is noisy:

    .. math::
      \text{direction} = g + w \, s, \quad
      w = \min\Big(1, \frac{\sqrt{k (1 + η + η ‖g‖^2 / ‖s‖^2)} - 1}{k - 1}\Big),

    Here ‖g‖ and ‖s‖ are those of the last sample. At w = 1 the correction acts as
    strongly as in SAM, so SAM's ρ carries over. (:func:`vsam` needs a larger ρ: its
    weights 1, β, β² have a mean of 0.73 even when every third step is sampled.) But
    reusing s on k steps also repeats the noise of its mini-batch k times. Where s is as
    long as g, that hurts training. w therefore limits the noise of the directions to
    1 + η times that of SAM's (:func:`vsam_jax.reuse.steady_weight`).

    Unlike :func:`vsam` it has no warm-up, keeps no statistics and does not depend on
    the length of the run: the plan is the same in every window.

    Args:
        rho: ρ, as in :func:`vsam`. Start with the value that suits SAM. A larger one is
            better if training goes on until ‖s‖ exceeds ‖g‖.
        every: k >= 1, the number of steps from one second gradient to the next. 1 is
            SAM, and stores nothing.
        tolerance: η >= 0, the fraction by which the noise of the directions may exceed
            that of SAM's. Larger values bring w closer to 1.
        stats_mask: the tensors over which ‖g‖ and ‖s‖ are taken, as in :func:`vsam`.
        perturb_mask: the tensors to perturb, as in :func:`vsam`.
        psf_dtype: the dtype in which s is stored, as in :func:`vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`. It treats dtypes, and samples that are not finite,
        as :func:`vsam` does. If the next sample is rejected, a PSF is kept in use, but
        for 2k − 1 steps at most.

    References:
        Sampling and reuse follow Deng et al., `Effective Gradient Sample Size
        via Variation Estimation for Accelerating Sharpness aware Minimization
        <https://arxiv.org/abs/2403.08821>`_, 2024. The weight is this library's own.

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
    share: float = 1 / 4,
    every: int = 3,
    tolerance: float = 0.5,
    stats_mask: Mask | None = None,
    perturb_mask: Mask | None = None,
    psf_dtype: DTypeLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the second gradient on every third step, from a slice of the mini-batch.

    On small tasks it is the cheapest method here that had SAM's accuracy. On all of
    CIFAR-100 it was behind SGD. Take it for mini-batches of 64 examples or more.
    Put it first in ``optax.chain``, before the optimizer. On its own it returns a
    direction that goes uphill, as a gradient does.

    It works like :func:`steady_vsam`, but measures the correction on a slice of the
    mini-batch. Every ``every``-th step makes two passes over ``share`` of the examples.
    By default that is 17 % more examples than SGD processes. A smaller share is
    cheaper, and noisier. You choose the slice where
    you write the step::

      tx.update(grads, state, params, psf_grad_fn=gradient_of_the_part)
      vsam_jax.linen.make_train_step(loss_fn, psf_share=1 / 4)

    Give it SAM's ρ. The gradient of a slice is longer and points in another direction,
    so the radius in use is smaller. This scaling is a starting point:

    .. math:: ρ_\text{part} = ρ \sqrt{\text{share}}

    Do not take it where a slice is too small to measure anything: with mini-batches of
    about ten examples, or BatchNorm over only a few of them. On an accelerator that a
    slice cannot fill it costs more than :func:`steady_vsam`.

    Args:
        rho: ρ, as in :func:`vsam`. Start with the value that suits SAM.
        share: 1/k, the share of the mini-batch.
        every: the number of steps from one second gradient to the next.
        tolerance: η >= 0, as in :func:`steady_vsam`.
        stats_mask: the tensors over which ‖g‖ and ‖s‖ are taken, as in :func:`vsam`.
        perturb_mask: the tensors to perturb, as in :func:`vsam`.
        psf_dtype: the dtype in which s is stored, as in :func:`vsam`.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

    Raises:
        ValueError: from ``update`` if the second gradient is visibly taken on another
            share: without ``psf_grad_fn``, or by a builder with another ``psf_share``.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(
        ...     vsam_jax.lean_sam(rho=0.05), optax.sgd(0.1))
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
    r"""Sharpness-aware minimization (SAM): a second gradient on every step.

    .. math:: \text{direction} = ∇L(w + ε), \quad ε = ρ \, g / (‖g‖_2 + 10^{-12})

    Take it as the baseline to compare with; a step costs about two of the base
    optimizer's. Put it first in ``optax.chain``, before the optimizer. On its own it
    returns a direction that goes uphill, as a gradient does.

    ``update`` takes the arguments of :func:`vsam`. The step has no conditional, and the
    state stores only counters and the latest norms.

    Args:
        rho: ρ, as in :func:`vsam`.
        perturb_mask: the tensors to perturb, as in :func:`vsam`.

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
    r"""Adaptive SAM (ASAM): SAM that perturbs each weight in proportion to its size.

    Take it where layers differ widely in scale. A rescaling of the weights that leaves
    the network the same does not change what it measures.

    .. math::
      \text{direction} = ∇L(w + ε), \quad ε = ρ \, T^2 g / (‖T g‖_2 + 10^{-12}),
      \quad T = |w| + η

    The default (η = 0, every tensor scaled) is the form in most libraries. An element
    that is zero is then not perturbed. The authors use η = 0.01, and T = 1 for biases,
    so that tensors of zeros are perturbed too::

      vsam_jax.asam(eta=0.01, scale_mask=vsam_jax.perturbation.all_but_biases)

    Args:
        rho: ρ, as in :func:`vsam`. Start with about ten times SAM's.
        eta: η >= 0.
        scale_mask: the tensors with T = \|w| + η. The others have T = 1. The form
            of the mask is as in :func:`vsam`. None scales all.
        perturb_mask: the tensors to perturb, as in :func:`vsam`.

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
    r"""LookSAM: SAM every k steps; in between it reuses the part orthogonal to g.

    Take it to compare with :func:`steady_vsam`, which reuses the whole correction.

    On steps 0, k, 2k, … the direction is g_SAM = ∇L(w + ε). Let g_v be the part of
    g_SAM that is orthogonal to g. On the other steps the direction is
    g + α (‖g‖ / ‖g_v‖) g_v, with the latest g_v.

    Args:
        rho: ρ, as in :func:`vsam`.
        every: k >= 1, the number of steps from one second gradient to the next. 1 is
            SAM, and stores nothing.
        gain: α >= 0.
        perturb_mask: the tensors to perturb, as in :func:`vsam`.
        psf_dtype: the dtype in which g_v / ‖g_v‖ is stored, as in :func:`vsam`.

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
    # Checks the gain even where nothing is reused.
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
    """Builds a method that takes a second gradient on every step."""
    return sharpness_aware(
        perturb, sampling.Periodic(1), rule, rho, perturb_mask=perturb_mask
    )


def _scaled(rho: optax.Schedule, scale: float) -> optax.Schedule:
    return lambda count: scale * _checks.scheduled_radius('rho', rho(count))


def _steady(
    rho: Radius, every: int, tolerance: float, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """Samples every k-th step and reuses in between; k = 1 stores nothing."""
    rule = sampling.Periodic(every)
    # Checks the tolerance even where nothing is reused.
    difference = reuse.SteadyDifference(max(rule.every, 2), tolerance)
    return sharpness_aware(
        perturbation.l2_ascent,
        rule,
        reuse.NoReuse() if rule.always else difference,
        rho,
        **settings,
    )
