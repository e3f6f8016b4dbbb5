"""Momentum-SAM: sharpness at one gradient a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsam_jax import _checks, _numerics
from vsam_jax._types import PyTree, Radius


class MSAMState(NamedTuple):
    """State of :func:`msam`.

    Attributes:
        step: int32 scalar, the number of updates made.
        offset: ρ u/‖u‖ of the latest update u, a tree like the parameters: where these
            stand less where they would stand without MSAM.
    """

    step: jax.Array
    offset: PyTree


def msam(rho: Radius = 0.3) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: the gradient is taken where the momentum leads.

    The gradient is taken at w − ρ m/‖m‖, m being the momentum, where SAM's is taken at
    w + ρ g/‖g‖. It stands *last* in the chain, after the learning rate, and moves the
    parameters themselves: what is trained are the perturbed ones,

    .. math:: w_t + ρ \, u_t / ‖u_t‖_2,

    with u the update of the base optimizer. So a step takes one gradient, of the
    parameters as they are, in any training loop. Evaluate and save
    :func:`msam_eval_params`.

    Any base optimizer will do, and weight decay as ``optax.add_decayed_weights`` adds
    it, which then acts on the perturbed parameters, as in the authors' program.

    Args:
        rho: ρ, a number >= 0, a scalar array or an optax schedule of the update count.
            0 is the base optimizer.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`MSAMState`. It takes the memory of the parameters once more. In
        bfloat16 or float16 parameters rounding adds up; keep them in float32.

    Raises:
        TypeError, ValueError: for a ``rho`` that is none.

    References:
        Becker et al., `Momentum-SAM: Sharpness Aware Minimization without Computational
        Overhead <https://arxiv.org/abs/2401.12033>`_, 2024

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(optax.sgd(0.1, momentum=0.9), vsam_jax.msam(rho=0.3))
        >>> w, loss = jnp.array(1.0), lambda w: w**2 / 2
        >>> opt_state = tx.init(w)
        >>> for _ in range(100):
        ...   updates, opt_state = tx.update(jax.grad(loss)(w), opt_state, w)
        ...   w = optax.apply_updates(w, updates)
        >>> offset = w - vsam_jax.msam_eval_params(opt_state, w)
        >>> print(f'{abs(offset):.2f}')
        0.30
    """
    rho = _checks.radius('rho', rho)

    def init(params: PyTree) -> MSAMState:
        _checks.floating_leaves('params', params)
        return MSAMState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(
        updates: PyTree, state: MSAMState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, MSAMState]:
        del params, extra_args
        radius = rho(state.step) if callable(rho) else rho
        norm = _numerics.wide_norm(updates)
        # At zero there is no direction: the parameters are those without MSAM.
        scale = jnp.where(norm > 0, radius / jnp.where(norm > 0, norm, 1), 0)
        offset = jax.tree.map(
            lambda u, old: (scale * _numerics.widen(u)).astype(old.dtype),
            updates,
            state.offset,
        )
        moved = jax.tree.map(
            lambda u, new, old: (
                _numerics.widen(u) + (_numerics.widen(new) - _numerics.widen(old))
            ).astype(u.dtype),
            updates,
            offset,
            state.offset,
        )
        return moved, MSAMState(jnp.asarray(optax.safe_increment(state.step)), offset)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def msam_eval_params(state: Any, params: PyTree) -> PyTree:
    """The parameters without the perturbation of :func:`msam`, for evaluation.

    Args:
        state: anything with exactly one :class:`MSAMState` in it: the state of a chain
            or of a wrapper.
        params: the parameters that are trained.

    Returns:
        A tree like ``params``.

    Raises:
        ValueError: if ``state`` holds none or several, or one of another tree.
    """
    is_state = lambda node: isinstance(node, MSAMState)
    found = list(filter(is_state, jax.tree.leaves(state, is_leaf=is_state)))
    if len(found) != 1:
        raise ValueError(
            'state must hold exactly one MSAMState, that of the optimizer with'
            f' vsam_jax.msam in it, but it holds {len(found)}.'
        )
    offset = found[0].offset
    _checks.same_tree('params', params, 'the offset in state', offset, dtypes=False)
    return jax.tree.map(lambda w, e: _numerics.add_scaled(w, -1, e), params, offset)
