r"""Where the second gradient is taken: w + ε.

A perturbation maps a gradient g, the parameters w and a radius ρ to ε. Methods
of the SAM family differ in it by the geometry in which ε has the length ρ.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vsam_jax import _checks, _numerics
from vsam_jax._types import PyTree

__all__ = [
    'Perturbation',
    'all_but_biases',
    'elementwise_ascent',
    'l2_ascent',
    'perturb',
]

Perturbation = Callable[[PyTree, PyTree, jax.Array], PyTree]

# Keeps ε finite at ‖g‖ = 0; the reference implementation's value.
_NORM_FLOOR = 1e-12


def l2_ascent(grads: PyTree, params: PyTree, rho: jax.Array) -> PyTree:
    r"""SAM's perturbation, the steepest ascent in a ball of radius ρ.

    .. math:: ε = ρ \, g / (‖g‖_2 + 10^{-12})

    Args:
        grads: g, a tree of arrays.
        params: w, unused: the ball is the same everywhere.
        rho: ρ, a scalar.

    Returns:
        ε, a tree like ``grads`` in float32 or wider; zero where ‖g‖ = 0.

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
    scale = rho / (_numerics.wide_norm(grads) + _NORM_FLOOR)
    return jax.tree.map(lambda g: scale * _numerics.widen(g), grads)


def elementwise_ascent(
    eta: float = 0.0, scale_mask: PyTree | Callable[[PyTree], PyTree] | None = None
) -> Perturbation:
    r"""ASAM's perturbation: the ball is scaled with the size of each weight.

    .. math:: ε = ρ \, T^2 g / (‖T g‖_2 + 10^{-12}), \quad T = |w| + η

    Args:
        eta: η >= 0. At 0 (most libraries' form) an element that is zero stays where
            it is; the authors of ASAM add 0.01 to weights.
        scale_mask: which tensors are scaled; the others have T = 1. A tree of
            booleans like the parameters (or a prefix), or a callable that makes one
            of them, such as :func:`all_but_biases` (the authors' choice). None
            scales all.

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
        # Nowhere is an answer too: T = 1 everywhere, which is SAM.
        flags = _checks.resolve_mask('scale_mask', scale_mask, params, allow_empty=True)
        if flags is None:
            flags = jax.tree.map(lambda _: True, params)
        scales = jax.tree.map(scale_of, params, flags)
        scaled = jax.tree.map(lambda t, g: t * _numerics.widen(g), scales, grads)
        ascent_of_scaled = l2_ascent(scaled, scaled, rho)
        return jax.tree.map(lambda t, e: t * e, scales, ascent_of_scaled)

    return ascent


def all_but_biases(params: PyTree) -> PyTree:
    """A mask of the tensors that are not called ``bias``, as Flax calls them.

    Args:
        params: a tree with names (of dicts, of attributes).

    Returns:
        A tree of booleans like ``params``.

    Example:
        >>> from vsam_jax import perturbation
        >>> print(perturbation.all_but_biases({'Dense': {'bias': 0.0, 'kernel': 1.0}}))
        {'Dense': {'bias': False, 'kernel': True}}
    """
    # What stands in a box of Flax, or in a variable, is called `value` in it.
    boxed = jax.tree_util.GetAttrKey('value')

    def is_scaled(path: tuple[Any, ...], _: Any) -> bool:
        names = path[:-1] if path[-1:] == (boxed,) else path
        return jax.tree_util.keystr(names[-1:], simple=True) != 'bias'

    return jax.tree_util.tree_map_with_path(is_scaled, params)


def perturb(
    perturbation: Perturbation,
    grads: PyTree,
    params: PyTree,
    rho: jax.Array,
    mask: PyTree | None = None,
) -> PyTree:
    """The perturbed parameters w + ε, in the dtypes of ``params``.

    The sum is formed in float32 or wider and rounded once to the dtype of each
    parameter: the model sees the closest point that it can hold. For bfloat16
    and float16 parameters that point may be w itself. (An element of size 1 in
    bfloat16 moves only if its ε exceeds 2⁻⁹ downwards or 2⁻⁸ upwards.) Where
    that matters keep the parameters in float32 and compute in bfloat16.

    Args:
        perturbation: maps (g, w, ρ) to ε, for instance :func:`l2_ascent`.
        grads: g, a tree of arrays like ``params``.
        params: w.
        rho: ρ, a scalar.
        mask: a tree of booleans like ``params``. Tensors at False stay as they are
            and do not count in the norm: their g is zero. None perturbs all.

    Returns:
        A tree like ``params``.
    """
    if mask is None:
        mask = jax.tree.map(lambda _: True, grads)
    # Zeros rather than nothing: the perturbation sees the tree that it knows.
    picked = jax.tree.map(lambda m, g: g if m else jnp.zeros_like(g), mask, grads)
    return jax.tree.map(
        lambda m, e, p: _numerics.add_scaled(p, 1.0, e) if m else p,
        mask,
        perturbation(picked, params, rho),
        params,
    )


def select(tree: PyTree, mask: PyTree | None) -> PyTree:
    """The leaves that ``mask`` picks; None (an empty subtree) for the others."""
    if mask is None:
        return tree
    return jax.tree.map(lambda flag, x: x if flag else None, mask, tree)
