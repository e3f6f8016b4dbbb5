r"""Where the second gradient is taken: w + ε.

A perturbation maps a gradient g, the parameters w and a radius ρ to ε. The methods
of the SAM family use different geometries, in which ε has the length ρ.
"""

import abc
import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsam_jax import _checks, _numerics
from vsam_jax._types import PyTree

__all__ = [
    'Along',
    'MeanState',
    'Perturbation',
    'StatefulPerturbation',
    'all_but_biases',
    'delayed',
    'elementwise_ascent',
    'l2_ascent',
    'normalization_layers',
    'perturb',
    'running_mean',
    'unified_ascent',
    'without_mean',
]


class StatefulPerturbation(abc.ABC):
    """A perturbation with a memory, for instance an average of gradients.

    Subclass it to write your own. The memory is a tree of arrays. The gradient of every
    step updates it, whether the step is sampled or not. A gradient that is not finite
    leaves it unchanged. Gradients arrive in float32 or wider, and are zero where
    ``perturb_mask`` is False. On several devices the memory comes from the mean
    gradient. With ``per_device``, the current gradient is each device's own.

    Attributes:
        uses_gradient: whether ε depends on the gradient of the current step. If not,
            ``per_device`` raises an error.
    """

    uses_gradient: bool = True

    @abc.abstractmethod
    def init(self, params: PyTree) -> PyTree:
        """The memory before the first step; ``params`` are in float32 or wider."""

    @abc.abstractmethod
    def observe(self, grads: PyTree, params: PyTree, memory: PyTree) -> PyTree:
        """The memory after a step with the gradient ``grads`` at ``params``."""

    @abc.abstractmethod
    def __call__(
        self, grads: PyTree, params: PyTree, rho: jax.Array, memory: PyTree
    ) -> PyTree:
        """Returns ε; ``memory`` is the one before this step."""


#: Maps a gradient, the parameters and ρ to ε. A function, or an object with a memory.
Perturbation = Callable[[PyTree, PyTree, jax.Array], PyTree] | StatefulPerturbation

_NORM = re.compile(
    r'(^|[^a-z])(batch|layer|group|instance|rms)?_?(norm|bn|ln)([^a-z]|$)'
)
# Keeps ε finite at ‖g‖ = 0; the value of the reference implementation.
_NORM_FLOOR = 1e-12


def l2_ascent(grads: PyTree, params: PyTree, rho: jax.Array) -> PyTree:
    r"""SAM's perturbation: steepest ascent to the surface of a ball of radius ρ.

    .. math:: ε = ρ \, g / (‖g‖_2 + 10^{-12})

    Args:
        grads: g, a tree of arrays.
        params: w; unused, since the ball is the same everywhere.
        rho: ρ, a scalar.

    Returns:
        ε, a tree like ``grads`` in float32 or wider; zero if ‖g‖ = 0.

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
        Generalization <https://arxiv.org/abs/2010.01412>`_, 2021

    Example:
        >>> import jax.numpy as jnp
        >>> from vsam_jax import perturbation
        >>> g = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
        >>> e = perturbation.l2_ascent(g, g, 0.5)
        >>> print(f"{e['a'][0]:.1f} {e['b'][0]:.1f}")
        0.3 0.4
    """
    del params
    norm = _numerics.wide_norm(grads)
    # At ‖g‖ = 0 the result is zero anyway, and so should its derivative be: it would
    # be that of 10¹² ρ g.
    scale = jnp.where(norm == 0, 0 * rho, rho / (norm + _NORM_FLOOR))
    return jax.tree.map(lambda g: scale * _numerics.widen(g), grads)


