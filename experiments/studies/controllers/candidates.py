r"""Ways to spend a third of SAM's second gradients that were tried, and lost.

What :mod:`vsam_jax` offers was chosen among these and its own
(:mod:`.measure` compares them). Each is a few lines on the library's
parts: a rule of when to sample, a rule of how to reuse, or, where a decision needs
the samples themselves, a transformation around one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import vsam_jax
from vsam_jax import VSAMState, perturbation, reuse, sampling
from vsam_jax.reuse import DecayedDifference

PyTree = Any


# --- When ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FromRate(sampling.ByVariation):
    """The published controller, whose budget starts at a rate of its own.

    Attributes:
        first_rate: the share of the first window that is sampled.
    """

    first_rate: float

    def init_budget(self, dtype: Any) -> jax.Array:
        return jnp.array(self.first_rate * self.window, dtype)


@dataclasses.dataclass(frozen=True)
class Scheduled(sampling.SamplingRule):
    """Evenly spaced samples at a rate that follows a schedule.

    Attributes:
        window: K, for how many steps the rate is fixed.
        rate: a function of the step, the share of steps that are sampled.
    """

    window: int
    rate: Callable[[jax.Array], Any]

    def plan(self, budget: jax.Array, window_index: jax.Array) -> jax.Array:
        return _evenly(self.rate(window_index * self.window), self.window)


@dataclasses.dataclass(frozen=True)
class ByBudget(sampling.SamplingRule):
    """Evenly spaced samples, as many as the budget says; others set the budget.

    Attributes:
        window: K, for how many steps the rate is fixed.
    """

    window: int

    def init_budget(self, dtype: Any) -> jax.Array:
        return jnp.array(self.window / 3, dtype)

    def plan(self, budget: jax.Array, window_index: jax.Array) -> jax.Array:
        return _evenly(budget / self.window, self.window)


def _evenly(rate: Any, window: int) -> jax.Array:
    """The plan of a window with a share of samples, the first step among them."""
    # The last of them makes up for what rounding loses of rate · window.
    steps = jnp.floor(jnp.arange(window + 1) * rate + (1 - 1e-4))
    return jnp.diff(steps) > 0


# --- How ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MeanOne(DecayedDifference):
    """The decayed PSF, scaled so that its weights have a mean of 1.

    Attributes:
        every: k, how many steps there are from sample to sample.
    """

    every: int

    @property
    def _scale(self) -> float:
        ages = range(min(self.every, self.reuse_steps + 1))
        return self.every / sum(self.decay**age for age in ages)

    def direction(
        self, grads: PyTree, memory: PyTree, weights: reuse.Weights
    ) -> PyTree:
        (weight,) = weights
        return super().direction(grads, memory, (weight * self._scale,))


@dataclasses.dataclass(frozen=True)
class MovingAverage(DecayedDifference):
    """The memory is a moving average of PSFs, also on sampled steps.

    Attributes:
        average: the share of the old average that stays.
    """

    average: float

    def remember(
        self, grads: PyTree, sam_grads: PyTree, memory: PyTree
    ) -> tuple[PyTree, reuse.Weights]:
        psf, weights = super().remember(grads, sam_grads, memory)
        # The first sample is its own average.
        first = optax.tree.norm(memory) == 0
        kept = jnp.where(first, 0.0, self.average)
        mixed = jax.tree.map(lambda s, m: (1 - kept) * s + kept * m, psf, memory)
        return optax.tree.cast_like(mixed, memory), weights


# --- Both, from what was measured ---------------------------------------------


class MeasuredState(NamedTuple):
    """State of :func:`measured`.

    Attributes:
        inner: the state of what it is around.
        error: how much a direction with a reused PSF was off when the next sample
            came, relative to the direction's length; a moving average.
        products: the moving averages of ⟨s_new, s_old⟩ and ‖s_old‖².
        scale: what the PSF in ``inner`` was multiplied by.
    """

    inner: VSAMState
    error: jax.Array
    products: jax.Array
    scale: jax.Array


def measured(
    rho: Any,
    *,
    window: int = 21,
    tolerance: float | None = None,
    low_rate: float = 0.1,
    high_rate: float = 0.4,
    fitted: bool = False,
    decay: float = 0.7,
    average: float = 0.8,
    perturb_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sampling and weights that follow how stale PSFs are when they are replaced.

    When a sample s comes, the PSF s' that served until then would have given g + c s'
    in its place. As in the step-size control of ODE solvers, the rate is scaled by

    .. math:: \mathrm{clip}(e / τ, 1/2, 2), \quad e = ‖s − c s'‖ / ‖g + s‖

    at each sample. With ``fitted`` the weight is the one that would have made
    ‖s − c s'‖ smallest on average, ⟨s, s'⟩ / ‖s'‖², instead of β^age.

    Args:
        rho: ρ.
        window: K, for how many steps the rate is fixed.
        tolerance: τ; None keeps the rate at a third.
        low_rate: the least rate.
        high_rate: the highest one.
        fitted: whether the weight is fitted.
        decay: β.
        average: the share of the old that stays in moving averages, per sample.
        perturb_mask: as in :func:`vsam_jax.vsam`.

    Returns:
        An optax transformation.
    """
    inner = vsam_jax.sharpness_aware(
        perturbation.l2_ascent,
        ByBudget(window),
        DecayedDifference(1.0 if fitted else decay, window),
        rho,
        perturb_mask=perturb_mask,
    )

    def init_fn(params: PyTree) -> MeasuredState:
        state: Any = inner.init(params)
        zero = jnp.zeros_like(state.budget)
        target = zero if tolerance is None else zero + tolerance
        return MeasuredState(state, target, jnp.stack([zero, zero]), zero + 1)

    def update_fn(
        updates: PyTree,
        state: MeasuredState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, MeasuredState]:
        new: Any
        old_state: Any = state.inner
        direction, new = inner.update(updates, old_state, params, **extra)
        old, fresh = state.inner.psf, new.psf
        # In the state the PSF has its weight already where that is fitted.
        weight = 1.0 if fitted else decay ** (state.inner.age + 1)
        off = jax.tree.map(lambda s, m: s - weight * m, fresh, old)
        length = jnp.maximum(optax.tree.norm(direction), 1e-12)
        # The first sample has none to be compared with.
        counts = new.sampled & (state.inner.num_samples > 0)
        mix = lambda was, now: jnp.where(
            counts, average * was + (1 - average) * now, was
        )
        error = mix(state.error, optax.tree.norm(off) / length)
        unscaled = optax.tree.scale(1 / state.scale, old)
        products = mix(
            state.products,
            jnp.stack(
                [
                    optax.tree.vdot(fresh, unscaled),
                    optax.tree.norm(unscaled, squared=True),
                ]
            ),
        )
        scale = state.scale
        if fitted:
            best = products[0] / jnp.maximum(products[1], 1e-30)
            # Never zero: the PSF is divided by it again.
            scale = jnp.where(new.sampled, jnp.clip(best, 1e-3, 1), scale)
            psf = jax.tree.map(
                lambda s: jnp.where(new.sampled, scale * s, s).astype(s.dtype), fresh
            )
            new = new._replace(psf=psf)
        if tolerance is not None:
            change = jnp.clip(error / tolerance, 0.5, 2)
            budget = jnp.clip(
                new.budget * jnp.where(counts, change ** (1 / 4), 1),
                low_rate * window,
                high_rate * window,
            ).astype(new.budget.dtype)
            new = new._replace(budget=budget)
        return direction, MeasuredState(new, error, products, scale)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


