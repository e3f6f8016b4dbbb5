r"""How an old second gradient is reused: memory, weights, direction.

On a sampled step a rule makes a *memory* from the two gradients. On the other steps it
recalls the memory that it has. In both cases it computes the direction from the new
gradient, the memory and a few scalar *weights*. Only memory and weights pass through
the branches of a conditional. The direction is computed outside.
"""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsam_jax import _checks, _numerics
from vsam_jax._types import DTypeLike, PyTree

__all__ = [
    'Amplified',
    'Combination',
    'DecayedDifference',
    'Difference',
    'NoReuse',
    'Renormalized',
    'RescaledOrthogonal',
    'ReuseRule',
    'SampleNorms',
    'SteadyDifference',
    'SurrogateGap',
    'reuse_weight',
    'steady_weight',
]

Weights = tuple[jax.Array, ...]


class SampleNorms(NamedTuple):
    """The norms of the latest usable sample, over the tensors of ``stats_mask``.

    Attributes:
        grad_norm: ‖g‖, a scalar in the statistics dtype; zero before any sample.
        psf_norm: ‖s‖, in the same form.
    """

    grad_norm: jax.Array
    psf_norm: jax.Array


class ReuseRule(abc.ABC):
    """The interface of reuse rules; all methods are pure and traceable.

    To write your own rule, it is easiest to subclass :class:`Difference` or
    :class:`Combination`. For the first you define the weight at which an old PSF is
    reused. For the second you define how to combine the two gradients; it stores
    nothing.

    Attributes:
        initial_age: the age of the empty memory at the start of a run.
        takes_slices: whether g_SAM may come from other examples than g.
    """

    initial_age: int = 0
    takes_slices: ClassVar[bool] = True

    @abc.abstractmethod
    def init(self, params: PyTree, dtype: DTypeLike) -> PyTree:
        """An empty memory, or None if the rule keeps none."""

    @abc.abstractmethod
    def remember(
        self, grads: PyTree, sam_grads: PyTree, memory: PyTree
    ) -> tuple[PyTree, Weights]:
        """The memory and weights of a sampled step; ``memory`` is the old one."""

    @abc.abstractmethod
    def recall(
        self, grads: PyTree, memory: PyTree, age: jax.Array, norms: SampleNorms
    ) -> tuple[PyTree, Weights]:
        """The memory and weights of a step that is not sampled."""

    @abc.abstractmethod
    def direction(self, grads: PyTree, memory: PyTree, weights: Weights) -> PyTree:
        """The direction for the base optimizer, in the dtypes of ``grads``."""


