"""Momentum-SAM: sharpness at one gradient a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsam_jax import _checks, _numerics, _places
from vsam_jax._state import states_in
from vsam_jax._types import PyTree, Radius


class MSAMState(NamedTuple):
    """State of :func:`msam`.

    Attributes:
        step: int32 scalar, the number of updates made.
        offset: ρ u/‖u‖ of the latest update u that was not zero, a tree like the
            parameters: the trained ones less those to evaluate.
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
    parameters as they are, in any training loop. An update of zero (a warm-up from
    zero, a mini-step of ``optax.MultiSteps``) leaves the perturbation as it is.

    Evaluate and export :func:`msam_eval_params`; a checkpoint holds the trained
    parameters together with the optimizer state. Statistics of BatchNorm are those of
    the perturbed parameters.

    After SGD with momentum this is the authors' method, with weight decay as
    ``optax.add_decayed_weights`` adds it, which acts on the perturbed parameters as in
    their program. Any other base optimizer will do, but ε then follows the whole
    update, preconditioned and with what else it has in it; the authors' variant of
    AdamW, which follows the mean of the gradients, is not offered. Inside
    ``optax.masked`` the other tensors are left alone.

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
        for leaf in jax.tree.leaves(params):  # None where optax.masked left some out.
            _checks.floating_leaves('params', leaf)
        return MSAMState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(
        updates: PyTree, state: MSAMState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, MSAMState]:
        del params, extra_args
        _places.check_last()
        if not isinstance(state, MSAMState):
            raise TypeError(_checks.no_state('MSAMState', state))
        _checks.same_tree(
            'updates', updates, 'the offset in state', state.offset, dtypes=False
        )
        norm = _numerics.wide_norm(updates)
        radius = _checks.current_radius('rho', rho, state.step, norm.dtype)
        scale = radius / jnp.where(norm == 0, 1, norm)
        # An update that is not finite is for a guard to skip: it moves nothing else.
        stays = (norm == 0) | ~jnp.isfinite(norm)
        offset = jax.tree.map(
            lambda u, old: jnp.where(
                stays, old, (scale * _numerics.widen(u)).astype(old.dtype)
            ),
            updates,
            state.offset,
        )
        moved = jax.tree.map(
            lambda u, new, old: (
                _numerics.widen(u) + (_numerics.widen(new) - _numerics.widen(old))
            ).astype(jnp.promote_types(u.dtype, old.dtype)),
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
            or of a wrapper, an ``nnx.Optimizer``.
        params: the parameters that are trained, in NNX ``nnx.state(model, nnx.Param)``.

    Returns:
        A tree like ``params``.

    Raises:
        ValueError: if ``state`` holds none or several, or one of other parameters.
    """
    found = states_in(state, MSAMState)
    if len(found) != 1:
        raise ValueError(
            'state must hold exactly one MSAMState, that of the optimizer with'
            f' vsam_jax.msam in it, but it holds {len(found)}.'
        )
    moved = {
        _path(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(found[0].offset)
    }
    known = [_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    unknown = sorted(set(moved) - set(known))
    if unknown:
        raise ValueError(
            'params must be the parameters that the optimizer with vsam_jax.msam'
            f' trains, but they have no tensor at {unknown[0]!r}.'
        )

    def evaluated(path: tuple[Any, ...], w: jax.Array) -> jax.Array:
        # Tensors that optax.masked left out have not moved.
        name = _path(path)
        if name not in moved:
            return w
        if jnp.shape(w) != jnp.shape(moved[name]):
            raise ValueError(
                'params must be the parameters that the optimizer with vsam_jax.msam'
                f' trains, but at {name!r} their shape is {jnp.shape(w)} and not'
                f' {jnp.shape(moved[name])}.'
            )
        return _numerics.add_scaled(w, -1, moved[name])

    return jax.tree_util.tree_map_with_path(evaluated, params)


def _path(path: tuple[Any, ...]) -> str:
    """Where a leaf is. Variables of NNX have another type in a state than outside."""
    return jax.tree_util.keystr(path, simple=True, separator='/')
