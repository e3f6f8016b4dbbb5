r"""The update that all methods of the family share.

A method is a choice of three: where the second gradient is taken
(:mod:`vsam_jax.perturbation`), when (:mod:`vsam_jax.sampling`) and how an old
one is reused (:mod:`vsam_jax.reuse`). This module puts any three together into
an optax transformation; it knows none of them by name.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsam_jax import _checks, _collectives, _decision, _numerics
from vsam_jax import perturbation as perturbations
from vsam_jax import reuse as reuses
from vsam_jax._state import VSAMState
from vsam_jax._types import DTypeLike, GradFn, Mask, PyTree, Radius
from vsam_jax.perturbation import Perturbation
from vsam_jax.reuse import ReuseRule
from vsam_jax.sampling import SamplingRule
from vsam_jax.statistics import Rings


def sharpness_aware(
    perturbation: Perturbation,
    sampling: SamplingRule,
    reuse: ReuseRule,
    rho: Radius,
    *,
    stats_mask: Mask | None = None,
    perturb_mask: Mask | None = None,
    psf_dtype: DTypeLike = None,
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

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

    Raises:
        TypeError, ValueError: for arguments that are no rules, masks, radii or dtypes.

    Example:
        Plain SAM on a random half of the steps:

        >>> import jax.numpy as jnp, vsam_jax
        >>> from vsam_jax import perturbation, reuse, sampling
        >>> tx = vsam_jax.sharpness_aware(
        ...     perturbation.l2_ascent,
        ...     sampling.AtRandom(rate=0.5, window=1000, seed=0),
        ...     reuse.NoReuse(),
        ...     rho=0.05)
        >>> print(int(tx.init(jnp.ones(2)).plan.sum()))
        492
    """
    if not callable(perturbation):
        raise TypeError(
            'perturbation must be a function of (grads, params, rho), such as'
            f' perturbation.l2_ascent, got {perturbation!r}.'
        )
    _checks.instance('sampling', sampling, SamplingRule, 'sampling.Periodic(5)')
    _checks.instance('reuse', reuse, ReuseRule, 'reuse.NoReuse()')
    method = _Method(
        perturbation=perturbation,
        sampling=sampling,
        reuse=reuse,
        rho=_checks.radius('rho', rho),
        stats_mask=_checks.mask('stats_mask', stats_mask),
        perturb_mask=_checks.mask('perturb_mask', perturb_mask),
        psf_dtype=_checks.floating_dtype('psf_dtype', psf_dtype),
    )
    # optax types states as array trees, which a NamedTuple of arrays is.
    return optax.GradientTransformationExtraArgs(method.init, method.update)  # pyright: ignore[reportArgumentType]


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
    sharpness: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class _Method:
    """Where, when and how, and what all of them share."""

    perturbation: Perturbation
    sampling: SamplingRule
    reuse: ReuseRule
    rho: Radius
    stats_mask: Mask | None
    perturb_mask: Mask | None
    psf_dtype: DTypeLike

    def init(self, params: PyTree) -> VSAMState:
        """The state before the first update."""
        _checks.floating_leaves('params', params)
        _checks.resolve_mask('stats_mask', self.stats_mask, params)
        _checks.resolve_mask('perturb_mask', self.perturb_mask, params)
        dtype = _numerics.statistics_dtype(params)
        rule = self.sampling
        budget, rings = rule.init_budget(dtype), rule.init_rings(dtype)
        if rule.warmup_steps == 0:
            budget = rule.next_budget(budget, rings)
            plan = rule.plan(budget, jnp.zeros((), jnp.int32))
        else:
            plan = jnp.ones((rule.window,), jnp.bool_)
        return VSAMState(
            step=jnp.zeros((), jnp.int32),
            # Windows start at step W; counted backwards they cover the warm-up.
            position=jnp.array(-rule.warmup_steps % rule.window, jnp.int32),
            plan=plan,
            budget=budget,
            psf=self.reuse.init(params, self.psf_dtype),
            age=jnp.array(self.reuse.initial_age, jnp.int32),
            rings=rings,
            grad_norm=jnp.zeros((), dtype),
            psf_norm=jnp.zeros((), dtype),
            sharpness=jnp.full((), jnp.nan, dtype),
            sampled=jnp.zeros((), jnp.bool_),
            num_samples=jnp.zeros((), jnp.int32),
            num_rejected=jnp.zeros((), jnp.int32),
        )

    def update(
        self,
        updates: PyTree,
        state: VSAMState,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        sample: Any = None,
        axis_name: _collectives.AxisName = None,
        per_device: bool = False,
        value: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, VSAMState]:
        """The direction and the next state, see :func:`vsam_jax.vsam`."""
        del extra_args
        axes = _collectives.axes_of(axis_name)
        _check_per_device(per_device, axis_name)
        _check_update(updates, state, params, grad_fn, sample)
        _collectives.check_told(axis_name, 'the gradient', updates, params)
        _collectives.check_own('updates', updates, axes)
        sample = _decision.resolve(sample, state, always=self.sampling.always)
        # From here on every number is the same on all devices, the plan too, but
        # for what the second pass sees and returns.
        grads = _collectives.mean(updates, axes)

        def sampled() -> _Outcome:
            assert grad_fn is not None
            second = self._second_pass(
                updates if per_device else grads,
                params,
                functools.partial(_pass_of, grad_fn, updates, value),
                state.step,
                axes,
            )
            sharpness, sam_grads = _collectives.mean(second, axes)
            return self._accept(grads, sam_grads, sharpness, state, params, sample)

        def unsampled() -> _Outcome:
            return self._recall(grads, state)

        outcome = _decision.choose(sample, sampled, unsampled)
        direction = self.reuse.direction(grads, outcome.memory, outcome.weights)
        taken = jnp.asarray(sample, jnp.bool_)
        if sample is not False:
            # Traced, the older memory has taken its place, and norms overflow before
            # gradients do: show that there was one.
            rejected = taken & ~outcome.accepted
            direction = jax.tree.map(
                lambda d: jnp.where(rejected, jnp.nan, d), direction
            )
        if self._stores(state) and sample is True:
            # Not before the direction is made: the older memory is not read for that,
            # and so need not be copied.
            kept = _kept(outcome.accepted, outcome.memory, state.psf)
            outcome = outcome._replace(memory=kept)
        return direction, self._advance(state, outcome, taken)

    def _second_pass(
        self,
        grads: PyTree,
        params: PyTree,
        grad_fn: Callable[[PyTree], tuple[jax.Array, PyTree]],
        step: jax.Array,
        axes: _collectives.Axes,
    ) -> tuple[jax.Array, PyTree]:
        """L(w + ε) − L(w) and ∇L(w + ε), each device's own.

        At ρ = 0 the gradient is ``grads``, to the bit.
        """
        dtype = _numerics.statistics_dtype(params)
        radius = self.rho(step) if callable(self.rho) else self.rho
        radius = jnp.asarray(radius, dtype)
        sharpness, sam_grads = grad_fn(
            perturbations.perturb(
                self.perturbation,
                grads,
                _collectives.own_copy(params, axes),
                radius,
                _checks.resolve_mask('perturb_mask', self.perturb_mask, params),
            )
        )
        # The second pass may round differently from the first.
        at_zero = lambda g, g_sam: jnp.where(radius == 0, g, g_sam)
        sam_grads = jax.tree.map(at_zero, grads, sam_grads)
        return jnp.where(radius == 0, sharpness * 0, sharpness), sam_grads

    def _accept(
        self,
        grads: PyTree,
        sam_grads: PyTree,
        sharpness: jax.Array,
        state: VSAMState,
        params: PyTree,
        sample: bool | jax.Array,
    ) -> _Outcome:
        """What a sample leaves behind: nothing, if it is not finite."""
        dtype = state.budget.dtype
        memory, weights = self.reuse.remember(grads, sam_grads, state.psf)
        measured = _checks.resolve_mask('stats_mask', self.stats_mask, params)
        norm = lambda tree: _numerics.wide_norm(
            perturbations.select(tree, measured), dtype
        )
        grad_norm = norm(grads)
        psf_norm = norm(reuses.psf_of(grads, sam_grads))
        # The norm of the memory sees tensors that stats_mask leaves out, and
        # numbers that overflow in a narrow psf_dtype.
        accepted = (
            jnp.isfinite(grad_norm)
            & jnp.isfinite(psf_norm)
            & jnp.isfinite(_numerics.wide_norm(memory, dtype))
        )
        # Decisions are not differentiated: they are piecewise constant, and the
        # derivative of a norm at zero is not finite.
        grad_norm, psf_norm, sharpness = jax.lax.stop_gradient(
            (grad_norm, psf_norm, sharpness.astype(dtype))
        )
        if self._stores(state) and sample is not True:
            # Inside the branch, so that it is written where the older one was:
            # a conditional copies what is needed after it as it was before.
            memory = _kept(accepted, memory, state.psf)
        observed = self.sampling.observe(state.rings, grad_norm, psf_norm)
        return _Outcome(
            memory=memory,
            weights=weights,
            accepted=accepted,
            rings=_kept(accepted, observed, state.rings),
            grad_norm=_kept(accepted, grad_norm, state.grad_norm),
            psf_norm=_kept(accepted, psf_norm, state.psf_norm),
            sharpness=_kept(accepted, sharpness, state.sharpness),
        )

    def _recall(self, grads: PyTree, state: VSAMState) -> _Outcome:
        """The memory and weights of a step without a second gradient."""
        memory, weights = self.reuse.recall(
            grads,
            state.psf,
            jnp.asarray(optax.safe_increment(state.age)),
            reuses.SampleNorms(state.grad_norm, state.psf_norm),
        )
        return _Outcome(
            memory=memory,
            weights=weights,
            accepted=jnp.zeros((), jnp.bool_),
            rings=state.rings,
            grad_norm=state.grad_norm,
            psf_norm=state.psf_norm,
            sharpness=state.sharpness,
        )

    def _advance(
        self, state: VSAMState, outcome: _Outcome, taken: jax.Array
    ) -> VSAMState:
        """The state of the next update.

        Where a window starts with it, budget and plan are those of that window; the
        plan is a small array, so it is made on every step and selected, which needs
        no conditional.
        """
        rule, accepted = self.sampling, outcome.accepted
        step = _decision.advance(state.step)
        position = (state.position + 1) % rule.window
        starts = (position == 0) & (step >= rule.warmup_steps)
        budget = rule.next_budget(state.budget, outcome.rings)
        plan = rule.plan(budget, (step - rule.warmup_steps) // rule.window)
        rejected = taken & ~accepted
        return VSAMState(
            step=step,
            position=position,
            plan=jnp.where(starts, plan, state.plan),
            budget=jnp.where(starts, budget, state.budget),
            psf=outcome.memory if self._stores(state) else None,
            age=jnp.where(accepted, 0, jnp.asarray(optax.safe_increment(state.age))),
            rings=outcome.rings,
            grad_norm=outcome.grad_norm,
            psf_norm=outcome.psf_norm,
            sharpness=outcome.sharpness,
            sampled=taken,
            num_samples=state.num_samples + taken.astype(jnp.int32),
            num_rejected=state.num_rejected + rejected.astype(jnp.int32),
        )

    def _stores(self, state: VSAMState) -> bool:
        return state.psf is not None


def _kept(accepted: jax.Array, new: PyTree, older: PyTree) -> PyTree:
    """The new tree or, after a sample that cannot be used, the older one."""
    return jax.tree.map(functools.partial(jnp.where, accepted), new, older)


def _pass_of(
    grad_fn: GradFn, updates: PyTree, value: Any, params: PyTree
) -> tuple[jax.Array, PyTree]:
    """L(w + ε) − L(w), NaN where it is not known, and the gradient there."""
    result = grad_fn(params)
    structure = jax.tree.structure(updates)
    sharpness = jnp.full((), jnp.nan)
    is_pair = isinstance(result, tuple) and len(result) == 2
    if (
        is_pair
        and jax.tree.structure(result) != structure
        and jax.tree.structure(result[1]) == structure
    ):
        second, result = result
        if value is None:
            raise ValueError(
                'value must be the loss of the first pass where grad_fn returns'
                ' (value, gradient), got None: pass value=loss, or return the gradient'
                ' alone, as jax.grad does where jax.value_and_grad does not.'
            )
        _check_value('value', value)
        _check_value('the value that grad_fn returns', second)
        first, second = (_numerics.widen(jnp.asarray(x)) for x in (value, second))
        sharpness = second - first
    _checks.same_tree(
        'the result of grad_fn',
        result,
        'the gradient passed to update',
        updates,
        dtypes=True,
    )
    return sharpness, result


def _check_value(name: str, value: Any) -> None:
    if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            f'{name} must be a real scalar, the loss, got an array of shape'
            f' {jnp.shape(value)} and dtype {jnp.result_type(value)}. Does the loss'
            ' function return more (has_aux)? Give the loss alone.'
        )


def _check_per_device(per_device: Any, axis_name: _collectives.AxisName) -> None:
    if _checks.flag('per_device', per_device) and not axis_name:
        raise ValueError(
            f'per_device must be False where axis_name is {axis_name!r}, got True: name'
            ' the axis of shard_map or pmap that runs over the devices.'
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