def reuse_weight(
    age: jax.Array,
    *,
    decay: float,
    reuse_steps: int,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    r"""vSAM's weight c(a) for a PSF that is a steps old.

    .. math:: c(0) = 1, \quad c(a) = β^a \; (a ≤ R), \quad c(a) = 0 \; (a > R)

    Args:
        age: a, an int32 scalar.
        decay: β.
        reuse_steps: R, the oldest age at which a PSF is reused.
        dtype: the dtype of the result.

    Returns:
        c(a), a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsam_jax import reuse
        >>> for age in (0, 1, 2, 3):
        ...   c = reuse.reuse_weight(jnp.array(age), decay=0.5, reuse_steps=2)
        ...   print(c)
        1.0
        0.5
        0.25
        0.0
    """
    powers = jnp.asarray(decay, dtype) ** jnp.asarray(age).astype(dtype)
    return jnp.where(age <= reuse_steps, powers, 0).astype(dtype)


def steady_weight(norms: SampleNorms, *, every: int, tolerance: float) -> jax.Array:
    r"""The weight w of a reused PSF: 1, or less if the PSF is noisy.

    PSFs of different mini-batches have little in common but their mean. SAM adds a new
    one on each of k steps, so the noise of the k directions has a total power of
    k (‖g‖² + ‖s‖²). If one PSF is used k times instead, that power is
    k ‖g‖² + (1 + (k − 1) w)² ‖s‖². w is the largest weight up to 1 that keeps this
    within 1 + η times SAM's:

    .. math::
      w = \min\Big(1, \frac{\sqrt{k (1 + η + η ‖g‖^2 / ‖s‖^2)} - 1}{k - 1}\Big)

    A derivative through a training step treats w as a constant.

    Args:
        norms: ‖g‖ and ‖s‖ of the sample.
        every: k >= 2.
        tolerance: η.

    Returns:
        w, a scalar in (0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from vsam_jax import reuse
        >>> for psf_norm in (0.3, 1.0, 9.0):
        ...   norms = reuse.SampleNorms(jnp.array(1.0), jnp.array(psf_norm))
        ...   print(f'{reuse.steady_weight(norms, every=3, tolerance=0.3):.2f}')
        1.00
        0.60
        0.49
    """
    grad_norm, psf_norm = norms
    tiny = jnp.finfo(psf_norm.dtype).tiny
    # Squared after the division, since the squares of the norms may overflow or
    # underflow. Bounded, since 0 · ∞ is not a number.
    ratio = jnp.minimum(grad_norm / jnp.maximum(psf_norm, tiny), 2.0**60)
    total = jnp.sqrt(every * (1 + tolerance + tolerance * ratio**2))
    return jnp.minimum((total - 1) / (every - 1), 1).astype(psf_norm.dtype)


class Difference(ReuseRule):
    """Stores the PSF s = g_SAM − g, and adds it with a weight between samples.

    A subclass defines :meth:`weight`. If it stops reusing a PSF at some age, it sets
    ``initial_age`` to such an age.

    Example:
        A PSF that counts half until the next sample:

        >>> import jax, jax.numpy as jnp, vsam_jax
        >>> from vsam_jax import perturbation, reuse, sampling
        >>> class Half(reuse.Difference):
        ...   def weight(self, age, norms):
        ...     return jnp.array(0.5)
        >>> tx = vsam_jax.sharpness_aware(
        ...     perturbation.l2_ascent, sampling.Periodic(2), Half(), rho=0.1)
        >>> w, grad_fn = jnp.array(1.0), lambda w: w
        >>> state = tx.init(w)
        >>> for _ in range(2):
        ...   direction, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        ...   print(f'{direction:.2f}')
        1.10
        1.05
    """

    @abc.abstractmethod
    def weight(self, age: jax.Array, norms: SampleNorms) -> jax.Array | float:
        """The weight of a PSF that is ``age`` steps old, a scalar."""

    def init(self, params: PyTree, dtype: DTypeLike) -> PyTree:
        return _zeros(params, dtype)

    def remember(
        self, grads: PyTree, sam_grads: PyTree, memory: PyTree
    ) -> tuple[PyTree, Weights]:
        psf = optax.tree.cast_like(psf_of(grads, sam_grads), memory)
        return psf, (jnp.ones((), _numerics.statistics_dtype(grads)),)

    def recall(
        self, grads: PyTree, memory: PyTree, age: jax.Array, norms: SampleNorms
    ) -> tuple[PyTree, Weights]:
        weight = jnp.asarray(self.weight(age, norms), _numerics.statistics_dtype(grads))
        if weight.ndim:
            raise ValueError(
                f'{type(self).__name__}.weight must return a scalar, got an array of'
                f' shape {weight.shape}.'
            )
        return memory, (weight,)

    def direction(self, grads: PyTree, memory: PyTree, weights: Weights) -> PyTree:
        (weight,) = weights
        return jax.tree.map(
            lambda g, s: _numerics.add_scaled(g, weight, s), grads, memory
        )


@dataclasses.dataclass(frozen=True)
class DecayedDifference(Difference):
    """vSAM's rule: stores the PSF s = g_SAM − g; the direction is g + c(a)·s.

    Attributes:
        decay: β.
        reuse_steps: R, the oldest age at which a PSF is reused.
    """

    decay: float
    reuse_steps: int

    def __post_init__(self):
        _checks.assign(
            self,
            decay=_checks.real('decay', self.decay, high=1.0),
            reuse_steps=_checks.integer(
                'reuse_steps', self.reuse_steps, low=0, high=2**31 - 2
            ),
            initial_age=self.reuse_steps + 1,
        )

    def weight(self, age: jax.Array, norms: SampleNorms) -> jax.Array:
        return reuse_weight(
            age,
            decay=self.decay,
            reuse_steps=self.reuse_steps,
            dtype=norms.psf_norm.dtype,
        )


@dataclasses.dataclass(frozen=True)
class SteadyDifference(Difference):
    """Steady vSAM's rule: stores the PSF s; the direction is g + w·s.

    w is :func:`steady_weight` of the sample's norms. A PSF is reused until the next
    sample, and for as many steps again if that sample is rejected.

    Attributes:
        every: k >= 2, the number of steps from one sample to the next.
        tolerance: η.
    """

    every: int
    tolerance: float

    def __post_init__(self):
        _checks.assign(
            self,
            every=_checks.integer('every', self.every, low=2, high=2**30 - 1),
            tolerance=_checks.real('tolerance', self.tolerance),
            initial_age=2 * self.every,
        )

    def weight(self, age: jax.Array, norms: SampleNorms) -> jax.Array:
        weight = steady_weight(norms, every=self.every, tolerance=self.tolerance)
        return jnp.where(age < 2 * self.every, weight, 0)


@dataclasses.dataclass(frozen=True)
class RescaledOrthogonal(ReuseRule):
    r"""LookSAM's rule: stores the direction of the part of g_SAM orthogonal to g.

    On a sampled step g_SAM = κ g + g_v, with κ = ⟨g_SAM, g⟩ / ‖g‖² and g_v ⊥ g. The
    memory is m = g_v / ‖g_v‖, and the direction is κ g + ‖g_v‖ m. Between samples
    g_v is scaled with the new gradient: the direction is g + α ‖g‖ m. If g_v is no
    longer than the rounding error of g_SAM, it counts as zero, and so does its m. That
    error is estimated from the dtype of g_SAM. (It is not recognized if g_SAM was
    computed in bfloat16 and then cast to float32.)

    Attributes:
        gain: α.
    """

    gain: float
    # Its memory needs g and g_SAM of the same examples.
    takes_slices: ClassVar[bool] = False

    def __post_init__(self):
        _checks.assign(self, gain=_checks.real('gain', self.gain))

    def init(self, params: PyTree, dtype: DTypeLike) -> PyTree:
        return _zeros(params, dtype)

    def remember(
        self, grads: PyTree, sam_grads: PyTree, memory: PyTree
    ) -> tuple[PyTree, Weights]:
        g = jax.tree.map(_numerics.widen, grads)
        g_sam = jax.tree.map(_numerics.widen, sam_grads)
        squared = optax.tree.norm(g, squared=True)
        # Not optax.tree.vdot, whose reshapes fail on explicitly sharded arrays.
        inner = jnp.asarray(optax.tree.sum(optax.tree.mul(g, g_sam)))
        kappa = inner / jnp.where(squared == 0, 1, squared)
        orthogonal = optax.tree.add_scale(g_sam, -kappa, g)
        norm = _numerics.wide_norm(orthogonal)
        # Scaled to length one, rounding errors would make a direction. In one
        # dimension, or on a quadratic bowl, g_v is nothing but rounding errors.
        arrays = [norm, *jax.tree.leaves(sam_grads)]
        eps = max(float(jnp.finfo(x.dtype).eps) for x in arrays)
        noise = 8 * eps * optax.tree.norm(g_sam)
        is_zero = norm <= noise
        inverse = jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, norm))
        unit = optax.tree.scale(inverse, orthogonal)
        return optax.tree.cast_like(unit, memory), (kappa, norm)

    def recall(
        self, grads: PyTree, memory: PyTree, age: jax.Array, norms: SampleNorms
    ) -> tuple[PyTree, Weights]:
        del age, norms
        norm = _numerics.wide_norm(grads)
        return memory, (jnp.ones_like(norm), self.gain * norm)

    def direction(self, grads: PyTree, memory: PyTree, weights: Weights) -> PyTree:
        parallel, orthogonal = weights
        return jax.tree.map(
            lambda g, m: (
                parallel * _numerics.widen(g) + orthogonal * _numerics.widen(m)
            ).astype(g.dtype),
            grads,
            memory,
        )


