"""A training step from a loss that is written once, for any framework.

What is easy to get wrong by hand is right by construction here. The second pass sees
what the first one saw: the same mini-batch, the same random numbers, the running
statistics as they were before. What it does to those statistics is thrown away.

A framework calls :meth:`Builder.begin`, gives the gradients to its optimizer with the
``arguments`` that come with them, and hands what came of it to :meth:`Builder.settle`.
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
    """A step whose first pass is done.

    Attributes:
        grads: the gradient, what the optimizer wants.
        arguments: for ``tx.update``, by name: the loss, for optimizers that want it,
            and what a method wants, where one stands in the state.
        collections: whatever the forward pass updates, such as running statistics.
        aux: anything else that the loss function returned.
    """

    grads: PyTree
    arguments: dict[str, Any]
    collections: PyTree
    aux: Any


@dataclasses.dataclass(frozen=True)
class Builder:
    """What the steps of one builder have in common.

    Attributes:
        num_micro_batches: into how many parts each pass cuts the mini-batch.
        axis_name: the mapped axis over the devices, see :func:`vsam_jax.vsam`.
        per_device: whether each device has its own perturbation.
        psf_share: which share of the mini-batch the second gradient is taken on, 1/k.
        overwrites: the name of a collection among the parameters whose "gradients"
            take the place of its values; None if there is none.
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
        """The axes to average over; to be asked for where they are mapped."""
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
        """Takes the first pass and prepares the second.

        Args:
            loss_fn: see :data:`LossFn`.
            params: where the first gradient is taken.
            opt_state: the optimizer's state.
            collections: see :class:`Begun`.
            batch: the mini-batch, arrays with a leading axis of examples.
            key: for random numbers, or None.
            sample: whether the step is sampled, see :func:`vsam_jax.vsam`.
            dynamic_scale: a loss scale for both passes, or None: an object like Flax's
                ``DynamicScale``.

        Returns:
            See :class:`Begun`; ``aux`` has a leading axis over the micro-batches where
            there are several.
        """
        _check_accumulation(opt_state)
        axes = self.axes
        loss_fn = self._told(loss_fn)
        before = _collectives.own_copy(collections, axes)
        whole, sliced = self._gradients(loss_fn, dynamic_scale)

        def one_pass(params: PyTree, gradient: Gradient = whole) -> Any:
            # What is not perturbed is still what all devices share.
            return gradient(_collectives.own_copy(params, axes), before, batch, key)

        if self.num_micro_batches > 1:
            _portions.check_examples('num_micro_batches', batch)
        if self.psf_share != 1:
            _portions.check_examples('psf_share', batch)
        value, grads, (after, aux) = one_pass(params)
        if self.has_overwrites(grads):
            # Sizes that were seen: over all devices the largest ones count.
            seen = _collectives.largest(grads[self.overwrites], axes)
            grads = {**grads, self.overwrites: seen}

        def value_fn(
            params: PyTree,
            # A line search refuses arguments that its function does not have.
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
            # The methods of this package average, other optimizers know no devices.
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
        """Takes the update back if it was made from a gradient that is not finite.

        Args:
            begun: what :meth:`begin` returned.
            old: parameters, collections, optimizer state before the step; any tree.
            new: the same after it.
            dynamic_scale: the loss scale of the step, or None.

        Returns:
            ``new``, or ``old`` but for the state of a method, which advances; and the
            loss scale of the next step.
        """
        if dynamic_scale is None:
            return new, None
        # What overflows on one device is skipped on all of them.
        grads = _collectives.mean(begun.grads, self.axes)
        leaves = jax.tree.leaves(grads)
        finite = jnp.array([jnp.isfinite(g).all() for g in leaves]).all()
        # The direction itself does not tell: the sign of an infinity is finite.
        finite &= _num_rejected(new) == _num_rejected(old)

        def keep(new_leaf: Any, old_leaf: Any) -> Any:
            if is_state(new_leaf):
                return new_leaf  # It knows what to reject, and has to advance.
            if not isinstance(new_leaf, jax.Array):
                return new_leaf  # Variables of NNX may hold anything.
            return jnp.where(finite, new_leaf, old_leaf)

        kept = jax.tree.map(keep, new, old, is_leaf=is_state)
        return kept, _next_scale(dynamic_scale, finite)

    def has_overwrites(self, grads: PyTree) -> bool:
        """Whether there is a collection of what takes the place of parameters."""
        return isinstance(grads, Mapping) and self.overwrites in grads

    def _gradients(
        self, loss_fn: LossFn, dynamic_scale: Any
    ) -> tuple[Gradient, Gradient | None]:
        """Of the whole mini-batch, and of a slice of it (None if that is all of it)."""
        one = convolutions.canonical(self._gradient(loss_fn, dynamic_scale))
        # A gradient that a loss scale was divided out of is float32, because a
        # narrower dtype may not hold it.
        dtype = None if dynamic_scale is None else jnp.float32
        number, parts = self.num_micro_batches, _portions.parts_of(self.psf_share)
        accumulate = functools.partial(
            _accumulated, one, dtype=dtype, overwrites=self.overwrites
        )
        whole = one if number == 1 else accumulate(number)
        if parts == 1:
            return whole, None
        if number >= parts and number % parts == 0:
            # Whole micro-batches, with the masks that they have in the first pass.
            return whole, accumulate(number, every=parts)
        # No more examples at a time than in the first pass.
        at_a_time = -(-number // parts)
        of_slice = one if at_a_time == 1 else accumulate(at_a_time)

        def sliced(params: PyTree, collections: PyTree, batch: Any, key: Any) -> Any:
            batch = _portions.slice_of(batch, parts)
            return of_slice(params, collections, batch, key)

        return whole, sliced

    def _told(self, loss_fn: LossFn) -> LossFn:
        """The loss; without an axis it must be that of all devices together."""

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
                # These are no gradients: no scale is in them, so none comes out.
                values = grads[self.overwrites]
                values = optax.tree.scale(dynamic_scale.scale, values)
                grads = {**grads, self.overwrites: values}
            return value, grads, outputs

        return gradient


def takes_extra_args(tx: Any) -> bool:
    """Whether ``tx.update`` takes arguments besides the three of any optimizer."""
    # MultiSteps passes them on, without being what says so.
    return isinstance(tx, (optax.GradientTransformationExtraArgs, optax.MultiSteps))


def of_two(name: str, given: Any, wanted: str) -> tuple[Any, Any]:
    """Returns ``given`` if it is a pair, or raises.

    Args:
        name: what it is.
        given: the pair.
        wanted: how it is written.
    """
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        kind = _checks.kind(given)
        if isinstance(given, (tuple, list)):
            kind = f'{len(given)} values'
        raise TypeError(f'{name} must be a pair, {wanted}, got {kind}.')
    return given[0], given[1]


def _check_accumulation(opt_state: PyTree) -> None:
    """Raises where a second gradient would not be that of the whole mini-batch."""
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

    Its dtype is ``dtype``, or with None that of each parameter. Of the micro-batches
    it takes all, or one of ``every`` so many. Of the collection ``overwrites``, sizes
    that were seen, it takes the largest.
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
    """The new collections in the dtypes of the old ones, so that a state keeps its.

    Flax's BatchNorm starts in float32, whatever dtype it goes on in.
    """
    if jax.tree.structure(old) != jax.tree.structure(new):
        return new  # Something was added.

    # Unlike optax.tree.cast_like, which random keys among them would refuse, and
    # numbers that are no arrays.
    def cast(o: Any, n: Any) -> Any:
        wanted, given = (getattr(x, 'dtype', None) for x in (o, n))
        if wanted is None or given is None or wanted == given:
            return n
        return n.astype(wanted)

    return jax.tree.map(cast, old, new)


def _num_rejected(tree: PyTree) -> jax.Array | int:
    return sum(state.num_rejected for state in states_in(tree))


def _next_scale(dynamic_scale: Any, finite: jax.Array) -> Any:
    """The loss scale after a step; Flax has its rule inside ``value_and_grad``."""
    outcome = lambda x: x * jnp.where(finite, 1, jnp.nan)
    return dynamic_scale.value_and_grad(outcome)(jnp.ones(())).dynamic_scale
