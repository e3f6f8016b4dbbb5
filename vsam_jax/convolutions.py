"""Convolutions as XLA's CPU backend runs them fast.

*In one order.* That backend has fast kernels for convolutions whose dimensions come
in one order (batch, space, channels; kernels as space, channels in, channels out). A
pass of its compiler transposes operands until they do, but in the outermost
computation alone: in a branch or in the body of a loop gradients of kernels, whose
dimensions come in another order, stay on loops that are tens of times slower. Here
they are transposed everywhere.

*In portions.* The gradient of a kernel is a sum over all examples and places, taken by
a convolution whose operands are transposed from the first to the last dimension. Whole
mini-batches do not fit into the caches for that; taken some examples at a time it is
about twice as fast.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

P = ParamSpec('P')
T = TypeVar('T')


def canonical(function: Callable[P, T]) -> Callable[P, T]:
    """The same function; its convolutions are those that the CPU is fast at.

    The functions of this package that build training steps wrap gradients by
    themselves, and so does a conditional that chooses whether a step is sampled. This
    is for gradients of one's own, ``canonical(jax.grad(loss))``, above all in the
    bodies of ``lax.scan``, ``lax.cond`` and the like: many training steps in one
    ``lax.scan``, say.

    Args:
        function: of pytrees of arrays. What it calls, and what ``jax.grad`` and its
            relatives make inside of it, is rewritten too; a gradient that is taken of
            the result is not, so wrap last.

    Returns:
        A function with the same values, to rounding. Gradients of kernels are summed
        in portions of the mini-batch, as many examples at a time as the caches of the
        cores hold, where there is one device (one that is sharded could not be cut). On
        other backends, and where ``jax.disable_jit`` lets operations run one by one,
        it calls ``function``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from vsam_jax import convolutions
        >>> conv, x = nn.Conv(2, (3, 3)), jnp.ones((1, 4, 4, 1))
        >>> params = conv.init(jax.random.key(0), x)
        >>> gradient = jax.grad(lambda params: jnp.sum(conv.apply(params, x) ** 2))
        >>> def descend(params, _):
        ...   step = lambda p, g: p - 0.01 * g
        ...   return jax.tree.map(step, params, gradient(params)), None
        >>> params, _ = jax.lax.scan(convolutions.canonical(descend), params, length=3)
    """

    @functools.wraps(function)
    def rewritten(*args: P.args, **kwargs: P.kwargs) -> T:
        # Not before it is called: to ask for the backend starts it.
        jit_is_off = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
        if jit_is_off or jax.default_backend() != 'cpu':
            return function(*args, **kwargs)
        leaves, structure = jax.tree.flatten((args, kwargs))
        # Whatever else there is stays what it is to the function.
        is_array = [isinstance(x, (jax.Array, np.ndarray)) for x in leaves]
        arrays = [x for x, is_one in zip(leaves, is_array, strict=True) if is_one]

        def of_arrays(*arrays: jax.Array) -> T:
            given = iter(arrays)
            mixed = [
                next(given) if is_one else x
                for x, is_one in zip(leaves, is_array, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(structure, mixed)
            return function(*args, **kwargs)  # pyright: ignore[reportCallIssue]

        program, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
        outputs = core.jaxpr_as_fun(_in_closed(program))(*arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return rewritten


def _in_closed(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
    return program.replace(jaxpr=_in_jaxpr(program.jaxpr))


def _in_jaxpr(program: core.Jaxpr) -> core.Jaxpr:
    """The program with other convolutions, also in programs inside of it."""
    equations = []
    for equation in program.eqns:
        if equation.primitive is core.primitives.conv_general_dilated_p:
            equations.extend(_transposed(equation))
        else:
            params = {name: _in_any(x) for name, x in equation.params.items()}
            equations.append(equation.replace(params=params))
    return program.replace(eqns=equations)


def _in_any(x: Any) -> Any:
    """A parameter of an equation; programs may lie in tuples, as those of ``cond``."""
    if isinstance(x, core.ClosedJaxpr):
        return _in_closed(x)
    if isinstance(x, core.Jaxpr):
        return _in_jaxpr(x)
    return tuple(map(_in_any, x)) if type(x) is tuple else x


def _transposed(equation: core.JaxprEqn) -> list[core.JaxprEqn]:
    """Equations that do what that of a convolution does, in the fast order.

    One that has the fast order is left whole: it is no gradient of a kernel.
    """
    given = equation.params['dimension_numbers']
    number = len(given.lhs_spec)
    space = tuple(range(1, number - 1))
    # JAX names the dimensions of batch (of outputs, for kernels), then channels (of
    # inputs), then space.
    fast = lax.ConvDimensionNumbers(
        lhs_spec=(0, number - 1, *space),
        rhs_spec=(number - 1, number - 2, *range(number - 2)),
        out_spec=(0, number - 1, *space),
    )
    if given == fast:
        return [equation]
    params = {**equation.params, 'dimension_numbers': fast}
    sharding = params['out_sharding']
    if sharding is not None:
        axes = [*sharding.spec, *[None] * (number - len(sharding.spec))]
        moved = _places(given.out_spec, fast.out_spec)
        spec = sharding.spec.update(partitions=tuple(axes[place] for place in moved))
        params['out_sharding'] = sharding.update(spec=spec)

    def convolve(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        outputs = equation.primitive.bind(
            _move(inputs, given.lhs_spec, fast.lhs_spec),
            _move(kernel, given.rhs_spec, fast.rhs_spec),
            **params,
        )
        return _move(outputs, fast.out_spec, given.out_spec)

    examples = _portion(equation)
    axes = (given.lhs_spec[1], given.rhs_spec[1])
    run = convolve if examples is None else _in_portions(convolve, axes, examples)
    inside = jax.make_jaxpr(run)(*(x.aval for x in equation.invars)).jaxpr
    # Its equations, between the variables of the one that they stand for.
    names = dict(zip(inside.invars, equation.invars, strict=True))
    names |= dict(zip(inside.outvars, equation.outvars, strict=True))
    renamed = lambda xs: [
        x if isinstance(x, core.Literal) else names.get(x, x) for x in xs
    ]
    return [
        e.replace(
            invars=renamed(e.invars),
            outvars=renamed(e.outvars),
            source_info=equation.source_info,
            ctx=equation.ctx,
        )
        for e in inside.eqns
    ]


# What a core keeps close to it, in bytes. Half and twice as much were within a few
# percent where it was measured.
_CACHE = 2**20


def _cache() -> int | None:
    """Bytes of operands that are worth a portion, None for no portions."""
    # On several devices the examples may be spread over them.
    return _CACHE * (os.cpu_count() or 1) if jax.device_count() == 1 else None


def _portion(equation: core.JaxprEqn) -> int | None:
    """How many of the terms that a convolution sums to take at a time, None for all.

    The terms are the input channels of the convolution: in the gradient of a kernel
    the examples.
    """
    cache, params = _cache(), equation.params
    # Typed as any variable's; those of a convolution are arrays.
    variables: list[Any] = [*equation.invars, *equation.outvars]
    inputs, kernel, outputs = (x.aval for x in variables)
    if (
        cache is None
        or params['feature_group_count'] > 1
        or params['batch_group_count'] > 1
        # The sum is kept in the dtype of the result.
        or outputs.dtype not in (jnp.float32, jnp.float64)
        or not all(x.sharding.mesh.empty for x in (inputs, kernel))
    ):
        return None
    terms = inputs.shape[params['dimension_numbers'].lhs_spec[1]]
    read = _num_bytes(inputs) + _num_bytes(kernel)
    examples = max(1, cache * terms // max(1, read))
    # In other convolutions, of many channels say, the sum is as large as what is
    # summed, and to add to it time and again takes longer than is won.
    added = _num_bytes(outputs) * (terms // examples)
    return examples if terms >= 2 * examples and added <= read else None


def _num_bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize


def _in_portions(
    convolve: Callable[[jax.Array, jax.Array], jax.Array],
    axes: tuple[int, int],
    examples: int,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The same sum, ``examples`` of its terms at a time.

    Args:
        convolve: maps inputs and kernel to their convolution.
        axes: of inputs and of kernel, along which there is one term an index.
        examples: how many at a time.

    Returns:
        A function of the same arguments.
    """

    def summed(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        def portion(start: jax.Array | int, size: int) -> jax.Array:
            cut = lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis)
            return convolve(cut(inputs, axes[0]), cut(kernel, axes[1]))

        number, rest = divmod(inputs.shape[axes[0]], examples)
        add = lambda i, total: total + portion(i * examples, examples)
        total = lax.fori_loop(1, number, add, portion(0, examples))
        return total + portion(number * examples, rest) if rest else total

    return summed


def _move(x: jax.Array, old: Sequence[int], new: Sequence[int]) -> jax.Array:
    """Brings dimensions from the places ``old`` to the places ``new``."""
    return lax.transpose(x, _places(old, new))


def _places(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """For each place of the new order, which of the old one it comes from."""
    return [old[new.index(place)] for place in range(len(new))]