class Combination(ReuseRule):
    """Stores nothing: combines both gradients on sampled steps, and else returns g.

    A subclass defines :meth:`combine`.

    Example:
        The mean of both gradients:

        >>> import jax, jax.numpy as jnp, vsam_jax
        >>> from vsam_jax import perturbation, reuse, sampling
        >>> class Mean(reuse.Combination):
        ...   def combine(self, grads, sam_grads):
        ...     return jax.tree.map(lambda g, h: (g + h) / 2, grads, sam_grads)
        >>> tx = vsam_jax.sharpness_aware(
        ...     perturbation.l2_ascent, sampling.Periodic(1), Mean(), rho=0.1)
        >>> w, grad_fn = jnp.array(1.0), lambda w: w
        >>> direction, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(f'{direction:.2f}')
        1.05
    """

    @abc.abstractmethod
    def combine(self, grads: PyTree, sam_grads: PyTree) -> PyTree:
        """The direction, in the dtypes of ``grads``; g if both gradients are equal."""

    def init(self, params: PyTree, dtype: DTypeLike) -> None:
        del params, dtype

    def remember(
        self, grads: PyTree, sam_grads: PyTree, memory: PyTree
    ) -> tuple[PyTree, Weights]:
        del memory
        combined = self.combine(grads, sam_grads)
        name = f'the result of {type(self).__name__}.combine'
        _checks.same_tree(name, combined, 'the gradient', grads, dtypes=True)
        return combined, ()

    def recall(
        self, grads: PyTree, memory: PyTree, age: jax.Array, norms: SampleNorms
    ) -> tuple[PyTree, Weights]:
        del memory, age, norms
        return grads, ()

    def direction(self, grads: PyTree, memory: PyTree, weights: Weights) -> PyTree:
        del grads, weights
        return memory


