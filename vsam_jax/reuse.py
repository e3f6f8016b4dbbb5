r"""How an old second gradient is reused: memory, weights, direction.

On a sampled step a rule makes a *memory* from the two gradients; on the other
steps it recalls the one it has. Either way the direction is made from the
fresh gradient, the memory and a few scalar *weights*. Only memory and weights
pass through the branches of a conditional; the direction is formed outside.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from vsam_jax import _checks, _numerics
from vsam_jax._types import DTypeLike, PyTree

Weights = tuple[jax.Array, ...]


@runtime_checkable
class ReuseRule(Protocol):
    """What a rule must offer; all methods are pure and traceable."""

    @property
    def initial_age(self) -> int:
        """The age of the empty memory that a run starts with."""
        ...

    def init(self, params: PyTree, dtype: DTypeLike) -> PyTree:
        """An empty memory, or None where the rule keeps none."""
        ...

    def remember(
        self, grads: PyTree, sam_grads: PyTree, memory: PyTree
    ) -> tuple[PyTree, Weights]:
        """The memory and weights of a sampled step; ``memory`` is the old one."""
        ...

    def recall(
        self, grads: PyTree, memory: PyTree, age: jax.Array
    ) -> tuple[PyTree, Weights]:
        """The memory and weights of a step that is not sampled."""
        ...

    def direction(self, grads: PyTree, memory: PyTree, weights: Weights) -> PyTree:
        """What goes on to the base optimizer, in the dtypes of ``grads``."""
        ...


def reuse_weight(
    age: jax.Array,
    *,
    decay: float,
    reuse_steps: int,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    r"""The weight c(a) of a PSF that is a steps old.

    .. math:: c(0) = 1, \quad c(a) = β^a \; (a ≤ R), \quad c(a) = 0 \; (a > R)

    Args:
        age: a, an int32 scalar.
        decay: β.
        reuse_steps: R.
        dtype: of the result.

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


@dataclasses.dataclass(frozen=True)
class DecayedDifference:
    """vSAM: the memory is the PSF s = g_SAM − g, the direction g + c(a)·s.

    Attributes:
        decay: β.
        reuse_steps: R.
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
        )

    @property
    def initial_age(self) -> int:
        return self.reuse_steps + 1

    def init(self, params: PyTree, dtype: DTypeLike) -> PyTree:
        return _zeros(params, dtype)

    def remember(
        self, grads: PyTree, sam_grads: PyTree, memory: PyTree
    ) -> tuple[PyTree, Weights]:
        psf = optax.tree.cast_like(psf_of(grads, sam_grads), memory)
        return psf, self._weights(grads, jnp.zeros((), jnp.int32))

    def recall(
        self, grads: PyTree, memory: PyTree, age: jax.Array
    ) -> tuple[PyTree, Weights]:
        return memory, self._weights(grads, age)

    def _weights(self, grads: PyTree, age: jax.Array) -> Weights:
        dtype = _numerics.statistics_dtype(grads)
        return (
            reuse_weight(
                age, decay=self.decay, reuse_steps=self.reuse_steps, dtype=dtype
            ),
        )

    def direction(self, grads: PyTree, memory: PyTree, weights: Weights) -> PyTree:
        (weight,) = weights
        return jax.tree.map(
            lambda g, s: _numerics.add_scaled(g, weight, s), grads, memory
        )


@dataclasses.dataclass(frozen=True)
class RescaledOrthogonal:
    r"""LookSAM: the memory is the direction of g_SAM's part orthogonal to g.

    On a sampled step g_SAM = κ g + g_v with κ = ⟨g_SAM, g⟩ / ‖g‖² and g_v ⊥ g. The
    memory is m = g_v / ‖g_v‖ and the direction κ g + ‖g_v‖ m. Between samples
    g_v is scaled with the fresh gradient: g + α ‖g‖ m. A g_v that is no longer
    than the rounding error of g_SAM counts as zero, and so does its m.

    Attributes:
        gain: α.
    """

    gain: float

    def __post_init__(self):
        _checks.assign(self, gain=_checks.real('gain', self.gain))

    @property
    def initial_age(self) -> int:
        return 0

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
        norm = optax.tree.norm(orthogonal)
        # Scaled to length one, rounding errors would become a direction of their
        # own: in one dimension, or on a quadratic bowl, there is nothing else.
        noise = 8 * jnp.finfo(norm.dtype).eps * optax.tree.norm(g_sam)
        inverse = jnp.where(norm <= noise, 0, 1 / jnp.where(norm == 0, 1, norm))
        unit = optax.tree.scale(inverse, orthogonal)
        return optax.tree.cast_like(unit, memory), (kappa, norm)

    def recall(
        self, grads: PyTree, memory: PyTree, age: jax.Array
    ) -> tuple[PyTree, Weights]:
        del age
        norm = optax.tree.norm(jax.tree.map(_numerics.widen, grads))
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


@dataclasses.dataclass(frozen=True)
class NoReuse:
    """SAM: g_SAM on sampled steps, g on the others; nothing is stored."""

    @property
    def initial_age(self) -> int:
        return 0

    def init(self, params: PyTree, dtype: DTypeLike) -> None:
        del params, dtype

    def remember(
        self, grads: PyTree, sam_grads: PyTree, memory: PyTree
    ) -> tuple[PyTree, Weights]:
        del grads, memory
        return sam_grads, ()

    def recall(
        self, grads: PyTree, memory: PyTree, age: jax.Array
    ) -> tuple[PyTree, Weights]:
        del memory, age
        return grads, ()

    def direction(self, grads: PyTree, memory: PyTree, weights: Weights) -> PyTree:
        del grads, weights
        return memory


def _zeros(params: PyTree, dtype: DTypeLike) -> PyTree:
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype or p.dtype), params)


def psf_of(grads: PyTree, sam_grads: PyTree) -> PyTree:
    """s = g_SAM − g in float32 or wider."""
    return jax.tree.map(
        lambda g, g_sam: _numerics.widen(g_sam) - _numerics.widen(g),
        grads,
        sam_grads,
    )