def elementwise_ascent(
    eta: float = 0.0, scale_mask: PyTree | Callable[[PyTree], PyTree] | None = None
) -> Perturbation:
    r"""ASAM's perturbation: scales the ball with the size of each weight.

    .. math:: ε = ρ \, T^2 g / (‖T g‖_2 + 10^{-12}), \quad T = |w| + η

    Args:
        eta: η >= 0. At 0 (the form in most libraries) an element that is zero is not
            perturbed. The authors of ASAM use 0.01.
        scale_mask: the tensors to scale; the others have T = 1. A tree of booleans like
            the parameters (or a prefix of one), or a callable that makes such a tree
            from them, such as :func:`all_but_biases` (the authors' choice). None scales
            all.

    Returns:
        A perturbation.

    References:
        Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for
        Scale-Invariant Learning of Deep Neural Networks
        <https://arxiv.org/abs/2102.11600>`_, 2021

    Example:
        >>> import jax.numpy as jnp
        >>> from vsam_jax import perturbation
        >>> w, g = jnp.array([2.0, 0.0]), jnp.array([3.0, 1.0])
        >>> print(perturbation.elementwise_ascent()(g, w, 0.5))
        [1. 0.]
    """
    eta = _checks.real('eta', eta)
    scale_mask = _checks.mask('scale_mask', scale_mask)

    def scale_of(w: jax.Array, scaled: bool) -> jax.Array:
        w = _numerics.widen(w)
        return jnp.abs(w) + eta if scaled else jnp.ones_like(w)

    def ascent(grads: PyTree, params: PyTree, rho: jax.Array) -> PyTree:
        # A mask of False only is allowed: T = 1 everywhere, which is SAM.
        flags = _checks.resolve_mask('scale_mask', scale_mask, params, allow_empty=True)
        if flags is None:
            flags = jax.tree.map(lambda _: True, params)
        scales = jax.tree.map(scale_of, params, flags)
        scaled = jax.tree.map(lambda t, g: t * _numerics.widen(g), scales, grads)
        ascent_of_scaled = l2_ascent(scaled, scaled, rho)
        return jax.tree.map(lambda t, e: t * e, scales, ascent_of_scaled)

    return ascent


def unified_ascent(normalization: float) -> Perturbation:
    r"""Unified SAM's perturbation: between the step ρ g and a step of length ρ.

    .. math:: ε = ρ \, \Big(1 - λ + \frac{λ}{‖g‖_2 + 10^{-12}}\Big) \, g

    Args:
        normalization: λ in [0, 1]. 1 is SAM. 0 is the unnormalized form (USAM), whose ε
            is longer for a longer gradient.

    Returns:
        A perturbation.

    References:
        Oikonomou and Loizou, `Sharpness-Aware Minimization: General Analysis and
        Improved Rates <https://arxiv.org/abs/2503.02225>`_, 2025

    Example:
        >>> import jax.numpy as jnp
        >>> from vsam_jax import perturbation
        >>> g = jnp.array([3.0, 4.0])
        >>> for normalization in (0.0, 0.5, 1.0):
        ...   print(perturbation.unified_ascent(normalization)(g, g, 0.5))
        [1.5 2. ]
        [0.9 1.2]
        [0.3 0.4]
    """
    normalization = _checks.real('normalization', normalization, high=1.0)

    def ascent(grads: PyTree, params: PyTree, rho: jax.Array) -> PyTree:
        return jax.tree.map(
            lambda e, g: normalization * e + (1 - normalization) * rho * g,
            l2_ascent(grads, params, rho),
            jax.tree.map(_numerics.widen, grads),
        )

    return ascent


@dataclasses.dataclass(frozen=True)
class Along(StatefulPerturbation):
    """Perturbs along a transformed gradient, for instance an average, not along g.

    Any optax transformation of gradients will do. It sees the gradient of every step.

    Attributes:
        transformation: an optax transformation of gradients. Its result for tensors
            outside ``perturb_mask``, whose gradient it sees as zero, counts in the
            norm.
        perturbation: computes ε from the transformed gradient.
        uses_gradient: whether the transformed gradient depends on the current gradient.

    Example:
        >>> import jax.numpy as jnp, optax, vsam_jax
        >>> from vsam_jax import perturbation, reuse, sampling
        >>> tx = vsam_jax.sharpness_aware(
        ...     perturbation.Along(optax.ema(0.6, debias=False)),
        ...     sampling.Periodic(2), reuse.DecayedDifference(0.9, 1), rho=0.1)
        >>> w, grad_fn = jnp.ones(2), lambda w: 4 * w**3
        >>> _, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(state.perturbation_memory.ema)
        [1.6 1.6]
    """

    transformation: optax.GradientTransformation
    perturbation: Callable[[PyTree, PyTree, jax.Array], PyTree] = l2_ascent
    uses_gradient: bool = True

    def __post_init__(self):
        _checks.instance(
            'transformation',
            self.transformation,
            optax.GradientTransformation,
            'perturbation.running_mean(0.4)',
        )

    def init(self, params: PyTree) -> PyTree:
        return self.transformation.init(params)

    def observe(self, grads: PyTree, params: PyTree, memory: PyTree) -> PyTree:
        return self.transformation.update(grads, memory, params)[1]

    def __call__(
        self, grads: PyTree, params: PyTree, rho: jax.Array, memory: PyTree
    ) -> PyTree:
        along, _ = self.transformation.update(grads, memory, params)
        return self.perturbation(along, params, rho)


class MeanState(NamedTuple):
    """State of :func:`running_mean` and :func:`without_mean`.

    Attributes:
        mean: m, a tree like the gradient.
        started: bool scalar, whether there has been a step.
    """

    mean: PyTree
    started: jax.Array


