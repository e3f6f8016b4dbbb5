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
from vsam_jax.dispatch import Windows, programs
from vsam_jax.state import is_state, with_own_buffers


def make_nnx_train_step(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Any]],
    *,
    num_micro_batches: int = 1,
) -> Callable[..., Any]:
    """Builds the training step of an NNX model from a loss that is written once.

    Args:
        loss_fn: ``loss_fn(model, batch) -> (loss, aux)`` runs the model, which is in
            training mode, on one mini-batch and may change its variables (BatchNorm,
            Rngs) and make new ones. Other attributes that it sets are lost.
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
        _passes.check_accumulation(nnx.as_pure(optimizer.opt_state))
        graphdef, params, others = nnx.split(model, optimizer.wrt, ...)
        # With the types of variables, also of those that the loss function makes.
        structure = jax.tree.structure(others)

        def pure_loss(
            params: PyTree, others: PyTree, batch: Any, key: None
        ) -> tuple[jax.Array, tuple[PyTree, Any]]:
            del key  # Random numbers come from the streams among the others.
            copy = nnx.merge(graphdef, params, others)
            loss, aux = loss_fn(copy, batch)
            changed = nnx.split(copy, optimizer.wrt, ...)[2]
            nonlocal structure
            structure = jax.tree.structure(changed)
            return loss, (nnx.as_pure(changed), aux)

        passes = _passes.two_passes(
            pure_loss,
            nnx.as_pure(params),
            nnx.as_pure(others),
            batch,
            None,
            num_micro_batches=num_micro_batches,
        )
        changed = jax.tree.leaves(passes.collections)
        nnx.update(model, jax.tree.unflatten(structure, changed))
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
        **jit_options: passed on to ``nnx.jit``.

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
        self._programs = programs(
            nnx.jit, train_step, (0, 1), donate_state, jit_options
        )
        self._donates = donate_state
        self._windows = Windows()

    @property
    def num_reads(self) -> int:
        """How many times the plan has been read from the device."""
        return self._windows.num_reads

    def __call__(
        self, model: Any, optimizer: Any, *args: Any, sample: bool | None = None
    ) -> Any:
        """Runs one step.

        Args:
            model: the model, updated in place.
            optimizer: an ``nnx.Optimizer``, updated in place.
            *args: passed on to ``train_step``, the batch for instance; modules among
                them are updated in place too.
            sample: overrides the plan for this one step.

        Returns:
            What ``train_step`` returns.
        """
        state = _small_state(optimizer)
        continues = self._windows.precede(state)
        if self._donates and not continues:
            modules = (model, optimizer)
            nnx.update(modules, with_own_buffers(nnx.state(modules)))
        sample = self._windows.decide(state, sample, continues)
        result = self._programs[sample](model, optimizer, *args)
        self._windows.follow(_small_state(optimizer))
        return result


def _small_state(optimizer: nnx.Optimizer) -> PyTree:
    """The optimizer's state without all that a host does not want to go through."""

    def small(node: Any) -> Any:
        if not is_state(node):
            return None
        return nnx.as_pure(node._replace(psf=None, rings=None))

    is_node = lambda node: is_state(node) or isinstance(node, nnx.Variable)
    return jax.tree.map(small, optimizer.opt_state, is_leaf=is_node)