@dataclasses.dataclass(frozen=True)
class NoReuse(Combination):
    """SAM's rule: g_SAM on sampled steps, g on the others."""

    def combine(self, grads: PyTree, sam_grads: PyTree) -> PyTree:
        del grads
        return sam_grads


@dataclasses.dataclass(frozen=True)
class Amplified(Combination):
    r"""WSAM's rule: the direction is g + c·s, with c = γ / (1 − γ) for WSAM.

    Attributes:
        gain: c >= 0; 1 is SAM.
    """

    gain: float

    def __post_init__(self):
        _checks.assign(self, gain=_checks.real('gain', self.gain))

    def combine(self, grads: PyTree, sam_grads: PyTree) -> PyTree:
        return jax.tree.map(
            lambda g, s: _numerics.add_scaled(g, self.gain, s),
            grads,
            psf_of(grads, sam_grads),
        )


@dataclasses.dataclass(frozen=True)
class SurrogateGap(Combination):
    r"""GSAM's rule: g_SAM minus α times the part of g that is orthogonal to it.

    .. math:: \text{direction} = g_\text{SAM} - α \, g_⊥, \quad
      g_⊥ = g - \frac{⟨g, g_\text{SAM}⟩}{‖g_\text{SAM}‖^2} \, g_\text{SAM}

    A step against this direction lowers the loss at w + ε. Its part along g_⊥ raises
    L(w) but, to first order, does not change L(w + ε). So it narrows the surrogate gap
    L(w + ε) − L(w).

    Attributes:
        alpha: α >= 0; 0 is SAM.
    """

    alpha: float

    def __post_init__(self):
        _checks.assign(self, alpha=_checks.real('alpha', self.alpha))

    def combine(self, grads: PyTree, sam_grads: PyTree) -> PyTree:
        # g_⊥ is −s without its part along g_SAM, so it is exactly zero where s is.
        s = psf_of(grads, sam_grads)
        g_sam = jax.tree.map(_numerics.widen, sam_grads)
        squared = optax.tree.norm(g_sam, squared=True)
        inner = jnp.asarray(optax.tree.sum(optax.tree.mul(s, g_sam)))
        along = inner / jnp.where(squared == 0, 1, squared)
        return jax.tree.map(
            lambda h, s, g: (h + self.alpha * (s - along * h)).astype(g.dtype),
            g_sam,
            s,
            grads,
        )


@dataclasses.dataclass(frozen=True)
class Renormalized(Combination):
    r"""Stable SAM's rule: g_SAM, rescaled to the length of g.

    .. math:: \text{direction} = \frac{‖g‖_2}{‖g_\text{SAM}‖_2} \, g_\text{SAM}

    If ‖g_SAM‖ = 0 the direction is zero.
    """

    def combine(self, grads: PyTree, sam_grads: PyTree) -> PyTree:
        norm, sam_norm = (_numerics.wide_norm(x) for x in (grads, sam_grads))
        ratio = norm / jnp.where(sam_norm == 0, 1, sam_norm)
        return jax.tree.map(
            lambda h: (ratio * _numerics.widen(h)).astype(h.dtype), sam_grads
        )


def _zeros(params: PyTree, dtype: DTypeLike) -> PyTree:
    own = lambda p: dtype or jax.dtypes.canonicalize_dtype(p.dtype)
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=own(p)), params)


def psf_of(grads: PyTree, sam_grads: PyTree) -> PyTree:
    """s = g_SAM − g in float32 or wider."""
    return jax.tree.map(
        lambda g, g_sam: _numerics.widen(g_sam) - _numerics.widen(g),
        grads,
        sam_grads,
    )
