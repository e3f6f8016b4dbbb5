"""How a loss curves around a point: products with its Hessian and what follows.

Everything here works on flat vectors of parameters and goes through a list of
mini-batches one after the other. The loops are Python's, so that nothing is compiled
anew for another number of mini-batches. The Lanczos iteration is ARPACK's, through
SciPy, which restarts until it has converged; it costs a copy of a vector to the host
and back per product. matfree estimates the trace: it leaves the loop over its vectors
to a ``vmap``, which can be told to be a Python loop.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matfree import stochtrace
from scipy.sparse import linalg

from vsam_jax import perturbation

PyTree = Any
# v [n] -> A v [n]
Product = Callable[[jax.Array], jax.Array]


class Landscape:
    """A loss as a function of a flat vector, as a mean over mini-batches.

    Its programs are compiled once for all parameters and mini-batches of one shape;
    nothing is read back to the host between mini-batches.

    Args:
        loss: ``loss(params, batch) -> scalar``, twice differentiable in ``params``
            almost everywhere.
        like: a tree with the structure of the parameters.

    Attributes:
        unravel: makes a tree of parameters of a vector [n];
            ``jax.flatten_util.ravel_pytree`` is its inverse.
    """

    def __init__(self, loss: Callable[[PyTree, Any], jax.Array], like: PyTree):
        _, self.unravel = ravel_pytree(like)

        def flat(w: jax.Array, batch: Any) -> jax.Array:
            return loss(self.unravel(w), batch)

        def product(w: jax.Array, batch: Any, v: jax.Array) -> jax.Array:
            # Forward over reverse: half the time of reverse over reverse.
            return jax.jvp(lambda w: jax.grad(flat)(w, batch), (w,), (v,))[1]

        self._loss = _summed(flat)
        self._gradient = _summed(jax.grad(flat))
        self._product = _summed(product)

    def loss(self, w: jax.Array, batches: Sequence[Any]) -> jax.Array:
        """The loss at w [n], a scalar."""
        return self._loss(jnp.zeros((), w.dtype), w, batches)

    def gradient(self, w: jax.Array, batches: Sequence[Any]) -> jax.Array:
        """The gradient at w [n], [n]."""
        return self._gradient(jnp.zeros_like(w), w, batches)

    def hessian(self, w: jax.Array, batches: Sequence[Any]) -> Product:
        """The Hessian H at w [n], as the function v -> H v."""
        return lambda v: self._product(jnp.zeros_like(w), w, batches, v)


def _summed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``(zero, w, batches, *args)`` -> the mean of ``function(w, batch, *args)``."""
    # A batch per call, not a loop in one program: see the top.
    add = jax.jit(lambda total, *args: total + function(*args), donate_argnums=0)

    def mean(
        zero: jax.Array, w: jax.Array, batches: Sequence[Any], *args: Any
    ) -> jax.Array:
        total = zero
        for batch in batches:
            total = add(total, w, batch, *args)
        return total / len(batches)

    return mean


