r"""When the second gradient is taken: rules that plan a window of steps ahead.

Training is divided into windows of K steps. Before a window starts, a rule decides
which of its steps are sampled. It uses its budget, and random numbers that are a pure
function of (seed, index of the window). Nothing that happens inside a window changes
its plan. So a host can read the plan once, and then choose between compiled programs
(:class:`vsam_jax.PlannedStep`).

A rule is a frozen dataclass of static numbers with the methods of
:class:`SamplingRule`. Whatever changes during training (:class:`.Rings`, the budget)
is passed in and returned.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsam_jax import _checks, _numerics, statistics
from vsam_jax._types import DTypeLike, PyTree
from vsam_jax.statistics import Rings

__all__ = [
    'AtRandom',
    'ByGradientNorm',
    'ByVariation',
    'GradientNorms',
    'Periodic',
    'SamplingRule',
    'next_budget',
    'window_plan',
    'window_uniforms',
]


class SamplingRule:
    """The interface of sampling rules; all methods are pure and traceable.

    To write your own rule, subclass this, preferably as a frozen dataclass, and define
    ``window`` and :meth:`plan`. The other methods have defaults for a rule whose budget
    never changes. A rule that decides from the current gradient defines
    :meth:`init_memory` and :meth:`decide` instead of a plan.

    Attributes:
        window: K, the number of steps in a plan.
        warmup_steps: W, the number of initial steps, all sampled, before the first
            window.
        always: whether every step is sampled, so that no conditional is needed.

    Example:
        Two samples in a row, then eight steps without:

        >>> import dataclasses, jax.numpy as jnp, vsam_jax
        >>> from vsam_jax import perturbation, reuse, sampling
        >>> @dataclasses.dataclass(frozen=True)
        ... class InPairs(sampling.SamplingRule):
        ...   window: int = 10
        ...   def plan(self, budget, window_index):
        ...     return jnp.arange(self.window) < 2
        >>> tx = vsam_jax.sharpness_aware(
        ...     perturbation.l2_ascent, InPairs(), reuse.NoReuse(), rho=0.05)
        >>> print(tx.init(jnp.ones(2)).plan.sum())
        2
    """

    window: int
    warmup_steps: int = 0
    always: bool = False

    def init_rings(self, dtype: DTypeLike) -> Rings | None:
        """Empty statistics, or None if the rule keeps none."""
        del dtype

    def init_budget(self, dtype: DTypeLike) -> jax.Array:
        """The budget b before the first window, a scalar."""
        return jnp.zeros((), dtype)

    def observe(
        self, rings: Rings | None, grad_norm: jax.Array, psf_norm: jax.Array
    ) -> Rings | None:
        """The statistics after another sample, with these finite norms."""
        del grad_norm, psf_norm
        return rings

    def next_budget(self, budget: jax.Array, rings: Rings | None) -> jax.Array:
        """The budget of the window that starts now."""
        del rings
        return budget

    def plan(self, budget: jax.Array, window_index: jax.Array) -> jax.Array:
        """The plan: which steps of a window are sampled, a bool array [K]."""
        del budget, window_index
        if self.init_memory(jnp.float32) is None:
            raise NotImplementedError(f'{type(self).__name__} must have a method plan.')
        return jnp.zeros((self.window,), jnp.bool_)  # Never used.

    def init_memory(self, dtype: DTypeLike) -> PyTree:
        """The initial memory of :meth:`decide`; None if the plan decides."""
        del dtype

    def decide(self, memory: PyTree, grad_norm: jax.Array) -> tuple[jax.Array, PyTree]:
        """Returns whether this step is sampled, a bool scalar, and the next memory.

        If there is a memory, this is called on every step with the ‖g‖ of that step,
        over the tensors of ``stats_mask``. If that ‖g‖ is not finite, the step is not
        sampled and the memory does not change.
        """
        raise NotImplementedError(f'{type(self).__name__} must have a method decide.')


# --- Pure functions -----------------------------------------------------------


def next_budget(
    budget: jax.Array,
    rings: Rings,
    *,
    norm_gain: float,
    variance_gain: float,
    max_budget: int,
) -> jax.Array:
    r"""vSAM's controller: raises the budget while the PSF varies more.

    .. math::
      b \leftarrow \mathrm{clip}\big(b \, (1 + α_1 \mathrm{rel}(Q)
      + α_2 \mathrm{rel}(V)), \; 1, \; ⌊K p_{max}⌋\big)

    Args:
        budget: b, a scalar.
        rings: Q (``ratios``) and V (``variances``) of the last samples.
        norm_gain: α₁.
        variance_gain: α₂.
        max_budget: ⌊K·p_max⌋.

    Returns:
        The new b, finite and in [1, ``max_budget``] for any finite rings.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsam_jax import sampling, statistics
        >>> rings = statistics.init_rings(4, jnp.float32)._replace(
        ...     ratios=jnp.array([1., 2., 4., 8.]), filled=jnp.array(4))
        >>> print(sampling.next_budget(jnp.array(2.0), rings, norm_gain=0.5,
        ...                            variance_gain=0.5, max_budget=4))
        3.0
    """
    growth = (
        1
        + norm_gain * statistics.relative_change(rings.ratios, rings.filled)
        + variance_gain * statistics.relative_change(rings.variances, rings.filled)
    )
    return jnp.clip(budget * growth, 1, max_budget).astype(budget.dtype)


def window_plan(budget: jax.Array, uniforms: jax.Array) -> jax.Array:
    r"""vSAM's plan: exactly ⌊b⌋ of the K steps, chosen by the uniforms.

    Go through the steps in order, and let c be the number of samples so far in the
    window. Step i is sampled if (c < ⌊b⌋ and uᵢ ≥ 1 − b/K) or K − i ≤ ⌊b⌋ − c. The
    first case is the random choice. The second case takes the samples that the random
    choice has left over, once only that many steps remain.

    This function needs no loop. Let Hᵢ be the number of j < i with uⱼ ≥ 1 − b/K. Until
    the second case first holds, c = min(⌊b⌋, Hᵢ). From then on every step is sampled,
    and K − i ≤ ⌊b⌋ − Hᵢ continues to hold, since Hᵢ grows by at most one per step. So
    Hᵢ can replace c in both cases.

    Args:
        budget: b, a scalar in [1, K].
        uniforms: u, an array [K] of numbers in [0, 1). A number that the
            step-by-step rule would not use may be NaN.

    Returns:
        A bool array [K] in which exactly ⌊b⌋ entries are True.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsam_jax import sampling
        >>> u = jnp.array([0.1, 0.9, 0.2, 0.3])
        >>> print(sampling.window_plan(jnp.array(2.5), u))
        [False  True False  True]
    """
    window = uniforms.shape[0]
    quota = jnp.floor(budget).astype(jnp.int32)
    threshold = 1 - budget / window
    dtype = _numerics.wide_dtype(uniforms.dtype, threshold.dtype)
    hit = uniforms.astype(dtype) >= threshold.astype(dtype)
    hits_before = jnp.cumsum(hit, dtype=jnp.int32) - hit.astype(jnp.int32)
    remaining = window - jnp.arange(window, dtype=jnp.int32)
    return (hit & (hits_before < quota)) | (remaining <= quota - hits_before)


def window_uniforms(seed: int, window_index: jax.Array, window: int) -> jax.Array:
    """The random numbers of one window: a pure function of its arguments.

    No state stores a key. So wrappers that do arithmetic on states do not affect the
    random numbers, and a resumed run draws the same ones.

    Args:
        seed: chooses the stream.
        window_index: int32 scalar, the number of the window.
        window: K, the number of steps in a plan.

    Returns:
        A float32 array [K] in [0, 1), the same in 32- and 64-bit mode. (The numbers
        differ if you turn off ``jax_threefry_partitionable``, which is on by default.)
    """
    # (seed, window) is the whole 64-bit key, so one pass of the generator suffices.
    # The generator is named, so that jax_default_prng_impl changes no plan.
    words = jnp.stack([jnp.uint32(seed), window_index.astype(jnp.uint32)])
    key = jax.random.wrap_key_data(words, impl='threefry2x32')
    return jax.random.uniform(key, (window,), jnp.float32)


# --- Rules --------------------------------------------------------------------


_MAX_SEED = 2**32 - 1
_MAX_WINDOW = 2**20  # The plan of a window is an array of this length.


@dataclasses.dataclass(frozen=True)
class ByVariation(SamplingRule):
    """vSAM's rule: ⌊b⌋ samples per window, where b follows the variation of the PSF.

    Attributes:
        window: K, the number of steps in a plan.
        segments: S, divides K into groups of at least two.
        warmup_steps: W, the number of initial steps that are all sampled.
        norm_gain: α₁.
        variance_gain: α₂.
        max_rate: p_max.
        seed: chooses the random numbers of the plans.
    """

    window: int
    segments: int
    warmup_steps: int = dataclasses.field()  # No default here.
    norm_gain: float
    variance_gain: float
    max_rate: float
    seed: int

    def __post_init__(self):
        window = _checks.integer('window', self.window, low=2, high=_MAX_WINDOW)
        segments = _checks.integer('segments', self.segments, low=1)
        if window % segments or window // segments < 2:
            raise ValueError(
                'segments must divide window into groups of at least two (a variance'
                f' needs two values), got segments={segments} for window={window}.'
            )
        _checks.assign(
            self,
            window=window,
            segments=segments,
            warmup_steps=_checks.integer(
                'warmup_steps', self.warmup_steps, low=0, high=2**31 - 2
            ),
            norm_gain=_checks.real('norm_gain', self.norm_gain),
            variance_gain=_checks.real('variance_gain', self.variance_gain),
            max_rate=_checks.real('max_rate', self.max_rate, high=1.0, open_low=True),
            seed=_checks.integer('seed', self.seed, low=0, high=_MAX_SEED),
        )
        if self.max_budget < 1:
            raise ValueError(
                'max_rate must allow at least one sample a window (max_rate * window'
                f' >= 1), got max_rate={self.max_rate} for window={window}.'
            )

    @property
    def max_budget(self) -> int:
        """⌊K·p_max⌋."""
        # 100 · 0.29 is 28.999999999999996 in binary, but should be 29.
        return int(self.window * self.max_rate + 1e-9)

    def init_rings(self, dtype: DTypeLike) -> Rings:
        return statistics.init_rings(self.window, dtype)

    def init_budget(self, dtype: DTypeLike) -> jax.Array:
        return jnp.ones((), dtype)

    def observe(
        self, rings: Rings | None, grad_norm: jax.Array, psf_norm: jax.Array
    ) -> Rings:
        assert rings is not None
        return statistics.push_sample(
            rings, grad_norm, psf_norm, segments=self.segments
        )

    def next_budget(self, budget: jax.Array, rings: Rings | None) -> jax.Array:
        assert rings is not None
        return next_budget(
            budget,
            rings,
            norm_gain=self.norm_gain,
            variance_gain=self.variance_gain,
            max_budget=self.max_budget,
        )

    def plan(self, budget: jax.Array, window_index: jax.Array) -> jax.Array:
        return window_plan(
            budget, window_uniforms(self.seed, window_index, self.window)
        )


@dataclasses.dataclass(frozen=True)
class Periodic(SamplingRule):
    """Samples steps 0, k, 2k, …; k = 1 samples every step.

    Attributes:
        every: k, the number of steps from one sample to the next.
    """

    every: int
    window: int = dataclasses.field(init=False, repr=False)
    always: bool = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        every = _checks.integer('every', self.every, low=1, high=_MAX_WINDOW)
        # A multiple of k, and large enough that a host seldom reads the plan.
        window = every * -(-64 // every)
        _checks.assign(self, every=every, window=window, always=every == 1)

    def init_budget(self, dtype: DTypeLike) -> jax.Array:
        return jnp.array(self.window // self.every, dtype)

    def plan(self, budget: jax.Array, window_index: jax.Array) -> jax.Array:
        del budget, window_index
        return jnp.arange(self.window) % self.every == 0


@dataclasses.dataclass(frozen=True)
class AtRandom(SamplingRule):
    """Samples every step independently, with the same probability.

    Attributes:
        rate: the probability.
        window: K, the number of steps in a plan, drawn at once.
        seed: chooses the random numbers.
    """

    rate: float
    window: int
    seed: int
    always: bool = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        rate = _checks.real('rate', self.rate, high=1.0, open_low=True)
        _checks.assign(
            self,
            rate=rate,
            window=_checks.integer('window', self.window, low=1, high=_MAX_WINDOW),
            seed=_checks.integer('seed', self.seed, low=0, high=_MAX_SEED),
            always=rate == 1,
        )

    def init_budget(self, dtype: DTypeLike) -> jax.Array:
        return jnp.array(self.rate * self.window, dtype)

    def plan(self, budget: jax.Array, window_index: jax.Array) -> jax.Array:
        del budget
        return window_uniforms(self.seed, window_index, self.window) < self.rate


class GradientNorms(NamedTuple):
    """The memory of :class:`ByGradientNorm`.

    Attributes:
        step: t, an int32 scalar.
        mean: μ, the average of ‖g‖², a scalar.
        variance: σ², the average of (‖g‖² − μ)², a scalar.
    """

    step: jax.Array
    mean: jax.Array
    variance: jax.Array


@dataclasses.dataclass(frozen=True)
class ByGradientNorm(SamplingRule):
    r"""AE-SAM's rule: samples a step if ‖g‖² is unusually large at that time.

    .. math::
      μ_t = δ μ_{t-1} + (1 - δ) ‖g_t‖^2, \quad
      σ_t^2 = δ σ_{t-1}^2 + (1 - δ) (‖g_t‖^2 - μ_t)^2

    Step t is sampled if ‖g_t‖² ≥ μ_t + c_t σ_t, with
    c_t = (t/T) λ₁ + (1 − t/T) λ₂. A ‖g‖ whose fourth power overflows counts as not
    finite.

    Attributes:
        steps: T >= 1. After T steps c = λ₁.
        delta: δ in [0, 1).
        lambda1: λ₁.
        lambda2: λ₂.
        initial_mean: μ before the first step.
        initial_variance: σ² before the first step. If it is zero, the decisions do not
            depend on the gradient's scale.

    References:
        Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
        <https://arxiv.org/abs/2304.14647>`_, 2023

    Example:
        >>> import jax.numpy as jnp
        >>> from vsam_jax import sampling
        >>> rule = sampling.ByGradientNorm(steps=100)
        >>> memory = rule.init_memory(jnp.float32)
        >>> for norm in (1.0, 1.0, 1.0, 3.0, 1.0):
        ...   sampled, memory = rule.decide(memory, jnp.array(norm))
        ...   print(sampled)
        True
        True
        True
        True
        False
    """

    steps: int
    delta: float = 0.9
    lambda1: float = -1.0
    lambda2: float = 1.0
    initial_mean: float = 0.0
    initial_variance: float = 0.0
    window: int = dataclasses.field(default=1, init=False, repr=False)

    def __post_init__(self):
        real = lambda name, **limits: _checks.real(name, getattr(self, name), **limits)
        _checks.assign(
            self,
            steps=_checks.integer('steps', self.steps, low=1, high=2**31 - 2),
            delta=real('delta', high=1.0, open_high=True),
            lambda1=real('lambda1', low=-math.inf),
            lambda2=real('lambda2', low=-math.inf),
            initial_mean=real('initial_mean'),
            initial_variance=real('initial_variance'),
        )

    def init_memory(self, dtype: DTypeLike) -> GradientNorms:
        return GradientNorms(
            step=jnp.zeros((), jnp.int32),
            mean=jnp.array(self.initial_mean, dtype),
            variance=jnp.array(self.initial_variance, dtype),
        )

    def decide(
        self, memory: GradientNorms, grad_norm: jax.Array
    ) -> tuple[jax.Array, GradientNorms]:
        squared = grad_norm**2
        average = lambda old, new: self.delta * old + (1 - self.delta) * new
        mean = average(memory.mean, squared)
        variance = average(memory.variance, (squared - mean) ** 2)
        usable = jnp.isfinite(variance)
        passed = jnp.minimum(memory.step.astype(mean.dtype) / self.steps, 1)
        factor = passed * self.lambda1 + (1 - passed) * self.lambda2
        wanted = usable & (squared >= mean + factor * jnp.sqrt(variance))
        return wanted, GradientNorms(
            step=jnp.asarray(optax.safe_increment(memory.step)),
            mean=jnp.where(usable, mean, memory.mean),
            variance=jnp.where(usable, variance, memory.variance),
        )
