"""Flax NNX: a training step that takes the second gradient, traced and planned.

The second pass runs on a copy of the model, made from the arrays before the first
pass: it draws the same dropout mask, and what it does to BatchNorm's running
statistics and to random-number counters is thrown away with the copy. A copy is
also what a conditional needs, inside which no outer module may be changed.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from vsam_jax import _passes
from vsam_jax._types import PyTree
from vsam_jax.dispatch import PlannedStep
from vsam_jax.state import VSAMState, locate_state


def make_nnx_train_step(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Any]],
    *,
    num_micro_batches: int = 1,
) -> Callable[..., Any]:
    """Builds the training step of an NNX model from a loss that is written once.

    Args:
        loss_fn: ``loss_fn(model, batch) -> (loss, aux)`` runs the model, which is in
            training mode, on one mini-batch and may change it (BatchNorm, Rngs).
        num_micro_batches: gradient accumulation, as in
            :func:`vsam_jax.make_train_step`.

    Returns:
        ``train_step(model, optimizer, batch, *, sample=None) -> aux``, not jitted.
        It updates ``model`` and the ``nnx.Optimizer`` in place; ``aux`` comes from
        the first pass. Jit it with ``nnx.jit`` for a traced step, or give it to
        :class:`PlannedNNXStep`. It works with any optax optimizer.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> from flax import nnx
        >>> class Model(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.hidden = nnx.Linear(3, 8, rngs=rngs)
        ...         self.norm = nnx.BatchNorm(8, rngs=rngs)
        ...         self.dropout = nnx.Dropout(0.1, rngs=rngs)
        ...         self.out = nnx.Linear(8, 1, rngs=rngs)
        ...     def __call__(self, x):
        ...         x = nnx.relu(self.norm(self.hidden(x)))
        ...         return self.out(self.dropout(x))
        >>> def loss_fn(model, batch):
        ...     x, y = batch
        ...     loss = jnp.mean((model(x) - y) ** 2)
        ...     return loss, {'loss': loss}
        >>> model = Model(nnx.Rngs(0))
        >>> tx = optax.chain(vsam_jax.vsam(rho=0.05), optax.sgd(0.1))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> train_step = vsam_jax.make_nnx_train_step(loss_fn)
        >>> step = vsam_jax.PlannedNNXStep(train_step)  # or nnx.jit(train_step)
        >>> batch = jnp.ones((4, 3)), jnp.ones((4, 1))
        >>> for _ in range(3):
        ...     metrics = step(model, optimizer, batch)
        >>> int(optimizer.step[...]), metrics['loss'].shape
        (3, ())
    """
    num_micro_batches = _passes.micro_batches(num_micro_batches)

    def train_step(
        model: Any, optimizer: nnx.Optimizer, batch: Any, *, sample: Any = None
    ) -> Any:
        _passes.check_accumulation(optimizer.tx, nnx.as_pure(optimizer.opt_state))
        graphdef, params, others = nnx.split(model, optimizer.wrt, ...)

        def pure_loss(
            params: PyTree, others: PyTree, batch: Any, key: None
        ) -> tuple[jax.Array, tuple[PyTree, Any]]:
            del key  # Random numbers come from the streams among the others.
            copy = nnx.merge(graphdef, params, others)
            loss, aux = loss_fn(copy, batch)
            changed = nnx.split(copy, optimizer.wrt, ...)[2]
            return loss, (nnx.as_pure(changed), aux)

        passes = _passes.two_passes(
            pure_loss,
            nnx.as_pure(params),
            nnx.as_pure(others),
            batch,
            None,
            num_micro_batches=num_micro_batches,
        )
        nnx.update(model, passes.collections)
        # The optimizer picks gradients as it picks parameters: by variable type.
        grads = jax.tree.unflatten(
            jax.tree.structure(params), jax.tree.leaves(passes.grads)
        )
        extra = {'grad_fn': passes.grad_fn, 'sample': sample}
        optimizer.update(model, grads, **_passes.extra_args(optimizer.tx, **extra))
        return passes.aux

    return train_step


class PlannedNNXStep:
    """Runs an NNX training step planned: :class:`vsam_jax.PlannedStep` for modules.

    Calling it takes the place of calling ``nnx.jit(train_step)``: model and optimizer
    are updated in place. The contract of :class:`vsam_jax.PlannedStep` holds.

    Args:
        train_step: ``train_step(model, optimizer, *args, sample) -> anything``, such
            as :func:`make_nnx_train_step` builds; it changes ``model`` and
            ``optimizer`` and passes ``sample`` on to ``optimizer.update``.
        donate_state: whether the buffers of ``model`` and ``optimizer`` are reused
            for their new values. Arrays taken out of them before a call must then
            not be read after it. True by default.
        **jit_options: passed on to :func:`jax.jit`.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`vsam_jax.PlannedStep`.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        *,
        donate_state: bool = True,
        **jit_options: Any,
    ):
        if not callable(train_step):
            raise TypeError(
                'train_step must be a function (model, optimizer, *args, sample) ->'
                f' anything, got {train_step!r}.'
            )

        def pure_step(state: Any, *args: Any, sample: bool) -> tuple[Any, Any]:
            model, optimizer = nnx.merge(*state)
            aux = train_step(model, optimizer, *args, sample=sample)
            return nnx.split((model, optimizer)), aux

        self._step = _PlannedSplitStep(
            pure_step, donate_state=donate_state, **jit_options
        )

    @property
    def num_reads(self) -> int:
        """How many times the plan has been read from the device."""
        return self._step.num_reads

    def __call__(
        self, model: Any, optimizer: Any, *args: Any, sample: bool | None = None
    ) -> Any:
        """Runs one step.

        Args:
            model: the model, updated in place.
            optimizer: an ``nnx.Optimizer``, updated in place.
            *args: passed on to ``train_step``, the batch for instance.
            sample: overrides the plan for this one step.

        Returns:
            What ``train_step`` returns.
        """
        modules = (model, optimizer)
        (_, state), aux = self._step(nnx.split(modules), *args, sample=sample)
        nnx.update(modules, state)
        return aux


class _PlannedSplitStep(PlannedStep):
    """A planned step whose state is ``nnx.split((model, optimizer))``."""

    def _locate(self, state: Any) -> tuple[int, VSAMState]:
        # Split, the optimizer is nested dicts; merged, it has a VSAMState again,
        # with the same arrays.
        _, optimizer = nnx.merge(*state)
        _, vsam_state = locate_state(nnx.as_pure(optimizer.opt_state))
        leaves = jax.tree.leaves(state)
        leaf = next(i for i, leaf in enumerate(leaves) if leaf is vsam_state.step)
        return leaf, vsam_state