def running_mean(theta: float) -> optax.GradientTransformation:
    r"""VaSSO's transformation for :class:`Along`: an exponential average of gradients.

    .. math:: d_t = (1 - θ) \, d_{t-1} + θ \, g_t, \quad d_0 = g_0

    (Unlike this, ``optax.ema`` starts at zero, or divides by 1 − (1 − θ)ᵗ.)

    Args:
        theta: θ in (0, 1].

    Returns:
        An optax transformation with state :class:`MeanState`.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsam_jax import perturbation
        >>> tx = perturbation.running_mean(0.5)
        >>> state = tx.init(jnp.array(0.0))
        >>> for g in (1.0, 2.0, 2.0):
        ...   d, state = tx.update(jnp.array(g), state)
        ...   print(d)
        1.0
        1.5
        1.75
    """
    theta = _checks.real('theta', theta, high=1.0, open_low=True)
    return _with_mean(1 - theta, lambda grads, before, after: after)


def without_mean(sigma: float, decay: float) -> optax.GradientTransformation:
    r"""F-SAM's transformation for :class:`Along`: the gradient minus its average.

    .. math:: v_t = g_t - σ \, m_{t-1}, \quad m_t = λ \, m_{t-1} + (1 - λ) \, g_t

    The average is that of the earlier gradients. At the first step v = g, and m
    becomes g.

    Args:
        sigma: σ >= 0.
        decay: λ in [0, 1].

    Returns:
        An optax transformation with state :class:`MeanState`.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsam_jax import perturbation
        >>> tx = perturbation.without_mean(1.0, 0.5)
        >>> state = tx.init(jnp.array(0.0))
        >>> for g in (1.0, 2.0, 2.0):
        ...   v, state = tx.update(jnp.array(g), state)
        ...   print(v)
        1.0
        1.0
        0.5
    """
    sigma = _checks.real('sigma', sigma)
    decay = _checks.real('decay', decay, high=1.0)
    return _with_mean(
        decay, lambda grads, before, after: optax.tree.add_scale(grads, -sigma, before)
    )


def _with_mean(
    decay: float, result: Callable[[PyTree, PyTree, PyTree], PyTree]
) -> optax.GradientTransformation:
    """Keeps an average of gradients; returns ``result(grads, before, after)``."""

    def init(params: PyTree) -> MeanState:
        return MeanState(optax.tree.zeros_like(params), jnp.zeros((), jnp.bool_))

    def update(
        updates: PyTree, state: MeanState, params: PyTree = None
    ) -> tuple[PyTree, MeanState]:
        del params
        average = lambda m, g: jnp.where(state.started, decay * m + (1 - decay) * g, g)
        mean = jax.tree.map(average, state.mean, updates)
        after = MeanState(mean, jnp.ones((), jnp.bool_))
        return result(updates, state.mean, mean), after

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def delayed() -> optax.GradientTransformation:
    """AsyncSAM's transformation for :class:`Along`: the previous step's gradient.

    It returns zero at the first step.

    Returns:
        An optax transformation whose state is the latest gradient.
    """
    return optax.GradientTransformation(
        lambda params: optax.tree.zeros_like(params),
        lambda updates, state, params=None: (state, updates),
    )


