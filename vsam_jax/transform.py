r"""The update that all methods of the family share.

A method is a choice of three: where the second gradient is taken
(:mod:`vsam_jax.perturbation`), when (:mod:`vsam_jax.sampling`) and how an old
one is reused (:mod:`vsam_jax.reuse`). This module puts any three together into
an optax transformation; it knows none of them by name.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsam_jax import _checks, _collectives, _numerics, dispatch
from vsam_jax import perturbation as perturbations
from vsam_jax import reuse as reuses
from vsam_jax._types import DTypeLike, GradFn, Mask, PyTree, Radius
from vsam_jax.perturbation import Perturbation
from vsam_jax.reuse import ReuseRule
from vsam_jax.sampling import SamplingRule
from vsam_jax.state import VSAMState
from vsam_jax.statistics import Rings


class _Outcome(NamedTuple):
    """What the sampled and the unsampled half of an update both return.

    This is all that passes through the branches of a conditional.
    """

    memory: PyTree
    weights: tuple[jax.Array, ...]
    accepted: jax.Array
    rings: Rings | None
    grad_norm: jax.Array
    psf_norm: jax.Array


def sharpness_aware(
    perturbation: Perturbation,
    sampling: SamplingRule,
    reuse: ReuseRule,
    rho: Radius,
    *,
    stats_mask: Mask | None = None,
    perturb_mask: Mask | None = None,
    psf_dtype: DTypeLike = None,
    axis_name: _collectives.AxisName = None,
    per_device: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Puts a perturbation, a sampling rule and a reuse rule together.

    The methods with a name (:func:`vsam_jax.vsam` and its relatives) are calls of
    this function; their docstrings describe what ``init`` and ``update`` do.

    Args:
        perturbation: where the second gradient is taken.
        sampling: when it is taken.
        reuse: how an old one is reused.
        rho: ρ, see :func:`vsam_jax.vsam`, and so on for the other arguments.
        stats_mask: which tensors the statistics are taken over.
        perturb_mask: which tensors are perturbed.
        psf_dtype: dtype in which the memory is stored.
        axis_name: mapped axis over which gradients are averaged.
        per_device: whether each device of that axis has its own perturbation.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.
    """
    if not callable(perturbation):
        raise TypeError(
            'perturbation must be a function of (grads, params, rho), such as'
            f' perturbation.l2_ascent, got {perturbation!r}.'
        )
    _checks.instance('sampling', sampling, SamplingRule, 'sampling.Periodic(5)')
    _checks.instance('reuse', reuse, ReuseRule, 'reuse.NoReuse()')
    rho = _checks.radius('rho', rho)
    stats_mask = _checks.mask('stats_mask', stats_mask)
    perturb_mask = _checks.mask('perturb_mask', perturb_mask)
    psf_dtype = _checks.floating_dtype('psf_dtype', psf_dtype)
    axis_name = _checks.axis_name('axis_name', axis_name)
    if _checks.flag('per_device', per_device) and axis_name is None:
        raise ValueError(
            'per_device must be False where axis_name is None, got True: name the axis'
            ' of shard_map or pmap that runs over the devices.'
        )

    def init_fn(params: PyTree) -> VSAMState:
        _checks.floating_leaves('params', params)
        _checks.resolve_mask('stats_mask', stats_mask, params)
        _checks.resolve_mask('perturb_mask', perturb_mask, params)
        dtype = _numerics.statistics_dtype(params)
        budget = sampling.init_budget(dtype)
        rings = sampling.init_rings(dtype)
        if sampling.warmup_steps == 0:
            budget = sampling.next_budget(budget, rings)
            plan = sampling.plan(budget, jnp.zeros((), jnp.int32))
        else:
            plan = jnp.ones((sampling.window,), jnp.bool_)
        return VSAMState(
            step=jnp.zeros((), jnp.int32),
            # Windows start at step W; counted backwards they cover the warm-up.
            position=jnp.array(-sampling.warmup_steps % sampling.window, jnp.int32),
            plan=plan,
            budget=budget,
            psf=reuse.init(params, psf_dtype),
            age=jnp.array(reuse.initial_age, jnp.int32),
            rings=rings,
            grad_norm=jnp.zeros((), dtype),
            psf_norm=jnp.zeros((), dtype),
            sampled=jnp.zeros((), jnp.bool_),
            num_samples=jnp.zeros((), jnp.int32),
            num_rejected=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: PyTree,
        state: VSAMState,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        sample: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, VSAMState]:
        del extra_args
        sample = dispatch.resolve(sample, state, always=sampling.always)
        _check_update(updates, state, params, grad_fn, sample)
        _collectives.check_own('updates', updates, axis_name)
        # From here on every number is the same on all devices, the plan too, but
        # for what the second pass sees and returns.
        grads = _collectives.mean(updates, axis_name)
        dtype = state.budget.dtype
        measured = _checks.resolve_mask('stats_mask', stats_mask, params)
        picked = lambda tree: perturbations.select(tree, measured)
        older = jnp.asarray(optax.safe_increment(state.age))

        stores = state.psf is not None

        def sampled() -> _Outcome:
            assert grad_fn is not None
            radius = jnp.asarray(rho(state.step) if callable(rho) else rho, dtype)
            sam_grads = grad_fn(
                perturbations.perturb(
                    perturbation,
                    updates if per_device else grads,
                    _collectives.own_copy(params, axis_name),
                    radius,
                    _checks.resolve_mask('perturb_mask', perturb_mask, params),
                )
            )
            _checks.same_tree(
                'the result of grad_fn',
                sam_grads,
                'the gradient passed to update',
                grads,
                dtypes=True,
            )
            sam_grads = _collectives.mean(sam_grads, axis_name)
            # The second pass may round differently from the first: at ρ = 0 the
            # difference must vanish all the same.
            sam_grads = jax.tree.map(
                lambda g, g_sam: jnp.where(radius == 0, g, g_sam),
                grads,
                sam_grads,
            )
            memory, weights = reuse.remember(grads, sam_grads, state.psf)
            psf = reuses.psf_of(grads, sam_grads)
            grad_norm = _numerics.wide_norm(picked(grads), dtype)
            psf_norm = _numerics.wide_norm(picked(psf), dtype)
            # The norm of the memory sees tensors that stats_mask leaves out, and
            # numbers that overflow in a narrow psf_dtype.
            accepted = (
                jnp.isfinite(grad_norm)
                & jnp.isfinite(psf_norm)
                & jnp.isfinite(_numerics.wide_norm(memory, dtype))
            )
            # Decisions are not differentiated: they are piecewise constant, and the
            # derivative of a norm at zero is not finite.
            grad_norm, psf_norm = jax.lax.stop_gradient((grad_norm, psf_norm))
            if stores and sample is not True:
                # Inside the branch, so that it is written where the older one was:
                # a conditional copies what is needed after it as it was before.
                memory = _kept(accepted, memory, state.psf)
            return _Outcome(
                memory=memory,
                weights=weights,
                accepted=accepted,
                rings=_kept(
                    accepted,
                    sampling.observe(state.rings, grad_norm, psf_norm),
                    state.rings,
                ),
                grad_norm=_kept(accepted, grad_norm, state.grad_norm),
                psf_norm=_kept(accepted, psf_norm, state.psf_norm),
            )

        def unsampled() -> _Outcome:
            memory, weights = reuse.recall(
                grads,
                state.psf,
                older,
                reuses.SampleNorms(state.grad_norm, state.psf_norm),
            )
            return _Outcome(
                memory=memory,
                weights=weights,
                accepted=jnp.zeros((), jnp.bool_),
                rings=state.rings,
                grad_norm=state.grad_norm,
                psf_norm=state.psf_norm,
            )

        outcome = dispatch.choose(sample, sampled, unsampled)
        direction = reuse.direction(grads, outcome.memory, outcome.weights)
        accepted = outcome.accepted
        taken = jnp.asarray(sample, jnp.bool_)
        rejected = taken & ~accepted
        if sample is not False:
            # Traced, the older memory has taken its place, and norms overflow before
            # gradients do: show that there was one.
            direction = jax.tree.map(
                lambda d: jnp.where(rejected, jnp.nan, d), direction
            )
        psf = outcome.memory if stores else None
        if stores and sample is True:
            # Not before the direction is made: the older memory is not read for that,
            # and so need not be copied.
            psf = _kept(accepted, psf, state.psf)
        step = jnp.asarray(optax.safe_increment(state.step))
        position, plan, budget = _advance(sampling, state, step, outcome.rings)
        return direction, VSAMState(
            step=step,
            position=position,
            plan=plan,
            budget=budget,
            psf=psf,
            age=jnp.where(accepted, 0, older),
            rings=outcome.rings,
            grad_norm=outcome.grad_norm,
            psf_norm=outcome.psf_norm,
            sampled=taken,
            num_samples=state.num_samples + taken.astype(jnp.int32),
            num_rejected=state.num_rejected + rejected.astype(jnp.int32),
        )

    # optax types states as array trees, which a NamedTuple of arrays is.
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def _kept(accepted: jax.Array, new: PyTree, older: PyTree) -> PyTree:
    """The new tree or, after a sample that cannot be used, the older one."""
    return jax.tree.map(functools.partial(jnp.where, accepted), new, older)


