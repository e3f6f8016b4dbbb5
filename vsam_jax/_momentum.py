"""Momentum-SAM: a sharpness-aware method that needs one gradient a step."""

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
        offset: ρ u/‖u‖ for the latest nonzero update u, a tree like the parameters.
            It is the trained parameters minus those to evaluate.
    """

    step: jax.Array
    offset: PyTree


def msam(rho: Radius = 0.3) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: perturbs along the momentum, so a step needs only one gradient.

    Take it where no second gradient is affordable. Put it *last* in ``optax.chain``,
    after the optimizer with its learning rate. (The other methods go first.)

    SAM takes its gradient at w + ρ g/‖g‖. Momentum-SAM takes it at w − ρ m/‖m‖, where m
    is the momentum. To do so it moves the parameters themselves. The loop trains the
    perturbed parameters

    .. math:: w_t + ρ \, u_t / ‖u_t‖_2,

    where u is the update of the base optimizer. A step therefore takes one gradient,
    at the parameters as they are, and any training loop works unchanged. An update of
    zero (a warm-up from zero, a mini-step of ``optax.MultiSteps``) leaves the
    perturbation as it is.

    Evaluate and export :func:`msam_eval_params`, not the trained parameters. In a
    checkpoint save the trained parameters and the optimizer state. BatchNorm's
    statistics are those of the perturbed parameters.

    After SGD with momentum this is the authors' method. Weight decay from
    ``optax.add_decayed_weights`` acts on the perturbed parameters, as in their program.
    You can use any other base optimizer, but ε then follows its whole update, with
    preconditioning and everything else in it. The authors' variant for AdamW, which
    follows the mean of the gradients, is not implemented. Inside ``optax.masked`` the
    other tensors are left alone.

    Args:
        rho: ρ, a number >= 0, a scalar array or an optax schedule of the update count.
            0 gives the base optimizer.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`MSAMState`. The state takes as much memory as the parameters. Keep the
        parameters in float32: in bfloat16 or float16 rounding errors accumulate.

    Raises:
        TypeError, ValueError: if ``rho`` is not a valid radius. From ``update``: if the
            method is not the last transformation in its chain.

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
        for leaf in jax.tree.leaves(params):  # optax.masked puts None for others.
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
        # A guard is to skip an update that is not finite, so the offset stays.
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
    """Returns the parameters without the perturbation of :func:`msam`.

    Evaluate and export these.

    Args:
        state: anything that contains exactly one :class:`MSAMState`: the state of a
            chain or of a wrapper, an ``nnx.Optimizer``.
        params: the trained parameters; in NNX ``nnx.state(model, nnx.Param)``.

    Returns:
        A tree like ``params``.

    Raises:
        ValueError: if ``state`` contains no ``MSAMState`` or several, or one for other
            parameters.
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
    """The path of a leaf as text: NNX variables change their type inside a state."""
    return jax.tree_util.keystr(path, simple=True, separator='/')
