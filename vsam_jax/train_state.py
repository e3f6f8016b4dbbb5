"""Flax Linen: a train state and a training step that take the second gradient.

What is easy to get wrong by hand is right by construction here: the second pass
sees the same mini-batch and the same dropout mask as the first one, BatchNorm runs
in training mode in both, and its running statistics come from the first alone. An
overflow of a scaled loss skips the update and leaves no trace.
"""

from collections.abc import Callable
from typing import Any, Protocol, Self

import chex
import jax
import jax.numpy as jnp
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state as flax_train_state
from flax.training.dynamic_scale import DynamicScale

from vsam_jax import _checks, _collectives, _passes
from vsam_jax._types import PyTree
from vsam_jax.state import is_state, states_in, with_own_buffers


class TrainState(flax_train_state.TrainState):
    """Flax's train state, with what a sharpness-aware step needs besides.

    Attributes:
        batch_stats: the running statistics of BatchNorm, or any other mutable
            collections that the forward pass updates; ``{}`` where there are none.
        dropout_key: a PRNG key; every step folds its number into it. None where the
            model draws no random numbers.
        dynamic_scale: flax's dynamic loss scale, for computing in float16; None
            where the loss is not scaled. See :func:`make_train_step`.
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
        """Makes the state of step 0.

        Args:
            apply_fn: usually ``model.apply``.
            params: the parameters.
            tx: the optimizer, such as ``chain(vsam(...), sgd(...))``.
            batch_stats: see the class; None means ``{}``.
            dropout_key: see the class.
            dynamic_scale: see the class.
            **kwargs: further fields of a subclass.

        Returns:
            A new state whose buffers may be donated (those of ``params`` are among
            them).
        """
        if dynamic_scale is not None:
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
        return with_own_buffers(state.replace(step=jnp.zeros((), jnp.int32)))

    def apply_gradients(
        self,
        *,
        grads: PyTree,
        grad_fn: Callable[[PyTree], PyTree] | None = None,
        sample: Any = None,
        **kwargs: Any,
    ) -> Self:
        """One update, as in flax, with the arguments of a sharpness-aware one.

        Args:
            grads: the gradient, a tree like ``params``. Flax's collection
                ``_overwrite_with_gradient`` (the scales of 8-bit floats) is no
                gradient: it replaces that of ``params``, and the optimizer sees the
                collection ``params`` alone.
            grad_fn: maps parameters to the gradient of the same mini-batch.
            sample: whether this step is sampled, see :func:`vsam_jax.vsam`.
            **kwargs: fields to replace, such as ``batch_stats``.

        Returns:
            The state of the next step.
        """
        if _passes.has_overwrites(grads):
            whole = self.params
            trained = self.replace(params=whole['params']).apply_gradients(
                grads=grads['params'],
                grad_fn=grad_fn
                and (lambda p: grad_fn({**whole, 'params': p})['params']),
                sample=sample,
                **kwargs,
            )
            return trained.replace(params={**grads, 'params': trained.params})
        updates, opt_state = self.tx.update(
            grads,
            self.opt_state,
            self.params,
            **_passes.extra_args(self.tx, grad_fn=grad_fn, sample=sample),
        )
        return self.replace(
            step=self.step + 1,
            params=optax.apply_updates(self.params, updates),
            opt_state=opt_state,
            **kwargs,
        )


class LossFn(Protocol):
    """``loss_fn(params, batch_stats, batch, key) -> (loss, (batch_stats, aux))``."""

    def __call__(
        self, params: PyTree, batch_stats: PyTree, batch: Any, key: Any, /
    ) -> tuple[jax.Array, tuple[PyTree, Any]]:
        """Returns the loss, the updated running statistics and anything else."""
        ...


def make_train_step(
    loss_fn: LossFn,
    *,
    num_micro_batches: int = 1,
    axis_name: _collectives.AxisName = None,
) -> Callable[..., tuple[TrainState, Any]]:
    """Builds the training step of a loss that is written once.

    Args:
        loss_fn: ``loss_fn(params, batch_stats, batch, key)`` runs the model in
            training mode on one mini-batch and returns the scalar loss and a pair:
            the updated ``batch_stats`` and anything that the caller of the step
            wants back. ``key`` is for dropout, None if the state has no key.
        num_micro_batches: gradient accumulation: each of the two passes goes through
            the mini-batch in this many equal parts, one after the other, and takes
            the mean of their gradients. There is one update, and at most one second
            gradient of the whole mini-batch. BatchNorm sees one part at a time, each
            part has a dropout mask of its own (the same in both passes), and
            ``aux`` gets a leading axis over the parts.
        axis_name: the mapped axis over the devices, if the step runs once per device
            (``jax.shard_map``, ``jax.pmap``) and the method was given the same
            ``axis_name``. For an optimizer without a method of this package
            gradients are averaged here. Each device has a dropout mask of its own,
            ``batch_stats`` are averaged, and ``aux`` is that of the device's share of
            the mini-batch. BatchNorm normalizes with the share's statistics unless
            the model gives it the axis. None where ``jax.jit`` sees all devices.

    Returns:
        ``train_step(state, batch, *, sample=None) -> (state, aux)``, pure and not
        jitted. ``aux`` comes from the first pass. Give it to
        :class:`vsam_jax.PlannedStep`, or jit it as it is for a traced step. It
        works with any optax optimizer; one that takes no second gradient never
        calls for it. It raises a ``ValueError`` for ``optax.MultiSteps`` around a
        method of this package, whose second gradient would be that of the last part
        alone: ``num_micro_batches`` is for that.

        Where the state has a ``dynamic_scale`` both passes scale the loss with it.
        If one of the two gradients is not finite, parameters, ``batch_stats`` and
        the base optimizer's state stay as they are, the scale is lowered, and the
        sharpness-aware state advances without a trace of that gradient.

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
        >>> state = vsam_jax.TrainState.create(
        ...     apply_fn=model.apply, **variables, dropout_key=jax.random.key(1),
        ...     tx=optax.chain(vsam_jax.vsam(rho=0.05), optax.sgd(0.1)))
        >>> step = vsam_jax.PlannedStep(vsam_jax.make_train_step(loss_fn))
        >>> for _ in range(3):
        ...     state, metrics = step(state, (x, y))
        >>> int(state.step), metrics['loss'].shape
        (3, ())
    """
    num_micro_batches = _passes.micro_batches(num_micro_batches)
    axis_name = _checks.axis_name('axis_name', axis_name)

    def train_step(
        state: TrainState, batch: Any, *, sample: Any = None
    ) -> tuple[TrainState, Any]:
        _passes.check_accumulation(state.opt_state)
        key = state.dropout_key
        if key is not None:
            key = jax.random.fold_in(key, state.step)
            if axis_name is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        passes = _passes.two_passes(
            loss_fn,
            _collectives.own_copy(state.params, axis_name),
            _collectives.own_copy(state.batch_stats, axis_name),
            batch,
            key,
            num_micro_batches=num_micro_batches,
            dynamic_scale=state.dynamic_scale,
        )
        grads = passes.grads
        if _passes.has_overwrites(grads):
            # Sizes that were seen: over all devices the largest ones count.
            seen = _collectives.largest(grads[OVERWRITE_WITH_GRADIENT], axis_name)
            grads = {**grads, OVERWRITE_WITH_GRADIENT: seen}
        # The methods of this package average for themselves, others know no devices.
        plain = not states_in(state.opt_state)
        new_state = state.apply_gradients(
            grads=_collectives.mean(grads, axis_name if plain else None),
            # What is not perturbed is still what all devices share.
            grad_fn=lambda p: passes.grad_fn(_collectives.own_copy(p, axis_name)),
            sample=sample,
            batch_stats=_collectives.mean(passes.collections, axis_name),
        )
        if state.dynamic_scale is not None:
            # What overflows on one device is skipped on all of them.
            grads = _collectives.mean(grads, axis_name)
            new_state = _skip_overflow(state, new_state, grads)
        return new_state, passes.aux

    return train_step


def _skip_overflow(old: TrainState, new: TrainState, grads: PyTree) -> TrainState:
    """Takes back the update if it was made from a gradient that is not finite."""
    finite = jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
    # The direction itself does not tell: the sign of an infinity is finite.
    finite &= _num_rejected(new.opt_state) == _num_rejected(old.opt_state)

    def keep(new_leaf: Any, old_leaf: Any) -> Any:
        if is_state(new_leaf):
            return new_leaf  # It knows what to reject, and has to advance.
        return jnp.where(finite, new_leaf, old_leaf)

    params, batch_stats, opt_state = jax.tree.map(
        keep,
        (new.params, new.batch_stats, new.opt_state),
        (old.params, old.batch_stats, old.opt_state),
        is_leaf=is_state,
    )
    return new.replace(
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        dynamic_scale=_next_scale(old.dynamic_scale, finite),
    )


def _num_rejected(opt_state: PyTree) -> jax.Array | int:
    return sum(state.num_rejected for state in states_in(opt_state))


def _next_scale(dynamic_scale: Any, finite: jax.Array) -> DynamicScale:
    """The loss scale after a step; flax has its rule inside ``value_and_grad``."""
    outcome = lambda x: x * jnp.where(finite, 1, jnp.nan)
    return dynamic_scale.value_and_grad(outcome)(jnp.ones(())).dynamic_scale
