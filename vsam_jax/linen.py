"""Flax Linen: a train state and a training step that take the second gradient.

They get right what is easy to get wrong by hand. Both passes see the same mini-batch
and the same dropout mask. BatchNorm runs in training mode in both, and takes its
running statistics from the first alone. If a scaled loss overflows, the update is
skipped and the state is not affected.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import chex
import jax
import jax.numpy as jnp
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state as flax_train_state
from flax.training.dynamic_scale import DynamicScale

from vsam_jax import _buffers, _checks, _collectives
from vsam_jax._state import states_in
from vsam_jax._step import Begun, Builder, of_two, takes_extra_args
from vsam_jax._types import PyTree

__all__ = ['LossFn', 'TrainState', 'make_train_step']


class TrainState(flax_train_state.TrainState):
    """Flax's train state with the extra fields of a sharpness-aware step.

    Attributes:
        batch_stats: the running statistics of BatchNorm, or any other mutable
            collections that the forward pass updates; ``{}`` if there are none.
        dropout_key: a PRNG key, into which every step folds its number. None if the
            model draws no random numbers.
        dynamic_scale: Flax's dynamic loss scale, for float16 computation. None if the
            loss is not scaled. See :func:`make_train_step`.
    """

    batch_stats: Any
    dropout_key: chex.PRNGKey | None
    dynamic_scale: DynamicScale | None

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        params: PyTree,
        tx: optax.GradientTransformation,
        batch_stats: PyTree | None = None,
        dropout_key: chex.PRNGKey | None = None,
        dynamic_scale: DynamicScale | None = None,
        **kwargs: Any,
    ) -> Self:
        """Creates the state of step 0.

        Args:
            apply_fn: usually ``model.apply``.
            params: the parameters.
            tx: the optimizer, such as ``chain(vsam(...), sgd(...))``.
            batch_stats: as in the class; None means ``{}``.
            dropout_key: as in the class.
            dynamic_scale: as in the class.
            **kwargs: further fields of a subclass.

        Returns:
            A new state whose buffers can be donated. Donating it also consumes
            ``params``, since the state shares their buffers.
        """
        _check_key(dropout_key)
        if dynamic_scale is not None:
            _checks.instance(
                'dynamic_scale', dynamic_scale, DynamicScale, 'DynamicScale()'
            )
            # Arrays from the start: Python numbers would compile the step twice.
            dynamic_scale = dynamic_scale.replace(
                fin_steps=jnp.asarray(dynamic_scale.fin_steps, jnp.int32),
                scale=jnp.asarray(dynamic_scale.scale, jnp.float32),
            )
        state = super().create(
            apply_fn=apply_fn,
            params=params,
            tx=tx,
            batch_stats={} if batch_stats is None else batch_stats,
            dropout_key=dropout_key,
            dynamic_scale=dynamic_scale,
            **kwargs,
        )
        return _buffers.with_own_buffers(state.replace(step=jnp.zeros((), jnp.int32)))

    def apply_gradients(
        self,
        *,
        grads: PyTree,
        grad_fn: Callable[[PyTree], PyTree] | None = None,
        sample: Any = None,
        axis_name: _collectives.AxisName = None,
        per_device: bool = False,
        value: Any = None,
        value_fn: Callable[[PyTree], jax.Array] | None = None,
        psf_grad_fn: Callable[[PyTree], PyTree] | None = None,
        psf_share: float | None = None,
        **kwargs: Any,
    ) -> Self:
        """Applies one update, as in Flax, and passes the second gradient on.

        Args:
            grads: the gradient, a tree like ``params``. Flax's collection
                ``_overwrite_with_gradient`` (the scales of 8-bit floats) is not a
                gradient: its values replace those in ``params``, and the optimizer sees
                only the collection ``params``.
            grad_fn: maps parameters to the gradient on the same mini-batch, or to
                ``(value, gradient)`` if ``value`` is given.
            sample: whether to sample this step, see :func:`vsam_jax.vsam`.
            axis_name: the mapped axis to average over, see :func:`vsam_jax.vsam`.
            per_device: whether each device makes its own perturbation, see
                :func:`vsam_jax.vsam`.
            value: the loss, for optimizers that use it.
            value_fn: maps parameters to the loss on the same mini-batch, for line
                searches.
            psf_grad_fn: like ``grad_fn`` but on a slice of the mini-batch, see
                :func:`vsam_jax.vsam`.
            psf_share: the share of that slice, for methods that check it
                (:func:`vsam_jax.lean_sam`).
            **kwargs: fields to replace, such as ``batch_stats``.

        Returns:
            The state of the next step.
        """
        told = {
            'grad_fn': grad_fn,
            'sample': sample,
            'axis_name': axis_name,
            'per_device': per_device or None,
            'value': value,
            'value_fn': value_fn,
            'psf_grad_fn': psf_grad_fn,
            'psf_share': psf_share,
        }
        told = {name: x for name, x in told.items() if x is not None}
        if isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads:
            whole = self.params
            of_whole = lambda p: {**whole, 'params': p}
            if grad_fn is not None:
                told['grad_fn'] = lambda p: _of_params(grad_fn(of_whole(p)))
            if psf_grad_fn is not None:
                told['psf_grad_fn'] = lambda p: _of_params(psf_grad_fn(of_whole(p)))
            if value_fn is not None:
                # Keeps the signature, which line searches inspect.
                told['value_fn'] = functools.wraps(value_fn)(
                    lambda p, **others: value_fn(of_whole(p), **others)
                )
            inner = self.replace(params=whole['params'])
            trained: Any = TrainState.apply_gradients(
                inner, grads=grads['params'], **told, **kwargs
            )
            return trained.replace(params={**grads, 'params': trained.params})
        if not states_in(self.opt_state):
            # A method averages by itself; other optimizers do not.
            grads = _collectives.mean(grads, _collectives.axes_of(axis_name))
        if value is not None:
            told |= {'grad': grads}
        updates, opt_state = self.tx.update(
            grads,
            self.opt_state,
            self.params,
            **(told if takes_extra_args(self.tx) else {}),
        )
        return self.replace(
            step=self.step + 1,
            params=optax.apply_updates(self.params, updates),
            opt_state=opt_state,
            **kwargs,
        )


def _of_params(result: PyTree) -> PyTree:
    """The true gradient: the collection ``params``, also of (value, gradient)."""
    if isinstance(result, tuple):
        value, grads = result
        return value, grads['params']
    return result['params']


class LossFn(Protocol):
    """``loss_fn(params, batch_stats, batch, key) -> (loss, (batch_stats, aux))``."""

    def __call__(
        self, params: PyTree, batch_stats: PyTree, batch: Any, key: Any, /
    ) -> tuple[jax.Array, tuple[PyTree, Any]]:
        """Returns the loss, the updated running statistics and any other results."""
        ...


def make_train_step(
    loss_fn: LossFn,
    *,
    num_micro_batches: int = 1,
    axis_name: _collectives.AxisName = None,
    per_device: bool = False,
    psf_share: float = 1,
) -> Callable[..., tuple[TrainState, Any]]:
    """Builds a training step from a loss function.

    You write the loss once; the step runs it for both gradients. The state is a
    :class:`TrainState`, Flax's or your own class. If it lacks ``batch_stats``,
    ``dropout_key`` or ``dynamic_scale``, these count as ``{}``, None and None.
    Optimizers that use the loss (line searches, ``reduce_on_plateau``) get it as
    ``value``, along with ``value_fn`` and ``grad``.

    Args:
        loss_fn: ``loss_fn(params, batch_stats, batch, key)`` runs the model in
            training mode on one mini-batch. It returns the scalar loss and a pair:
            the updated ``batch_stats``, and ``aux``, anything that the caller of the
            step needs. ``key`` is for dropout; it is None if the state has no key.
        num_micro_batches: the number of micro-batches for gradient accumulation. Each
            of the two passes processes them one after the other and takes the mean of
            their gradients. There is one update, and at most one second gradient, of
            the whole mini-batch. BatchNorm sees one micro-batch at a time. Each
            micro-batch has its own dropout mask, the same in both passes. ``aux`` gets
            a leading axis over the micro-batches.
        axis_name: the mapped axis over the devices, if the step runs once per device
            (``jax.shard_map``, ``jax.pmap``). Gradients and ``batch_stats`` are
            averaged over it. Each device has its own dropout mask, and ``aux`` is that
            of the device's share of the mini-batch. BatchNorm normalizes with the
            statistics of that share, unless the model passes it the axis. Use None
            where ``jax.jit`` sees all devices, and ``()`` where each device trains its
            own model.
        per_device: whether each device makes its own perturbation, see
            :func:`vsam_jax.vsam`. Needs ``axis_name``.
        psf_share: 1/k, the share of the mini-batch on which a sampled step measures the
            PSF: every k-th example along each array's leading axis. 1 takes the whole
            mini-batch. At 1/4 a sampled step costs two extra gradients of a quarter of
            the mini-batch, instead of one extra gradient of the whole. See *From a
            slice of the mini-batch* in :func:`vsam_jax.vsam`. k must divide the leading
            axes; on several devices, each device's share of them. This is checked on
            meshes with Explicit axes and under ``axis_name``. On Auto axes, a k that
            does not divide moves examples between devices. BatchNorm normalizes with
            the slice's statistics in both of its passes, and does not update the
            running ones. With ``num_micro_batches`` the slice is every k-th
            micro-batch, if k divides their number. It never processes more examples at
            a time than one micro-batch has.

    Returns:
        ``train_step(state, batch, *, sample=None) -> (state, aux)``, a pure function.
        It is not jitted: use ``jax.jit(train_step, donate_argnums=0)``, or pass it to
        :class:`vsam_jax.PlannedStep`. ``aux`` comes from the first pass. It works with
        any optax optimizer; only the methods of this package get ``grad_fn``. It raises
        a ``ValueError`` for ``optax.MultiSteps`` around a method of this package, since
        the second gradient would cover only the last mini-step. Use
        ``num_micro_batches`` instead.

        If the state has a ``dynamic_scale``, both passes scale the loss with it. If
        either gradient is not finite, parameters, ``batch_stats`` and the base
        optimizer's state stay as they are, and the scale is lowered. The
        sharpness-aware state advances, but rejects the sample.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, vsam_jax
        >>> class Model(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        ...         x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        ...         return nn.Dense(1)(x)
        >>> model = Model()
        >>> def loss_fn(params, batch_stats, batch, key):
        ...     x, y = batch
        ...     out, updated = model.apply(
        ...         {'params': params, 'batch_stats': batch_stats}, x, train=True,
        ...         rngs={'dropout': key}, mutable=['batch_stats'])
        ...     loss = jnp.mean((out - y) ** 2)
        ...     return loss, (updated['batch_stats'], {'loss': loss})
        >>> x, y = jnp.ones((4, 3)), jnp.ones((4, 1))
        >>> variables = model.init(jax.random.key(0), x, train=False)
        >>> state = vsam_jax.linen.TrainState.create(
        ...     apply_fn=model.apply, **variables, dropout_key=jax.random.key(1),
        ...     tx=optax.chain(vsam_jax.vsam(rho=0.05), optax.sgd(0.1)))
        >>> step = jax.jit(vsam_jax.linen.make_train_step(loss_fn), donate_argnums=0)
        >>> for _ in range(3):
        ...     state, metrics = step(state, (x, y))
        >>> int(state.step), metrics['loss'].shape
        (3, ())
    """
    builder = Builder(
        num_micro_batches,
        axis_name,
        per_device,
        psf_share,
        overwrites=OVERWRITE_WITH_GRADIENT,
    )

    if not callable(loss_fn):
        raise TypeError(f'loss_fn must be a function, got {_checks.shown(loss_fn)}.')

    def train_step(
        state: flax_train_state.TrainState, batch: Any, *, sample: Any = None
    ) -> tuple[Any, Any]:
        _check_state(state)
        dynamic_scale = getattr(state, 'dynamic_scale', None)
        begun = builder.begin(
            _checked(loss_fn),
            state.params,
            state.opt_state,
            getattr(state, 'batch_stats', {}),
            batch,
            _key_of(state, builder.axes),
            sample=sample,
            dynamic_scale=dynamic_scale,
        )
        new = _updated(state, begun)
        if dynamic_scale is not None:
            parts, dynamic_scale = builder.settle(
                begun, _parts(state), _parts(new), dynamic_scale
            )
            new = new.replace(dynamic_scale=dynamic_scale, **parts)
        return new, begun.aux

    return train_step


def _checked(loss_fn: LossFn) -> LossFn:
    """The loss function with a check of its result."""
    wanted = '(loss, (batch_stats, aux))'

    def checked(
        params: PyTree, batch_stats: PyTree, batch: Any, key: Any
    ) -> tuple[jax.Array, tuple[PyTree, Any]]:
        result = loss_fn(params, batch_stats, batch, key)
        loss, others = of_two('the result of loss_fn', result, wanted)
        new, aux = of_two('the second value of loss_fn', others, 'as in ' + wanted)
        _check_statistics(batch_stats, new, aux)
        return loss, (new, aux)

    return checked


def _check_statistics(old: PyTree, new: PyTree, aux: Any) -> None:
    """Raises if something else was returned in the place of running statistics."""
    places = lambda tree: [
        _checks.where(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    before, after = places(old), places(new)
    lost = [name for name in before if name not in after]
    problem = ''
    if lost:
        problem = f'it lacks {lost[0]}, which the state has'
    elif after and not before and isinstance(aux, Mapping) and not aux:
        problem = 'the state has none, and aux is what the state has'
    if problem:
        raise ValueError(
            'loss_fn must return (loss, (batch_stats, aux)), in this order, with the'
            f' running statistics as the state has them, but of batch_stats {problem}.'
        )


def _check_key(key: Any) -> None:
    if key is None or jnp.issubdtype(getattr(key, 'dtype', int), jax.dtypes.prng_key):
        return
    if jnp.shape(key) == () or jnp.result_type(key) != jnp.uint32:
        raise TypeError(
            'dropout_key must be a key of random numbers, such as jax.random.key(0), or'
            f' None, got {_checks.shown(key)}.'
        )


def _key_of(state: Any, axes: _collectives.Axes) -> jax.Array | None:
    """The random key of this step, different on each device."""
    key = getattr(state, 'dropout_key', None)
    if key is None:
        return None
    return _collectives.own_key(jax.random.fold_in(key, state.step), axes)


def _parts(state: Any) -> dict[str, PyTree]:
    """The fields that an overflow leaves unchanged."""
    names = ('params', 'batch_stats', 'opt_state')
    return {name: getattr(state, name) for name in names if hasattr(state, name)}


def _updated(state: Any, begun: Begun) -> Any:
    """The state after the update, of whatever class it is."""
    fields: dict[str, Any] = {}
    if hasattr(state, 'batch_stats'):
        fields['batch_stats'] = begun.collections
    elif jax.tree.leaves(begun.collections):
        raise ValueError(
            'state must have a field batch_stats for what loss_fn returned in its'
            f' place, but {type(state).__name__} has none: use'
            ' vsam_jax.linen.TrainState, or add the field to your own class.'
        )
    if isinstance(state, TrainState):
        apply = state.apply_gradients
    elif type(state).apply_gradients is flax_train_state.TrainState.apply_gradients:
        # Flax's own apply_gradients passes no extra arguments to the optimizer.
        apply = functools.partial(TrainState.apply_gradients, state)
    elif not {'grad_fn', 'psf_grad_fn'} & set(begun.arguments):
        return state.apply_gradients(grads=begun.grads, **fields)
    else:
        raise TypeError(
            f'state must pass grad_fn on to the optimizer, but {type(state).__name__}'
            " has an apply_gradients of its own, written for Flax's: derive it from"
            ' vsam_jax.linen.TrainState and hand all keyword arguments on,'
            ' super().apply_gradients(grads=grads, **kwargs).'
        )
    new = apply(grads=begun.grads, **fields, **begun.arguments)
    if fields and new.batch_stats is not begun.collections:
        _check_kept(state, new)
    return new


def _check_kept(state: Any, new: Any) -> None:
    """Raises if a subclass dropped the fields that it should replace."""
    old = jax.tree.leaves(state.batch_stats)
    if old and all(map(operator.is_, old, jax.tree.leaves(new.batch_stats))):
        raise TypeError(
            f'state must take the new batch_stats, but apply_gradients of'
            f' {type(state).__name__} dropped them: hand all keyword arguments on,'
            ' super().apply_gradients(grads=grads, **kwargs).'
        )


def _check_state(state: Any) -> None:
    missing = [
        name
        for name in ('params', 'opt_state', 'tx', 'step', 'replace')
        if not hasattr(state, name)
    ]
    if missing:
        raise TypeError(
            "state must be a vsam_jax.linen.TrainState, or one of Flax's or your own"
            f' with the same fields, got {type(state).__name__} without'
            f' {", ".join(missing)}. In a loop of your own call tx.update(grads,'
            ' opt_state, params, grad_fn=...) instead.'
        )