# --- Put together --------------------------------------------------------------


def periodic(
    rho: Any,
    *,
    every: int = 3,
    decay: float = 0.7,
    reuse_steps: int = 6,
    mean_one: bool = False,
    average: float = 0.0,
    at_random: bool = False,
    perturb_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """A sample every k steps, with the published decay or another way to reuse.

    Args:
        rho: ρ.
        every: k.
        decay: β.
        reuse_steps: R; 0 reuses nothing.
        mean_one: whether weights are scaled to a mean of 1.
        average: if above 0, PSFs are averaged with so much of the old average.
        at_random: whether every step is sampled with probability 1/k instead.
        perturb_mask: as in :func:`vsam_jax.vsam`.

    Returns:
        An optax transformation.
    """
    rule: Any = DecayedDifference(decay, reuse_steps)
    if mean_one:
        rule = MeanOne(decay, reuse_steps, every)
    elif average:
        rule = MovingAverage(decay, reuse_steps, average)
    when = (
        sampling.AtRandom(1 / every, 60, 0) if at_random else sampling.Periodic(every)
    )
    return vsam_jax.sharpness_aware(
        perturbation.l2_ascent, when, rule, rho, perturb_mask=perturb_mask
    )


def from_rate(
    rho: Any,
    *,
    window: int,
    warmup_steps: int,
    first_rate: float = 1 / 3,
    perturb_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The published controller with an initial budget of ``first_rate · window``."""
    rule = FromRate(
        window=window,
        segments=5,
        warmup_steps=warmup_steps,
        norm_gain=0.13,
        variance_gain=0.13,
        max_rate=0.8,
        seed=0,
        first_rate=first_rate,
    )
    return vsam_jax.sharpness_aware(
        perturbation.l2_ascent,
        rule,
        DecayedDifference(0.7, 6),
        rho,
        perturb_mask=perturb_mask,
    )


def scheduled(
    rho: Any,
    *,
    num_steps: int,
    first_rate: float = 0.0,
    last_rate: float = 1.0,
    start: float = 0.0,
    window: int = 20,
    perturb_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """A rate that rises, or jumps, over the run; PSFs are reused with the decay.

    Args:
        rho: ρ.
        num_steps: the length of the run.
        first_rate: the rate at first.
        last_rate: the rate in the end.
        start: from which share of the run on the rate is ``last_rate``; 0 lets it
            rise linearly from the first step to the last.
        window: K, for how many steps the rate is fixed.
        perturb_mask: as in :func:`vsam_jax.vsam`.

    Returns:
        An optax transformation.
    """
    if start:
        switch = int(start * num_steps)
        rate = lambda step: jnp.where(step >= switch, last_rate, first_rate)
    else:
        rate = optax.linear_schedule(first_rate, last_rate, num_steps)
    return vsam_jax.sharpness_aware(
        perturbation.l2_ascent,
        Scheduled(window, rate),
        DecayedDifference(0.7, 6),
        rho,
        perturb_mask=perturb_mask,
    )
