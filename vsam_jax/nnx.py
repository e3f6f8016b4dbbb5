"""Flax NNX: the second gradient for handwritten loops, and a step builder.

The second pass runs on a copy of the model, made from the arrays before the first
pass. So it draws the same dropout mask. Its changes to BatchNorm's running statistics
and to random-number counters are discarded with the copy. A conditional needs such a
copy too, since it must not change a module from outside.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vsam_jax import _checks, _collectives, _portions
from vsam_jax._step import Builder, of_two, takes_extra_args
from vsam_jax._types import PyTree

__all__ = ['Optimizer', 'make_train_step', 'value_and_grad']


class Optimizer(nnx.Optimizer):
    """Flax's optimizer with a loss scale for :func:`make_train_step`.

    You need it only for float16 computation. Otherwise use ``nnx.Optimizer``.

    Attributes:
        dynamic_scale: Flax's ``DynamicScale`` with variables for its arrays, or None.

    Args:
        model: the model to train.
        tx: the optimizer, such as ``chain(vsam(...), sgd(...))``.
        wrt: an NNX filter that selects the parameters among the variables.
        dynamic_scale: a ``flax.training.dynamic_scale.DynamicScale``, or None.

    Example:
        >>> import optax, vsam_jax
        >>> from flax import nnx
        >>> from flax.training.dynamic_scale import DynamicScale
        >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        >>> tx = optax.chain(vsam_jax.sam(), optax.sgd(0.1))
        >>> optimizer = vsam_jax.nnx.Optimizer(
        ...     model, tx, wrt=nnx.Param, dynamic_scale=DynamicScale())
        >>> print(optimizer.dynamic_scale.scale[...])
        65536.0
    """

    def __init__(
        self,
        model: Any,
        tx: optax.GradientTransformation,
        *,
        wrt: Any,
        dynamic_scale: Any = None,
    ):
        super().__init__(model, tx, wrt=wrt)
        if dynamic_scale is not None:
            # Strong types from the start: weak types would compile the step twice.
            dynamic_scale = dynamic_scale.replace(
                fin_steps=nnx.Variable(jnp.asarray(dynamic_scale.fin_steps, jnp.int32)),
                scale=nnx.Variable(jnp.asarray(dynamic_scale.scale, jnp.float32)),
            )
        self.dynamic_scale = nnx.data(dynamic_scale)


def value_and_grad(
    f: Callable[..., Any],
    *,
    argnums: int | nnx.DiffState = 0,
    has_aux: bool = False,
    psf_share: float = 1,
) -> Callable[..., Any]:
    """Like ``nnx.value_and_grad``, but the result also serves as ``grad_fn``.

    Take it for a training loop that you write yourself. Call the result with a model
    for the first pass, as with Flax's function. Then pass it to ``optimizer.update`` as
    ``grad_fn``, which calls it with parameters for the second pass. That pass repeats
    the *latest* call with a model: the same arguments and random numbers, on a copy of
    all modules as they were before the first pass. So use another function for
    evaluation.

    Args:
        f: the loss, a function of the model and any other arguments.
        argnums: the index of the model among the arguments, or an ``nnx.DiffState`` of
            that index and a filter. With an index, the parameters are the variables of
            type ``nnx.Param``. They must be the parameters of the optimizer.
        has_aux: whether ``f`` returns a pair of the loss and something else.
        psf_share: 1/k computes the gradients for the PSF on every k-th example of all
            arrays among the other arguments, along their leading axis. In that case
            pass the result to ``optimizer.update`` as ``psf_grad_fn``, not as
            ``grad_fn``.

    Returns:
        A function that takes the arguments of ``f`` and returns ``(value, grads)``.
        Called afterwards with parameters alone, it returns gradients.

    Raises:
        TypeError: for several ``argnums``, or from a call with parameters before any
            call with a model.
        ValueError: for a ``psf_share`` that is not 1/k, or does not divide an axis;
            from ``update`` if the result is passed as ``grad_fn`` with such a share.

    Example:
        >>> import jax.numpy as jnp, optax, vsam_jax
        >>> from flax import nnx
        >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        >>> tx = optax.chain(vsam_jax.vsam(rho=0.05), optax.sgd(0.1))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> def loss_fn(model, x, y):
        ...     return jnp.mean((model(x) - y) ** 2)
        >>> @nnx.jit
        ... def train_step(model, optimizer, x, y):
        ...     grad_fn = vsam_jax.nnx.value_and_grad(loss_fn)
        ...     loss, grads = grad_fn(model, x, y)
        ...     optimizer.update(model, grads, grad_fn=grad_fn)
        ...     return loss
        >>> first = train_step(model, optimizer, jnp.ones((4, 3)), jnp.ones((4, 1)))
        >>> second = train_step(model, optimizer, jnp.ones((4, 3)), jnp.ones((4, 1)))
        >>> bool(second < first)
        True
    """
    if not callable(f):
        raise TypeError(f'f must be a function of a model, got {_checks.shown(f)}.')
    if not isinstance(argnums, (int, nnx.DiffState)):
        raise TypeError(
            'argnums must be the place of the one model that is trained, an integer or'
            f' an nnx.DiffState, got {_checks.shown(argnums)}.'
        )
    return _TwoPasses(f, argnums, has_aux, psf_share)


class _TwoPasses:
    """See :func:`value_and_grad`."""

    def __init__(
        self, f: Any, argnums: int | nnx.DiffState, has_aux: bool, psf_share: float
    ):
        self._parts = _portions.parts_of(psf_share)
        self.psf_share = psf_share
        self._first = nnx.value_and_grad(f, argnums=argnums, has_aux=has_aux)
        self._second = nnx.grad(f, argnums=argnums, has_aux=has_aux)
        self._place = argnums if isinstance(argnums, int) else argnums.argnum
        self._has_aux = has_aux
        self._before: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or _holds_objects(args[0]):
            # Arrays, because the second pass may run inside a conditional.
            graphdef, state = nnx.split((args, kwargs))
            self._before = graphdef, nnx.as_pure(state)
            return self._first(*args, **kwargs)
        if self._before is None:
            raise TypeError(
                'grad_fn must be called with the model and its mini-batch first, as in'
                ' loss, grads = grad_fn(model, batch), but was called with parameters:'
                ' make it and call it in the same training step.'
            )
        (params,) = args
        args, kwargs = nnx.merge(*self._before)
        nnx.update(args[self._place], params)
        if self._parts > 1:
            data: list[Any] = list(args)
            data[self._place] = None
            data, kwargs = self._slice_of((data, kwargs))
            data[self._place], args = args[self._place], tuple(data)
        result = self._second(*args, **kwargs)
        return nnx.as_pure(result[0] if self._has_aux else result)

    def _slice_of(self, data: Any) -> Any:
        leaves, structure = jax.tree.flatten(data, is_leaf=_is_object)
        arrays = [x for x in leaves if not _is_object(x)]
        _portions.check_examples('psf_share', arrays)
        cut = iter(_portions.slice_of(arrays, self._parts))
        return structure.unflatten(x if _is_object(x) else next(cut) for x in leaves)


def _holds_objects(tree: Any) -> bool:
    return any(map(_is_object, jax.tree.leaves(tree, is_leaf=_is_object)))


def _is_object(x: Any) -> bool:
    return isinstance(x, (nnx.Pytree, nnx.Variable))


def make_train_step(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Any]],
    *,
    num_micro_batches: int = 1,
    axis_name: _collectives.AxisName = None,
    per_device: bool = False,
    psf_share: float = 1,
) -> Callable[..., Any]:
    """Builds a training step for an NNX model from a loss function.

    You write the loss once; the step runs it for both gradients.

    Args:
        loss_fn: ``loss_fn(model, batch) -> (loss, aux)`` runs the model, in training
            mode, on one mini-batch. It may change variables of the model (BatchNorm,
            Rngs) and create new ones. Other attributes that it sets are lost. ``batch``
            may contain modules and random-number streams too: both passes see them as
            they were, and the changes of the first pass are kept.
        num_micro_batches: the number of micro-batches for gradient accumulation, as in
            :func:`vsam_jax.linen.make_train_step`.
        axis_name: the mapped axis over the devices, as in
            :func:`vsam_jax.linen.make_train_step`. Gradients and the model's
            floating-point variables (running statistics) are averaged over it.
            Random-number streams differ between the devices.
        per_device: whether each device makes its own perturbation, see
            :func:`vsam_jax.vsam`. Needs ``axis_name``.
        psf_share: the share of the mini-batch on which a sampled step measures the
            PSF, as in :func:`vsam_jax.linen.make_train_step`.

    Returns:
        ``train_step(model, optimizer, batch, *, sample=None) -> aux``. It updates
        ``model`` and the ``nnx.Optimizer`` in place; ``aux`` comes from the first pass.
        It is not jitted: use ``nnx.jit(train_step)``, or
        ``vsam_jax.PlannedStep(nnx.jit(train_step))`` to run it planned. It works with
        any optax optimizer. It raises a ``ValueError`` for ``optax.MultiSteps`` around
        a method of this package.

        If an :class:`Optimizer` has a ``dynamic_scale``, both passes scale the loss
        with it. An overflow is handled as in :func:`vsam_jax.linen.make_train_step`,
        but random-number streams advance.

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
        >>> step = nnx.jit(vsam_jax.nnx.make_train_step(loss_fn))
        >>> batch = jnp.ones((4, 3)), jnp.ones((4, 1))
        >>> for _ in range(3):
        ...     metrics = step(model, optimizer, batch)
        >>> int(optimizer.step[...]), metrics['loss'].shape
        (3, ())
    """
    if not callable(loss_fn):
        raise TypeError(f'loss_fn must be a function, got {_checks.shown(loss_fn)}.')
    builder = Builder(num_micro_batches, axis_name, per_device, psf_share)

    def train_step(
        model: Any, optimizer: nnx.Optimizer, batch: Any, *, sample: Any = None
    ) -> Any:
        _check_arguments(model, optimizer)
        view = _View(model, optimizer.wrt, batch, builder)
        dynamic_scale = nnx.as_pure(getattr(optimizer, 'dynamic_scale', None))
        opt_state = nnx.as_pure(optimizer.opt_state)
        begun = builder.begin(
            view.pure_loss(loss_fn),
            nnx.as_pure(view.params),
            opt_state,
            nnx.as_pure(view.others),
            view.arrays,
            None,
            sample=sample,
            dynamic_scale=dynamic_scale,
        )
        view.write_back(begun.collections)
        grads = view.gradients(begun.grads)
        arguments = begun.arguments | {'grad': nnx.as_pure(grads)}
        told = arguments if takes_extra_args(optimizer.tx) else {}
        if isinstance(optimizer, nnx.ModelAndOptimizer):
            optimizer.update(grads, **told)
        else:
            optimizer.update(model, grads, **told)
        if dynamic_scale is not None:
            _settle(builder, begun, view, optimizer, opt_state, dynamic_scale)
        return begun.aux

    return train_step


def _check_arguments(model: Any, optimizer: Any) -> None:
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            'optimizer must be an nnx.Optimizer, made by nnx.Optimizer(model, tx,'
            f' wrt=nnx.Param), got {_checks.kind(optimizer)}: the step is'
            ' train_step(model, optimizer, batch).'
        )
    if isinstance(model, nnx.Optimizer):
        raise TypeError(
            'model must be a module, got an nnx.Optimizer: the step is'
            ' train_step(model, optimizer, batch).'
        )


class _View:
    """Turns model and mini-batch into arrays and back.

    Attributes:
        params: the trained parameters, an NNX state.
        others: all other variables, including those of modules in the mini-batch.
        arrays: the mini-batch's arrays.
        before: parameters and other variables before the step, without random numbers.
    """

    def __init__(self, model: Any, wrt: Any, batch: Any, builder: Builder):
        leaves, self._batch = jax.tree.flatten(batch, is_leaf=_is_object)
        self._places = [_is_object(x) for x in leaves]
        self._objects = [x for x in leaves if _is_object(x)]
        self.arrays = [x for x in leaves if not _is_object(x)]
        self._modules = (model, self._objects)
        trains = nnx.filterlib.to_predicate(wrt)
        self._is_param = lambda path, x: path[0] == 0 and trains(path[1:], x)
        self._graphdef, params, self.others = nnx.split(
            self._modules, self._is_param, ...
        )
        # The model's own, as the optimizer sees them.
        self.params = params.get(0, nnx.State({}))
        # Arrays, since nnx.split may return the modules' own variables, which change.
        self.before = self.values()
        self._axes = builder.axes
        # Has the types of variables, also of those that the loss function creates.
        self._structure = jax.tree.structure(self.others)

    def pure_loss(self, loss_fn: Any) -> Any:
        """The loss as a function of arrays."""

        def pure_loss(
            params: PyTree, others: PyTree, arrays: Any, key: None
        ) -> tuple[jax.Array, tuple[PyTree, Any]]:
            del key  # Random numbers come from the streams among the others.
            modules = nnx.merge(self._graphdef, nnx.State({0: params}), others)
            model, objects = modules
            keys = _own_streams(modules, self._axes)
            result = loss_fn(model, self._merged(objects, arrays))
            loss, aux = of_two('the result of loss_fn', result, '(loss, aux)')
            nnx.update(modules, keys)  # The same on all devices again.
            changed = nnx.split(modules, self._is_param, ...)[2]
            self._structure = jax.tree.structure(changed)
            return loss, (nnx.as_pure(changed), aux)

        return pure_loss

    def _merged(self, objects: Any, arrays: Any) -> Any:
        """Puts objects and arrays back in their places in the mini-batch."""
        given = iter(objects), iter(arrays)
        leaves = [next(given[0 if is_one else 1]) for is_one in self._places]
        return jax.tree.unflatten(self._batch, leaves)

    def write_back(self, collections: PyTree) -> None:
        """Writes the variables that the first pass changed into the modules."""
        changed = jax.tree.unflatten(self._structure, jax.tree.leaves(collections))
        nnx.update(self._modules, changed)

    def gradients(self, grads: PyTree) -> nnx.State:
        """Gradients with variable types, by which the optimizer selects them."""
        structure = jax.tree.structure(self.params)
        return jax.tree.unflatten(structure, jax.tree.leaves(grads))

    def values(self) -> PyTree:
        """The current parameters and other variables, without random numbers."""
        state = nnx.state(self._modules, nnx.Not(nnx.RngState))
        return nnx.as_pure(state)

    def take(self, values: PyTree) -> None:
        """Writes such values into the modules."""
        nnx.update(self._modules, values)


def _own_streams(modules: Any, axes: _collectives.Axes) -> nnx.State:
    """Makes random streams differ between devices; returns their original keys."""
    keys = nnx.as_pure(nnx.state(modules, nnx.RngKey)) if axes else nnx.State({})

    def own(key: jax.Array) -> jax.Array:
        return jax.vmap(own)(key) if key.ndim else _collectives.own_key(key, axes)

    nnx.update(modules, jax.tree.map(own, keys))
    return keys


def _settle(
    builder: Builder,
    begun: Any,
    view: _View,
    optimizer: Any,
    opt_state: PyTree,
    dynamic_scale: Any,
) -> None:
    """Undoes the update after an overflow, and sets the next loss scale."""
    old, new = view.before, view.values()
    if jax.tree.structure(old) != jax.tree.structure(new):
        # The model created variables, whose first values are kept.
        paths = dict(nnx.to_flat_state(old))
        new = nnx.from_flat_state(
            [(path, x) for path, x in nnx.to_flat_state(new) if path in paths]
        )
    (values, state), scale = builder.settle(
        begun,
        (old, opt_state),
        (new, nnx.as_pure(optimizer.opt_state)),
        dynamic_scale,
    )
    view.take(values)
    nnx.update(optimizer.opt_state, nnx.state(state))
    nnx.update(optimizer.dynamic_scale, nnx.state(scale))
