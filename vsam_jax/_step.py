"""Builds a training step from a loss function, for any framework.

This gets right what is easy to get wrong by hand. The second pass sees what the first
pass saw: the same mini-batch, the same random numbers, and the running statistics as
they were before. Its changes to those statistics are discarded.

A framework calls :meth:`Builder.begin`. It passes the gradients to its optimizer, with
the ``arguments`` that come with them. Then it passes the result to
:meth:`Builder.settle`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsam_jax import _checks, _collectives, _numerics, _portions, convolutions
from vsam_jax._state import is_accumulated, is_state, states_in
from vsam_jax._types import DTypeLike, PyTree

# (params, collections, batch, key) -> (loss, (collections, aux))
LossFn = Callable[..., tuple[jax.Array, tuple[PyTree, Any]]]
# The same arguments -> (loss, grads, (collections, aux))
Gradient = Callable[..., tuple[jax.Array, PyTree, tuple[PyTree, Any]]]


class Begun(NamedTuple):
    """A step after its first pass.

    Attributes:
        grads: the gradient for the optimizer.
        arguments: keyword arguments for ``tx.update``: the loss, for optimizers that
            use it, and those of a method, if the state contains one.
        collections: everything that the forward pass updates, such as running
            statistics.
        aux: anything else that the loss function returned.
    """

    grads: PyTree
    arguments: dict[str, Any]
    collections: PyTree
    aux: Any


@dataclasses.dataclass(frozen=True)
class Builder:
    """The settings and the code that all steps of a builder share.

    Attributes:
        num_micro_batches: into how many parts each pass cuts the mini-batch.
        axis_name: the mapped axis over the devices, see :func:`vsam_jax.vsam`.
        per_device: whether each device makes its own perturbation.
        psf_share: 1/k, the share of the mini-batch for the second gradient.
        overwrites: the name of a collection among the parameters whose "gradients"
            replace its values; None if there is none.
    """

    num_micro_batches: int
    axis_name: _collectives.AxisName
    per_device: bool
    psf_share: float = 1
    overwrites: str | None = None

    def __post_init__(self):
        number = self.num_micro_batches
        _checks.assign(
            self,
            num_micro_batches=_checks.integer('num_micro_batches', number, low=1),
            axis_name=_checks.axis_name('axis_name', self.axis_name),
            per_device=_collectives.check_per_device(self.per_device, self.axis_name),
        )
        _portions.parts_of(self.psf_share)

    @property
    def axes(self) -> _collectives.Axes:
        """The axes to average over; use it only where they are mapped."""
        return _collectives.axes_of(self.axis_name)

    def begin(
        self,
        loss_fn: LossFn,
        params: PyTree,
        opt_state: PyTree,
        collections: PyTree,
        batch: Any,
        key: jax.Array | None,
        *,
        sample: Any,
        dynamic_scale: Any = None,
    ) -> Begun:
        """Runs the first pass and prepares the second.

        Args:
            loss_fn: see :data:`LossFn`.
            params: the parameters at which the first gradient is taken.
            opt_state: the optimizer's state.
            collections: see :class:`Begun`.
            batch: the mini-batch, arrays with a leading axis of examples.
            key: a key for random numbers, or None.
            sample: whether the step is sampled, see :func:`vsam_jax.vsam`.
            dynamic_scale: a loss scale for both passes, an object like Flax's
                ``DynamicScale``, or None.

        Returns:
            See :class:`Begun`. ``aux`` has a leading axis over the micro-batches if
            there are several.
        """
        _check_accumulation(opt_state)
        axes = self.axes
        loss_fn = self._told(loss_fn)
        before = _collectives.own_copy(collections, axes)
        whole, sliced = self._gradients(loss_fn, dynamic_scale)

        def one_pass(params: PyTree, gradient: Gradient = whole) -> Any:
            # Tensors that are not perturbed are still shared by all devices.
            return gradient(_collectives.own_copy(params, axes), before, batch, key)

        if self.num_micro_batches > 1:
            _portions.check_examples('num_micro_batches', batch)
        if self.psf_share != 1:
            _portions.check_examples('psf_share', batch)
        value, grads, (after, aux) = one_pass(params)
        if self.has_overwrites(grads):
            # Sizes that were seen; the largest over all devices count.
            seen = _collectives.largest(grads[self.overwrites], axes)
            grads = {**grads, self.overwrites: seen}

        def value_fn(
            params: PyTree,
            # A line search rejects arguments that its function does not have.
            grad_fn: Any = None,
            sample: Any = None,
            axis_name: Any = None,
            per_device: Any = None,
            psf_grad_fn: Any = None,
            psf_share: Any = None,
        ) -> jax.Array:
            del grad_fn, sample, axis_name, per_device, psf_grad_fn, psf_share
            return _collectives.mean(one_pass(params)[0], axes)

        arguments = {'value': _collectives.mean(value, axes), 'value_fn': value_fn}
        if states_in(opt_state):
            second_pass = lambda p: one_pass(p, sliced or whole)[:2]
            arguments |= {
                'grad_fn' if sliced is None else 'psf_grad_fn': second_pass,
                'sample': sample,
                'axis_name': self.axis_name,
                'per_device': self.per_device,
                'psf_share': None if sliced is None else self.psf_share,
            }
        else:
            # The methods of this package average by themselves; others do not.
            grads = _collectives.mean(grads, axes)
        return Begun(
            grads=grads,
            arguments=arguments,
            collections=_collectives.mean(_in_dtypes_of(collections, after), axes),
            aux=aux,
        )

    def settle(
        self, begun: Begun, old: PyTree, new: PyTree, dynamic_scale: Any
    ) -> tuple[PyTree, Any]:
        """Undoes the update if one of its gradients was not finite.

        Args:
            begun: the result of :meth:`begin`.
            old: parameters, collections and optimizer state before the step; any tree.
            new: the same after the step.
            dynamic_scale: the loss scale of the step.

        Returns:
            ``new``, or ``old`` with the new state of the method, which advances; and
            the loss scale of the next step.
        """
        # An overflow on one device skips the step on all of them.
        grads = _collectives.mean(begun.grads, self.axes)
        leaves = jax.tree.leaves(grads)
        finite = jnp.array([jnp.isfinite(g).all() for g in leaves]).all()
        # The update itself would not show it: the sign of an infinity is finite.
        finite &= _num_rejected(new) == _num_rejected(old)

        def keep(new_leaf: Any, old_leaf: Any) -> Any:
            if is_state(new_leaf):
                return new_leaf  # It has rejected the sample, and must advance.
            if not isinstance(new_leaf, jax.Array):
                return new_leaf  # NNX variables may hold anything.
            return jnp.where(finite, new_leaf, old_leaf)

        kept = jax.tree.map(keep, new, old, is_leaf=is_state)
        return kept, _next_scale(dynamic_scale, finite)

    def has_overwrites(self, grads: PyTree) -> bool:
        """Whether gradients contain a collection of values that replace parameters."""
        return isinstance(grads, Mapping) and self.overwrites in grads

    def _gradients(
        self, loss_fn: LossFn, dynamic_scale: Any
    ) -> tuple[Gradient, Gradient | None]:
        """Gradients on the whole mini-batch and on a slice (None if that is all)."""
        one = convolutions.canonical(self._gradient(loss_fn, dynamic_scale))
        # A gradient from which a loss scale was divided out is float32, since a
        # narrower dtype may not represent it.
        dtype = None if dynamic_scale is None else jnp.float32
        number, parts = self.num_micro_batches, _portions.parts_of(self.psf_share)
        accumulate = functools.partial(
            _accumulated, one, dtype=dtype, overwrites=self.overwrites
        )
        whole = one if number == 1 else accumulate(number)
        if parts == 1:
            return whole, None
        if number >= parts and number % parts == 0:
            # Whole micro-batches, with the dropout masks of the first pass.
            return whole, accumulate(number, every=parts)
        # Processes no more examples at a time than the first pass.
        at_a_time = -(-number // parts)
        of_slice = one if at_a_time == 1 else accumulate(at_a_time)

        def sliced(params: PyTree, collections: PyTree, batch: Any, key: Any) -> Any:
            batch = _portions.slice_of(batch, parts)
            return of_slice(params, collections, batch, key)

        return whole, sliced

    def _told(self, loss_fn: LossFn) -> LossFn:
        """The loss, with a check: without an axis it must be that of all devices."""

        def told(
            params: PyTree, collections: PyTree, batch: Any, key: jax.Array | None
        ) -> tuple[jax.Array, tuple[PyTree, Any]]:
            loss, others = loss_fn(params, collections, batch, key)
            _collectives.check_told(self.axis_name, 'the loss', loss, params)
            return loss, others

        return told

    def _gradient(self, loss_fn: LossFn, dynamic_scale: Any) -> Gradient:
        unscaled = jax.value_and_grad(loss_fn, has_aux=True)

        def gradient(*args: Any) -> tuple[jax.Array, PyTree, tuple[PyTree, Any]]:
            if dynamic_scale is None:
                (value, outputs), grads = unscaled(*args)
                return value, grads, outputs
            result = dynamic_scale.value_and_grad(loss_fn, has_aux=True)(*args)
            (value, outputs), grads = result.aux, result.grad
            if self.has_overwrites(grads):
                # These are not gradients and contain no scale, so undo the division.
                values = grads[self.overwrites]
                values = optax.tree.scale(dynamic_scale.scale, values)
                grads = {**grads, self.overwrites: values}
            return value, grads, outputs

        return gradient


def takes_extra_args(tx: Any) -> bool:
    """Whether ``tx.update`` takes more than the three arguments of any optimizer."""
    # MultiSteps passes them on, although its type does not say so.
    return isinstance(tx, (optax.GradientTransformationExtraArgs, optax.MultiSteps))


def of_two(name: str, given: Any, wanted: str) -> tuple[Any, Any]:
    """Returns ``given`` if it is a pair, or raises.

    Args:
        name: a name for the pair in the error.
        given: the pair.
        wanted: what the pair should look like.
    """
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        kind = _checks.kind(given)
        if isinstance(given, (tuple, list)):
            kind = f'{len(given)} values'
        raise TypeError(f'{name} must be a pair, {wanted}, got {kind}.')
    return given[0], given[1]


def _check_accumulation(opt_state: PyTree) -> None:
    """Raises if a second gradient would not cover the whole mini-batch."""
    if is_accumulated(opt_state):
        raise ValueError(
            'tx must not be optax.MultiSteps around a method of vsam_jax here: the'
            ' second gradient would be that of the last mini-step alone. Give'
            ' num_micro_batches to the function that builds the step, or put'
            ' optax.MultiSteps around what comes after the method.'
        )


def _accumulated(
    gradient: Gradient,
    num_micro_batches: int,
    dtype: DTypeLike,
    overwrites: str | None,
    every: int = 1,
) -> Gradient:
    """The mean gradient over micro-batches, one after the other.

    Its dtype is ``dtype``, or with None that of each parameter. It uses every
    ``every``-th micro-batch. The collection ``overwrites`` contains sizes that were
    seen, of which it takes the largest instead of the mean.
    """

    def is_size(path: tuple[Any, ...]) -> bool:
        return getattr(path[0], 'key', None) == overwrites if path else False

    number = num_micro_batches // every

    def split(x: jax.Array) -> jax.Array:
        if not jnp.shape(x) or x.shape[0] % num_micro_batches:
            raise ValueError(
                'num_micro_batches must divide the leading axis of every array of the'
                f' mini-batch, got num_micro_batches={num_micro_batches} for an array'
                f' of shape {jnp.shape(x)}.'
            )
        return x.reshape(num_micro_batches, -1, *x.shape[1:])

    def accumulated(
        params: PyTree, collections: PyTree, batch: Any, key: jax.Array | None
    ) -> tuple[jax.Array, PyTree, tuple[PyTree, Any]]:
        def add(carry: Any, micro_batch: Any) -> tuple[Any, Any]:
            total, collections = carry
            index, batch = micro_batch
            micro_key = None if key is None else jax.random.fold_in(key, index)
            value, grads, (new, aux) = gradient(params, collections, batch, micro_key)
            collections = _in_dtypes_of(collections, new)
            total = jax.tree_util.tree_map_with_path(together, total, grads)
            return (total, collections), (value, aux)

        def together(path: tuple[Any, ...], total: jax.Array, grad: jax.Array) -> Any:
            grad = _numerics.widen(grad)
            return jnp.maximum(total, grad) if is_size(path) else total + grad

        zeros = optax.tree.zeros_like(jax.tree.map(_numerics.widen, params))
        (total, collections), (values, aux) = jax.lax.scan(
            add,
            (zeros, collections),
            (
                jnp.arange(0, num_micro_batches, every),
                jax.tree.map(lambda x: split(x)[::every], batch),
            ),
        )
        mean = jax.tree_util.tree_map_with_path(
            lambda path, t: t if is_size(path) else t / number, total
        )
        cast = lambda m, p: m.astype(dtype or p.dtype)
        grads = jax.tree.map(cast, mean, params)
        return values.mean(), grads, (collections, aux)

    return accumulated


def _in_dtypes_of(old: PyTree, new: PyTree) -> PyTree:
    """The new collections in the dtypes of the old ones, which a state must keep.

    Flax's BatchNorm starts in float32, but may return another dtype.
    """
    if jax.tree.structure(old) != jax.tree.structure(new):
        return new  # A collection was added.

    # Unlike optax.tree.cast_like, this accepts random keys, and numbers that are not
    # arrays.
    def cast(o: Any, n: Any) -> Any:
        wanted, given = (getattr(x, 'dtype', None) for x in (o, n))
        if wanted is None or given is None or wanted == given:
            return n
        return n.astype(wanted)

    return jax.tree.map(cast, old, new)


def _num_rejected(tree: PyTree) -> jax.Array | int:
    return sum(state.num_rejected for state in states_in(tree))


def _next_scale(dynamic_scale: Any, finite: jax.Array) -> Any:
    """The loss scale after a step; Flax's rule is inside ``value_and_grad``."""
    outcome = lambda x: x * jnp.where(finite, 1, jnp.nan)
    return dynamic_scale.value_and_grad(outcome)(jnp.ones(())).dynamic_scale
