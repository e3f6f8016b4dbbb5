r"""The update that all methods of the family share.

A method makes three choices: where the second gradient is taken
(:mod:`vsam_jax.perturbation`), when it is taken (:mod:`vsam_jax.sampling`) and how an
old one is reused (:mod:`vsam_jax.reuse`). This module combines any three of them into
an optax transformation. It does not depend on particular ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsam_jax import (
    _checks,
    _collectives,
    _decision,
    _dependence,
    _numerics,
    _places,
    _portions,
)
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
    share: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds a method from a perturbation, a sampling rule and a reuse rule.

    Take it to write your own method. Put the result first in ``optax.chain``, before
    the optimizer. On its own it returns a direction that goes uphill, as a gradient
    does.

    The named methods (:func:`vsam_jax.vsam` and its relatives) all call this function.
    Their docstrings describe ``init`` and ``update``.

    Args:
        perturbation: where the second gradient is taken.
        sampling: when it is taken.
        reuse: how an old one is reused.
        rho: ρ, as in :func:`vsam_jax.vsam`.
        stats_mask: the tensors over which the statistics take their norms, as in
            :func:`vsam_jax.vsam`.
        perturb_mask: the tensors to perturb, as in :func:`vsam_jax.vsam`.
        psf_dtype: the dtype in which the memory is stored, as in
            :func:`vsam_jax.vsam`.
        share: 1/k, the share of the mini-batch for which the radius is meant. An update
            whose second gradient is taken on another share raises an error. None allows
            any.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs` with state
        :class:`vsam_jax.VSAMState`.

    Raises:
        TypeError, ValueError: for invalid rules, masks, radii or dtypes.

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
    perturbations.check(perturbation)
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
        parts=None if share is None else _portions.parts_of(share, 'share'),
    )
    # optax types states as array trees, which a NamedTuple of arrays is.
    return optax.GradientTransformationExtraArgs(method.init, method.update)  # pyright: ignore[reportArgumentType]


# The keyword arguments of an update.
_ARGUMENTS = (
    'grad_fn',
    'sample',
    'axis_name',
    'per_device',
    'value',
    'psf_grad_fn',
    'psf_share',
)


class _Outcome(NamedTuple):
    """The result of both branches of an update, sampled and not.

    Nothing else passes through a conditional.
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
    """A choice of where, when and how, and the code that all choices share."""

    perturbation: Perturbation
    sampling: SamplingRule
    reuse: ReuseRule
    rho: Radius
    stats_mask: Mask | None
    perturb_mask: Mask | None
    psf_dtype: DTypeLike
    parts: int | None

    def init(self, params: PyTree) -> VSAMState:
        """The state before the first update."""
        _checks.floating_leaves('params', params)
        _checks.resolve_mask('stats_mask', self.stats_mask, params)
        _checks.resolve_mask('perturb_mask', self.perturb_mask, params)
        dtype = _numerics.statistics_dtype(params)
        rule = self.sampling
        _check_rule(rule)
        rings = rule.init_rings(dtype)
        budget = _budget(rule, rule.init_budget(dtype), dtype)
        if rule.warmup_steps == 0:
            budget = _budget(rule, rule.next_budget(budget, rings), dtype)
            plan = _plan(rule, budget, jnp.zeros((), jnp.int32))
        else:
            plan = jnp.ones((rule.window,), jnp.bool_)
        return VSAMState(
            step=jnp.zeros((), jnp.int32),
            # Windows start at step W. Counted backwards, they cover the warm-up too.
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
            perturbation_memory=perturbations.init(self.perturbation, params),
            sampling_memory=rule.init_memory(dtype),
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
        psf_grad_fn: GradFn | None = None,
        psf_share: float | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, VSAMState]:
        """Returns the direction and the next state, see :func:`vsam_jax.vsam`."""
        _checks.no_misspelling(extra_args, _ARGUMENTS)
        _places.check_method(sample_is_told=sample is not None)
        axes = _collectives.axes_of(axis_name)
        _collectives.check_per_device(per_device, axis_name)
        if sample is not False:
            self._check_slice(grad_fn, psf_grad_fn, psf_share)
        source = _Source('grad_fn', grad_fn)
        if psf_grad_fn is not None:
            source = _Source('psf_grad_fn', psf_grad_fn)
        _check_update(updates, state, params, source, sample)
        self._check_state(state, params, per_device)
        _collectives.check_told(axis_name, 'the gradient', updates, params)
        _collectives.check_own('updates', updates, axes)
        # From here on all numbers, the plan included, are the same on all devices,
        # except those that go into and come out of the second pass.
        grads = _collectives.mean(updates, axes)
        before = state
        state, rule = self._observe(grads, params, before)
        sample = _decision.resolve(sample, rule, always=self.sampling.always)

        def sampled() -> _Outcome:
            own = _collectives.own_copy(params, axes)
            is_slice, first = psf_grad_fn is not None, _Pass(value, updates)
            if is_slice:
                first = _pass_of(source, updates, own)
            two = self._two_passes(first, source, own, before, axes, per_device)
            return self._accept(grads, two, state, params, sample, is_slice)

        def unsampled() -> _Outcome:
            return self._recall(grads, state)

        outcome = _decision.choose(sample, sampled, unsampled)
        direction = self.reuse.direction(grads, outcome.memory, outcome.weights)
        taken = jnp.asarray(sample, jnp.bool_)
        if sample is not False:
            # In a traced step the older memory has replaced a rejected one, and norms
            # overflow before gradients do. NaN shows that the sample was rejected.
            rejected = taken & ~outcome.accepted
            direction = jax.tree.map(
                lambda d: jnp.where(rejected, jnp.nan, d), direction
            )
        if self._stores(state) and sample is True:
            # After the direction, which does not read the older memory. So that memory
            # need not be copied.
            kept = _kept(outcome.accepted, outcome.memory, state.psf)
            outcome = outcome._replace(memory=kept)
        return direction, self._advance(state, outcome, taken)

    def _observe(
        self, grads: PyTree, params: PyTree, state: VSAMState
    ) -> tuple[VSAMState, Callable[[], jax.Array]]:
        """Updates the memories of perturbation and sampling rule with the gradient.

        A gradient that is not finite leaves them unchanged.

        Returns:
            The state with these memories, and a function that decides whether the step
            is sampled.
        """
        decided, rule = lambda: state.plan[state.position], self.sampling
        if state.perturbation_memory is not None:
            mask = _checks.resolve_mask('perturb_mask', self.perturb_mask, params)
            memory = perturbations.observe(
                self.perturbation, grads, params, state.perturbation_memory, mask
            )
            if problem := _checks.difference(memory, state.perturbation_memory):
                raise ValueError(
                    'observe of the perturbation must return a memory like the one that'
                    f' init made: {problem}'
                )
            finite = jnp.isfinite(_numerics.wide_norm(grads))
            memory = _kept(finite, memory, state.perturbation_memory)
            state = state._replace(perturbation_memory=memory)
        if state.sampling_memory is not None:
            norm = jax.lax.stop_gradient(self._norm(params, state)(grads))
            wanted, memory = rule.decide(state.sampling_memory, norm)
            if problem := _checks.difference(memory, state.sampling_memory):
                raise ValueError(
                    f'decide of sampling ({type(rule).__name__}) must return a memory'
                    f' like the one that init_memory made: {problem}'
                )
            finite = jnp.isfinite(norm)
            memory = _kept(finite, memory, state.sampling_memory)
            state = state._replace(sampling_memory=memory)
            decided = lambda: (wanted & finite) | (state.step < rule.warmup_steps)
        return state, decided

    def _two_passes(
        self,
        first: '_Pass',
        source: '_Source',
        params: PyTree,
        state: VSAMState,
        axes: _collectives.Axes,
        per_device: bool,
    ) -> '_Sample':
        """Runs the second pass on the examples of the first, and combines both.

        Args:
            first: each device's own first pass.
            source: runs another pass.
            params: w, each device's own copy.
            state: the state before this update.
            axes: the axes to average over.
            per_device: whether ε comes from each device's own gradient.

        Returns:
            The means over all devices. At ρ = 0 both gradients have the same bits.
        """
        dtype = _numerics.statistics_dtype(params)
        radius = _checks.current_radius('rho', self.rho, state.step, dtype)
        grads = _collectives.mean(first.grads, axes)
        mask = _checks.resolve_mask('perturb_mask', self.perturb_mask, params)
        ascent = first.grads if per_device else grads
        perturbed = perturbations.perturb(
            self.perturbation, ascent, params, radius, mask, state.perturbation_memory
        )
        second = _pass_of(source, first.grads, perturbed)
        rise = _rise(source.name, first.value, second.value)
        _check_second(source.name, second.grads, first.grads, params)
        # The second pass may round differently from the first.
        at_zero = functools.partial(_numerics.first_at_zero, radius)
        sam_grads = jax.tree.map(at_zero, first.grads, second.grads)
        return _Sample(
            grads=grads,
            sam_grads=_collectives.mean(sam_grads, axes),
            sharpness=_collectives.mean(jnp.where(radius == 0, 0 * rise, rise), axes),
        )

    def _accept(
        self,
        grads: PyTree,
        two: '_Sample',
        state: VSAMState,
        params: PyTree,
        sample: bool | jax.Array,
        is_slice: bool,
    ) -> _Outcome:
        """The outcome of a sample; one that is not finite changes nothing."""
        dtype = state.budget.dtype
        psf = reuses.psf_of(two.grads, two.sam_grads)
        first, second = two.grads, two.sam_grads
        if is_slice and not self._stores(state):
            # Rules that store no difference use g_SAM, which here is g + s.
            first = grads
            second = jax.tree.map(
                lambda g, s: _numerics.add_scaled(g, 1, s), grads, psf
            )
        memory, weights = self.reuse.remember(first, second, state.psf)
        norm = self._norm(params, state)
        grad_norm, psf_norm = norm(grads), norm(psf)
        own_norm = norm(two.grads) if is_slice else grad_norm
        # The norm of the memory also covers tensors outside stats_mask, and numbers
        # that overflow in a narrow psf_dtype.
        norms = [grad_norm, own_norm, psf_norm, _numerics.wide_norm(memory, dtype)]
        accepted = jnp.isfinite(jnp.stack(norms)).all()
        # Decisions are not differentiated: they are piecewise constant. Weights that
        # follow from these norms (SteadyDifference) count as constants too.
        grad_norm, own_norm, psf_norm, sharpness = jax.lax.stop_gradient(
            (grad_norm, own_norm, psf_norm, two.sharpness.astype(dtype))
        )
        if self._stores(state) and sample is not True:
            # Selected inside the branch, so that the result can reuse the buffer of
            # the older memory: a conditional copies any input that is used after it.
            memory = _kept(accepted, memory, state.psf)
        observed = self.sampling.observe(state.rings, own_norm, psf_norm)
        return _Outcome(
            memory=memory,
            weights=weights,
            accepted=accepted,
            rings=_kept(accepted, observed, state.rings),
            grad_norm=_kept(accepted, grad_norm, state.grad_norm),
            psf_norm=_kept(accepted, psf_norm, state.psf_norm),
            sharpness=_kept(
                accepted & jnp.isfinite(sharpness), sharpness, state.sharpness
            ),
        )

    def _recall(self, grads: PyTree, state: VSAMState) -> _Outcome:
        """The outcome of a step without a second gradient."""
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

        If that update starts a window, budget and plan are those of the new window. The
        plan is a small array, so it is computed on every step and selected. This needs
        no conditional.
        """
        rule, accepted = self.sampling, outcome.accepted
        step = _decision.advance(state.step)
        position = (state.position + 1) % rule.window
        starts = (position == 0) & (step >= rule.warmup_steps)
        budget = rule.next_budget(state.budget, outcome.rings)
        budget = _budget(rule, budget, state.budget.dtype)
        plan = _plan(rule, budget, (step - rule.warmup_steps) // rule.window)
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
            perturbation_memory=state.perturbation_memory,
            sampling_memory=state.sampling_memory,
        )

    def _norm(self, params: PyTree, state: VSAMState) -> Callable[[PyTree], jax.Array]:
        """The norm over the tensors of ``stats_mask``, for the statistics."""
        measured = _checks.resolve_mask('stats_mask', self.stats_mask, params)
        return lambda tree: _numerics.wide_norm(
            perturbations.select(tree, measured), state.budget.dtype
        )

    def _check_slice(
        self,
        grad_fn: GradFn | None,
        psf_grad_fn: GradFn | None,
        psf_share: float | None,
    ) -> None:
        # A function of vsam_jax.nnx.value_and_grad knows its share.
        if psf_grad_fn is None and getattr(grad_fn, 'psf_share', 1) != 1:
            raise ValueError(
                'grad_fn must take the gradient of the whole mini-batch, got one with'
                f' psf_share={grad_fn.psf_share:g}: pass it as psf_grad_fn.'  # pyright: ignore
            )
        if psf_share is None:
            psf_share = getattr(psf_grad_fn, 'psf_share', None)
        given = None if psf_share is None else _portions.parts_of(psf_share)
        if given not in (None, 1) and psf_grad_fn is None:
            raise ValueError(
                'psf_share must not be given without psf_grad_fn, of which it says'
                f' the share, got psf_share=1/{given}: update cuts no mini-batch.'
                ' Give psf_grad_fn, the gradient of that share of the examples.'
            )
        if self.parts is not None:
            parts = given or (1 if psf_grad_fn is None else self.parts)
            if parts != self.parts:
                part = 'the whole' if parts == 1 else f'1/{parts} of the'
                raise ValueError(
                    f'The method has share=1/{self.parts}, but its second gradient is'
                    f' taken of {part} mini-batch. By hand give psf_grad_fn, the'
                    ' gradient of those examples; a builder takes'
                    f' psf_share=1/{self.parts}.'
                )
        if psf_grad_fn is not None and not self.reuse.takes_slices:
            raise ValueError(
                f'psf_grad_fn must not be given to {type(self.reuse).__name__}'
                ' (looksam), whose memory is the part of g_SAM orthogonal to g: for'
                ' gradients of different examples it is meaningless. Leave it'
                ' out (psf_share=1), or take steady_vsam.'
            )

    def _memories(self, params: PyTree) -> dict[str, PyTree]:
        """The parts of an initial state that differ between methods."""
        dtype = _numerics.statistics_dtype(params)
        return {
            'plan': jnp.zeros((self.sampling.window,), jnp.bool_),
            'psf': self.reuse.init(params, self.psf_dtype),
            'rings': self.sampling.init_rings(dtype),
            'perturbation_memory': perturbations.init(self.perturbation, params),
            'sampling_memory': self.sampling.init_memory(dtype),
        }

    def _check_state(self, state: VSAMState, params: PyTree, per_device: bool) -> None:
        """Raises for a state of another method, other settings or other parameters."""
        for name, like in jax.eval_shape(self._memories, params).items():
            found = getattr(state, name)
            if problem := _checks.difference(found, like):
                raise ValueError(
                    f'state must be that of this method, with these settings and for'
                    f' these parameters, but its {name} differs: {problem} Make it by'
                    ' tx.init(params) of the same optimizer.'
                )
        dtype = jnp.result_type(state.budget)
        if isinstance(state.budget, jax.ShapeDtypeStruct):
            raise TypeError(
                'state must hold arrays, got the shapes and dtypes that jax.eval_shape'
                ' makes: run tx.init(params), or restore into them.'
            )
        if (known := jax.dtypes.canonicalize_dtype(dtype)) != dtype:
            raise TypeError(
                f'state must hold its statistics in {known}, got {dtype}:'
                ' jax_enable_x64 was on when tx.init made it, and is off now. Turn it'
                ' on, or make the state again.'
            )
        if _numerics.wide_dtype(dtype) != dtype:
            raise TypeError(
                'state must hold its statistics in float32 or wider, got'
                f' {dtype}: cast the parameters alone, and psf_dtype is'
                ' there to store the PSF in fewer bits.'
            )
        if per_device and not getattr(self.perturbation, 'uses_gradient', True):
            raise ValueError(
                'per_device must be False for a perturbation that does not depend on'
                ' the gradient of this step (asyncsam), got True: what it keeps is the'
                ' mean over devices, so that ε is the same on all.'
            )

    def _stores(self, state: VSAMState) -> bool:
        return state.psf is not None


def _kept(accepted: jax.Array, new: PyTree, older: PyTree) -> PyTree:
    """The new tree, or the older one if the sample was rejected."""

    def kept(x: jax.Array, old: jax.Array) -> jax.Array:
        # Gradients may be wider than the parameters, but the state keeps its dtypes.
        if jnp.issubdtype(old.dtype, jnp.floating):
            x = x.astype(old.dtype)
        return jnp.where(accepted, x, old)

    return jax.tree.map(kept, new, older)


def _decides(rule: SamplingRule) -> bool:
    """Whether a rule decides from the gradient, without a plan."""
    return type(rule).decide is not SamplingRule.decide


def _check_rule(rule: SamplingRule) -> None:
    """Raises for an invalid user-defined sampling rule."""
    name = f'sampling ({type(rule).__name__})'
    _checks.integer(f'window of {name}', getattr(rule, 'window', None), low=1)
    if _decides(rule) and rule.init_memory(jnp.float32) is None:
        raise ValueError(
            f'{name} must have a method init_memory where it has decide, got none:'
            ' return (), if nothing has to be kept.'
        )


def _plan(rule: SamplingRule, budget: jax.Array, window_index: jax.Array) -> jax.Array:
    """The plan of a window; raises if it is not valid."""
    plan = rule.plan(budget, window_index)
    if jnp.shape(plan) != (rule.window,) or jnp.result_type(plan) != jnp.bool_:
        raise ValueError(
            f'plan of sampling ({type(rule).__name__}) must give a bool array'
            f' [{rule.window}], one number for each step of its window, got'
            f' {jnp.result_type(plan)} of shape {jnp.shape(plan)}.'
        )
    return plan


def _budget(rule: SamplingRule, budget: Any, dtype: DTypeLike) -> jax.Array:
    """The budget of a rule as an array; raises if it is not a scalar."""
    if jnp.shape(budget):
        raise ValueError(
            f'the budget of sampling ({type(rule).__name__}) must be a scalar, got an'
            f' array of shape {jnp.shape(budget)}.'
        )
    return jnp.asarray(budget, dtype)


class _Source(NamedTuple):
    """The function that runs a pass, and the name of the argument that it came in."""

    name: str
    function: GradFn | None


class _Pass(NamedTuple):
    """One pass over some examples: the loss, or None if unknown, and ∇L."""

    value: Any
    grads: PyTree


class _Sample(NamedTuple):
    """∇L(w), ∇L(w + ε) and L(w + ε) − L(w) on the same examples, device means."""

    grads: PyTree
    sam_grads: PyTree
    sharpness: jax.Array


def _pass_of(source: _Source, like: PyTree, params: PyTree) -> _Pass:
    """Runs a pass, whose gradient must look like ``like``."""
    name, function = source
    assert function is not None
    value, grads, structure = None, function(params), jax.tree.structure(like)
    if isinstance(grads, tuple) and len(grads) == 2:
        parts = [jax.tree.structure(x) == structure for x in (grads, *grads)]
        if parts == [False, True, False]:
            raise TypeError(
                f'{name} must return the gradient, or (value, gradient), got a gradient'
                ' and something else, as from jax.grad(loss, has_aux=True): return the'
                ' gradient alone, lambda p: jax.grad(loss, has_aux=True)(p, batch)[0].'
            )
        if not parts[0] and parts[2]:
            value, grads = grads
    _checks.same_tree(
        f'the result of {name}',
        grads,
        'the gradient passed to update',
        like,
        dtypes=True,
    )
    return _Pass(value, grads)


def _check_second(name: str, second: PyTree, first: PyTree, params: PyTree) -> None:
    """Raises if the first gradient was returned instead of a second."""
    if _dependence.is_first_again(second, first, params):
        raise ValueError(
            f'{name} must take the gradient at the parameters that it is given, but'
            ' returned the first gradient, which does not depend on them. Write'
            f' {name}=lambda p: jax.grad(loss)(p, batch).'
        )


def _rise(name: str, first: Any, second: Any) -> jax.Array:
    """L(w + ε) − L(w), or NaN if it is not known."""
    if second is None:
        return jnp.full((), jnp.nan)
    if first is None:
        raise ValueError(
            f'value must be the loss of the first pass where {name} returns'
            ' (value, gradient), got None: pass value=loss, or return the gradient'
            ' alone, as jax.grad does where jax.value_and_grad does not.'
        )
    returned = f'the value that {name} returns'
    # With a slice both are results of the function.
    _check_value(returned if name == 'psf_grad_fn' else 'value', first)
    _check_value(returned, second)
    first, second = (_numerics.widen(jnp.asarray(x)) for x in (first, second))
    return second - first


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, (tuple, list, dict)):
        raise TypeError(
            f'{name} must be a real scalar, the loss, got a {type(value).__name__}.'
            ' jax.value_and_grad(loss, has_aux=True) returns ((loss, aux), gradient):'
            ' give value=loss, and let grad_fn return (loss, gradient).'
        )
    if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            f'{name} must be a real scalar, the loss, got an array of shape'
            f' {jnp.shape(value)} and dtype {jnp.result_type(value)}. Does the loss'
            ' function return more (has_aux)? Give the loss alone.'
        )


def _check_update(
    updates: PyTree,
    state: VSAMState,
    params: PyTree | None,
    source: _Source,
    sample: Any,
) -> None:
    """Raises for invalid arguments of ``update``."""
    if params is None:
        raise ValueError(
            'params must be the parameters, got None: the second gradient is taken'
            ' at params + ε. Call tx.update(grads, state, params, grad_fn=...).'
        )
    if not isinstance(state, VSAMState):
        raise TypeError(_checks.no_state('VSAMState', state))
    if source.function is not None:
        _checks.gradient_function(source.name, source.function, params)
    elif sample is not False:
        raise ValueError(
            'grad_fn must be a function that maps parameters to the gradient of'
            ' the same mini-batch, got None. Call tx.update(grads, state, params,'
            ' grad_fn=lambda p: jax.grad(loss)(p, batch)). Did you give one? Then it'
            " was not passed on. Instead of Flax's TrainState take"
            ' vsam_jax.linen.TrainState. A wrapper that passes no extra arguments on'
            ' (optax.lookahead, MultiSteps.gradient_transformation) goes after this'
            ' method, not around it.'
        )
    _checks.floating_leaves('params', params)
    _checks.same_tree('updates', updates, 'params', params, dtypes=False)
    _checks.floating_leaves('updates', updates)
    if jax.tree.leaves(state.psf):
        _checks.same_tree('the PSF of state', state.psf, 'params', params, dtypes=False)