def _advance(
    sampling: SamplingRule,
    state: VSAMState,
    step: jax.Array,
    rings: Rings | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Position, plan and budget for the next step, of number ``step``.

    Where a window starts with the next step, budget and plan are those of that
    window; the plan is a small array, so it is made on every step and selected,
    which needs no conditional.
    """
    position = (state.position + 1) % sampling.window
    starts = (position == 0) & (step >= sampling.warmup_steps)
    budget = sampling.next_budget(state.budget, rings)
    plan = sampling.plan(budget, (step - sampling.warmup_steps) // sampling.window)
    return (
        position,
        jnp.where(starts, plan, state.plan),
        jnp.where(starts, budget, state.budget),
    )


def _check_update(
    updates: PyTree,
    state: VSAMState,
    params: PyTree | None,
    grad_fn: GradFn | None,
    sample: Any,
) -> None:
    """Raises for arguments of ``update`` that cannot be meant."""
    if params is None:
        raise ValueError(
            'params must be the parameters, got None: the second gradient is taken'
            ' at params + ε. Call tx.update(grads, state, params, grad_fn=...).'
        )
    if grad_fn is not None and not callable(grad_fn):
        raise TypeError(
            f'grad_fn must be a function of the parameters, got {grad_fn!r}.'
        )
    if grad_fn is None and sample is not False:
        raise ValueError(
            'grad_fn must be a function that maps parameters to the gradient of'
            ' the same mini-batch, got None. Call tx.update(grads, state, params,'
            ' grad_fn=lambda p: jax.grad(loss)(p, batch)). A wrapper that passes no'
            ' extra arguments on (optax.lookahead, MultiSteps.gradient_transformation)'
            ' goes after it, not around it.'
        )
    _checks.floating_leaves('params', params)
    _checks.same_tree('updates', updates, 'params', params, dtypes=False)
    _checks.floating_leaves('updates', updates)
    if state.psf is not None:
        _checks.same_tree('the PSF of state', state.psf, 'params', params, dtypes=False)
