"""The two passes over one mini-batch, for models that carry more than parameters.

The second pass sees what the first one saw: the same mini-batch, the same random
numbers, the running statistics as they were before. What it does to those
statistics is thrown away.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.dynamic_scale import DynamicScale

from vsam_jax import _checks, _numerics, convolutions
from vsam_jax._types import DTypeLike, PyTree
from vsam_jax.state import is_accumulated

# (params, collections, batch, key) -> (loss, (collections, aux))
LossFn = Callable[..., tuple[jax.Array, tuple[PyTree, Any]]]
# The same arguments -> (grads, (collections, aux))
Gradient = Callable[..., tuple[PyTree, tuple[PyTree, Any]]]


class Passes(NamedTuple):
    """What the first pass gave, and the function that takes the second one.

    Attributes:
        grads: the gradient.
        collections: whatever the forward pass updates, such as running statistics.
        aux: anything else that the loss function returned.
        grad_fn: maps parameters to the gradient of the same mini-batch.
    """

    grads: PyTree
    collections: PyTree
    aux: Any
    grad_fn: Callable[[PyTree], PyTree]


def two_passes(
    loss_fn: LossFn,
    params: PyTree,
    collections: PyTree,
    batch: Any,
    key: jax.Array | None,
    *,
    num_micro_batches: int = 1,
    dynamic_scale: DynamicScale | None = None,
) -> Passes:
    """Takes the first pass and prepares the second.

    Args:
        loss_fn: ``(params, collections, batch, key) -> (loss, (collections, aux))``.
        params: where the first gradient is taken.
        collections: see :class:`Passes`.
        batch: the mini-batch, arrays with a leading axis of examples.
        key: for random numbers, or None.
        num_micro_batches: into how many parts each pass cuts the mini-batch.
        dynamic_scale: a loss scale for both passes, or None.

    Returns:
        See :class:`Passes`; ``aux`` has a leading axis over the micro-batches where
        there are several.
    """
    gradient = convolutions.canonical(_gradient(loss_fn, dynamic_scale))
    if num_micro_batches > 1:
        # A gradient that a loss scale was divided out of is float32 in flax, because
        # a narrower dtype may not hold it.
        dtype = None if dynamic_scale is None else jnp.float32
        gradient = _accumulated(gradient, num_micro_batches, dtype)
    grads, (new_collections, aux) = gradient(params, collections, batch, key)
    return Passes(
        grads=grads,
        collections=_in_dtypes_of(collections, new_collections),
        aux=aux,
        grad_fn=lambda p: gradient(p, collections, batch, key)[0],
    )


def extra_args(tx: Any, **arguments: Any) -> dict[str, Any]:
    """The arguments if the optimizer takes any, nothing if it would refuse them."""
    # MultiSteps passes them on, without being what says so.
    takes = (optax.GradientTransformationExtraArgs, optax.MultiSteps)
    return arguments if isinstance(tx, takes) else {}


def check_accumulation(opt_state: PyTree) -> None:
    """Raises where a second gradient would not be that of the whole mini-batch."""
    if is_accumulated(opt_state):
        raise ValueError(
            'tx must not be optax.MultiSteps around a method of vsam_jax here: the'
            ' second gradient would be that of the last mini-step alone. Give'
            ' num_micro_batches to the function that builds the step, or put'
            ' optax.MultiSteps around what comes after the method.'
        )


def has_overwrites(grads: PyTree) -> bool:
    """Whether there is flax's collection of what takes the place of parameters."""
    return isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads


def micro_batches(num_micro_batches: Any) -> int:
    """Checks the argument of that name."""
    return _checks.integer('num_micro_batches', num_micro_batches, low=1)


def _gradient(loss_fn: LossFn, dynamic_scale: DynamicScale | None) -> Gradient:
    if dynamic_scale is None:
        return jax.grad(loss_fn, has_aux=True)
    scaled = dynamic_scale.value_and_grad(loss_fn, has_aux=True)

    def gradient(*args: Any) -> tuple[PyTree, tuple[PyTree, Any]]:
        result = scaled(*args)
        grads = result.grad
        if has_overwrites(grads):
            # These are no gradients: no scale is in them, so none comes out.
            values = grads[OVERWRITE_WITH_GRADIENT]
            values = optax.tree.scale(dynamic_scale.scale, values)
            grads = {**grads, OVERWRITE_WITH_GRADIENT: values}
        return grads, result.aux[1]

    return gradient


def _accumulated(
    gradient: Gradient, num_micro_batches: int, dtype: DTypeLike
) -> Gradient:
    """The mean gradient over micro-batches, one after the other.

    Its dtype is ``dtype``, or with None that of each parameter.
    """

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
    ) -> tuple[PyTree, tuple[PyTree, Any]]:
        def add(carry: Any, micro_batch: Any) -> tuple[Any, Any]:
            total, collections = carry
            index, batch = micro_batch
            micro_key = None if key is None else jax.random.fold_in(key, index)
            grads, (new, aux) = gradient(params, collections, batch, micro_key)
            collections = _in_dtypes_of(collections, new)
            total = jax.tree.map(lambda t, g: t + _numerics.widen(g), total, grads)
            return (total, collections), aux

        zeros = optax.tree.zeros_like(jax.tree.map(_numerics.widen, params))
        (total, collections), aux = jax.lax.scan(
            add,
            (zeros, collections),
            (jnp.arange(num_micro_batches), jax.tree.map(split, batch)),
        )
        mean = optax.tree.scale(1 / num_micro_batches, total)
        cast = lambda m, p: m.astype(dtype or p.dtype)
        return jax.tree.map(cast, mean, params), (collections, aux)

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