def eigenpairs(
    product: Product,
    start: jax.Array,
    number: int,
    *,
    which: str = 'LA',
    tolerance: float = 1e-3,
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues at an end of a symmetric matrix's spectrum, with eigenvectors.

    Args:
        product: v [n] -> A v [n].
        start: [n], where the Lanczos iteration starts, not zero; sets the dtype.
        number: how many eigenvalues, less than n.
        which: as SciPy calls them: ``'LA'`` for the largest, ``'SA'`` for the
            smallest, ``'LM'`` for those of largest magnitude.
        tolerance: relative to the eigenvalue.

    Returns:
        The eigenvalues [number], the outermost first, and the eigenvectors
        [number, n], each of length 1.
    """
    size = start.shape[0]
    # What SciPy says of its types is not what it takes.
    scipy: Any = linalg
    operator = scipy.LinearOperator(
        (size, size),
        # A copy: ARPACK goes on to use the memory of what it passes.
        matvec=lambda v: np.asarray(product(jnp.array(v.ravel()))),
        dtype=np.dtype(start.dtype),
    )
    values, vectors = scipy.eigsh(
        operator, number, which=which, v0=np.array(start), tol=tolerance
    )
    order = np.argsort({'LA': -values, 'SA': values, 'LM': -np.abs(values)}[which])
    return values[order], vectors.T[order]


def trace(
    product: Product, like: jax.Array, samples: int, key: jax.Array
) -> tuple[float, float]:
    """An estimate of the trace of a symmetric matrix, and of its standard error.

    XTrace (Epperly, Tropp and Webber, arXiv 2301.07825): Hutchinson's estimator for
    what the products leave over of the matrix, whose leading part is taken exactly.
    For a matrix with a few large eigenvalues of both signs that is a tenth of the
    error of Hutchinson's alone from the same number of products.

    Args:
        product: v [n] -> A v [n].
        like: a vector [n], for its dtype.
        samples: random vectors; each takes two products, and five vectors of memory.
            From n / 2 on the trace is taken exactly instead, by n products.
        key: draws the vectors.

    Returns:
        The estimate, and its standard error. The latter is itself an estimate, and
        rather a low one, since all of it shares the same vectors.
    """
    size = like.shape[0]
    if 2 * samples >= size:
        units = jnp.eye(size, dtype=like.dtype)
        return float(sum(product(unit) @ unit for unit in units)), 0.0
    one_by_one = jax.custom_batching.custom_vmap(lambda v: product(v))

    @one_by_one.def_vmap
    def _(size: int, batched: Sequence[bool], vectors: jax.Array) -> Any:
        del size, batched
        return jnp.stack([product(v) for v in vectors]), True

    estimate = stochtrace.estimator_leave_one_out_mean_and_sem(
        stochtrace.leave_one_out_xtrace(),
        stochtrace.sampler_normal(like, num=samples),
    )
    mean, error = jax.device_get(estimate(one_by_one, key))
    return float(mean), float(error)


def ascend(
    landscape: Landscape, w: jax.Array, batches: Sequence[Any], rho: float
) -> tuple[jax.Array, jax.Array]:
    """The gradient g [n] at w [n], and SAM's point w + ρ g/‖g‖ [n]."""
    g = landscape.gradient(w, batches)
    ascent = perturbation.perturb(perturbation.l2_ascent, g, w, jnp.asarray(rho))
    return g, ascent


def loss_rise(
    landscape: Landscape, w: jax.Array, batches: Sequence[Any], rhos: Iterable[float]
) -> list[float]:
    """SAM's sharpness: L(w + ρ g/‖g‖) − L(w), a mean over mini-batches.

    Each mini-batch is perturbed along its own gradient, as SAM does it.

    Args:
        landscape: the loss.
        w: [n], where it is measured.
        batches: the mini-batches.
        rhos: the radii.

    Returns:
        The rise at each radius.
    """
    base = landscape.loss(w, batches)
    rises = []
    for rho in rhos:
        losses = [
            landscape.loss(ascend(landscape, w, [batch], rho)[1], [batch])
            for batch in batches
        ]
        rises.append(sum(losses) / len(losses) - base)
    return [float(rise) for rise in jax.device_get(rises)]


def along(
    landscape: Landscape,
    w: jax.Array,
    batches: Sequence[Any],
    direction: jax.Array,
    distances: Iterable[float],
) -> list[float]:
    """The loss at w + t d for each distance t."""
    losses = [landscape.loss(w + t * direction, batches) for t in distances]
    return [float(loss) for loss in jax.device_get(losses)]


def in_units(scale: jax.Array, product: Product) -> Product:
    """The Hessian of w -> L(S w), S = diag(scale), from products with that of L.

    Args:
        scale: [n], the unit that each parameter is measured in;
            :func:`filter_norms`, for instance.
        product: v [n] -> H v [n].

    Returns:
        v [n] -> S H S v [n].
    """
    return lambda v: scale * product(scale * v)


def filter_norms(params: PyTree) -> PyTree:
    """For each weight the norm of its filter: of the weights that make one output.

    The scale of a filter says nothing where a normalisation follows; measured in
    units of it, sharpness does not depend on that scale.

    Args:
        params: a tree of arrays whose last axis is that of the outputs.

    Returns:
        A tree like ``params``; zero for tensors with fewer than two axes (biases,
        scales of normalisations), which have no filters.
    """

    def norms(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.zeros_like(leaf)
        axes = tuple(range(leaf.ndim - 1))
        norm = jnp.sqrt(jnp.sum(leaf**2, axis=axes, keepdims=True))
        return jnp.broadcast_to(norm, leaf.shape)

    return jax.tree.map(norms, params)


def filter_normalised(params: PyTree, key: jax.Array) -> PyTree:
    """A random direction each filter of which is as long as that of the parameters.

    Li et al., *Visualizing the Loss Landscape of Neural Nets*, arXiv 1712.09913.

    Args:
        params: a tree of arrays, see :func:`filter_norms`.
        key: draws the direction.

    Returns:
        A tree like ``params``; zero for tensors that have no filters.
    """
    flat, unravel = ravel_pytree(params)
    noise = unravel(jax.random.normal(key, flat.shape, flat.dtype))
    return jax.tree.map(
        lambda size, z, norm: jnp.where(size > 0, size * z / norm, 0),
        filter_norms(params),
        noise,
        jax.tree.map(lambda norm: jnp.where(norm > 0, norm, 1), filter_norms(noise)),
    )