def normalization_layers(params: PyTree) -> PyTree:
    """A mask that selects the parameters of normalization layers, as SAM-ON does.

    Pass it as ``perturb_mask`` to perturb only those. A layer counts as a normalization
    layer if it has a parameter called ``scale``, as in Flax, or by its name. Such names
    are ``norm``, ``bn`` or ``ln``, optionally after ``Batch``, ``Layer``, ``Group``,
    ``Instance`` or ``RMS``, and with numbers or other words beside it (``norm1``,
    ``bn_2``, ``LayerNorm_0``, but not ``normal``).

    Args:
        params: a tree with names (dict keys, attributes, an ``nnx.state``).

    Returns:
        A tree of booleans like ``params``.

    References:
        Mueller et al., `Normalization Layers Are All That Sharpness-Aware Minimization
        Needs <https://arxiv.org/abs/2306.04226>`_, 2023

    Example:
        >>> import vsam_jax
        >>> from vsam_jax import perturbation
        >>> tx = vsam_jax.sam(rho=0.5, perturb_mask=perturbation.normalization_layers)
        >>> print(perturbation.normalization_layers(
        ...     {'conv': {'kernel': 0.0}, 'layer': {'bias': 0.0, 'scale': 1.0}}))
        {'conv': {'kernel': False}, 'layer': {'bias': True, 'scale': True}}
    """
    paths = [_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    scaled = {path[:-1] for path in paths if path[-1:] == ('scale',)}

    def is_normalization(path: tuple[Any, ...], _: Any) -> bool:
        *layer, _ = _names(path) or ('',)
        name = layer[-1].lower() if layer else ''
        return bool(layer) and (tuple(layer) in scaled or bool(_NORM.search(name)))

    return jax.tree_util.tree_map_with_path(is_normalization, params)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names on a path, without a Flax box or an NNX variable at its end."""
    if path[-1:] == (jax.tree_util.GetAttrKey('value'),):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def all_but_biases(params: PyTree) -> PyTree:
    """A mask that selects all tensors not called ``bias``, Flax's name for biases.

    Args:
        params: a tree with names (dict keys, attributes).

    Returns:
        A tree of booleans like ``params``.

    Example:
        >>> from vsam_jax import perturbation
        >>> print(perturbation.all_but_biases({'Dense': {'bias': 0.0, 'kernel': 1.0}}))
        {'Dense': {'bias': False, 'kernel': True}}
    """
    is_scaled = lambda path, _: _names(path)[-1:] != ('bias',)
    return jax.tree_util.tree_map_with_path(is_scaled, params)


def perturb(
    perturbation: Perturbation,
    grads: PyTree,
    params: PyTree,
    rho: jax.Array,
    mask: PyTree | None = None,
    memory: PyTree = None,
) -> PyTree:
    """Returns the perturbed parameters w + ε, in the dtypes of ``params``.

    The sum is computed in float32 or wider and rounded once to each parameter's dtype.
    So the model sees the closest point that its dtype can represent. For bfloat16 and
    float16 parameters that point may be w itself. (An element of size 1 in bfloat16
    moves only if its ε exceeds 2⁻⁹ downwards or 2⁻⁸ upwards.) If that matters, keep the
    parameters in float32 and compute in bfloat16.

    Args:
        perturbation: maps (g, w, ρ) to ε, for instance :func:`l2_ascent`.
        grads: g, a tree of arrays like ``params``.
        params: the parameters w.
        rho: ρ, a scalar.
        mask: a tree of booleans like ``params``. Tensors at False are not perturbed and
            do not count in the norm: their g is set to zero. None perturbs all.
        memory: the memory of a :class:`StatefulPerturbation` before this step.

    Returns:
        A tree like ``params``.
    """
    if mask is None:
        mask = jax.tree.map(lambda _: True, grads)
    picked = _picked(grads, mask)
    if isinstance(perturbation, StatefulPerturbation):
        wide = jax.tree.map(_numerics.widen, picked)
        ascent = perturbation(wide, params, rho, memory)
    else:
        ascent = perturbation(picked, params, rho)
    # A scalar would be added to all elements without any error.
    if problem := _checks.difference(ascent, params):
        raise ValueError(
            f'the perturbation must return a tree of arrays like params: {problem}'
        )
    return jax.tree.map(
        lambda m, e, p: _numerics.add_scaled(p, 1.0, e) if m else p,
        mask,
        ascent,
        params,
    )


def check(perturbation: Any) -> None:
    """Raises TypeError for what is no perturbation, a whole method for example."""
    if not callable(perturbation) or isinstance(perturbation, type):
        raise TypeError(
            'perturbation must be a function of (grads, params, rho), such as'
            ' perturbation.l2_ascent, or a perturbation.StatefulPerturbation, got'
            f' {_checks.shown(perturbation)}.'
        )


def init(perturbation: Perturbation, params: PyTree) -> PyTree:
    """The memory of a perturbation before the first step; None if it has none."""
    if not isinstance(perturbation, StatefulPerturbation):
        return None
    return perturbation.init(jax.tree.map(_numerics.widen, params))


def observe(
    perturbation: Perturbation,
    grads: PyTree,
    params: PyTree,
    memory: PyTree,
    mask: PyTree | None,
) -> PyTree:
    """The memory of a perturbation after a step with this gradient."""
    assert isinstance(perturbation, StatefulPerturbation)
    wide = jax.tree.map(_numerics.widen, grads)
    picked = wide if mask is None else _picked(wide, mask)
    return perturbation.observe(picked, params, memory)


def _picked(grads: PyTree, mask: PyTree) -> PyTree:
    # Zeros, not None, so that the tree structure stays the same.
    return jax.tree.map(lambda m, g: g if m else jnp.zeros_like(g), mask, grads)


def select(tree: PyTree, mask: PyTree | None) -> PyTree:
    """The leaves that ``mask`` selects; None (an empty subtree) for the others."""
    if mask is None:
        return tree
    return jax.tree.map(lambda flag, x: x if flag else None, mask, tree)
