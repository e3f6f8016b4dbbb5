"""Convolutions that XLA's CPU backend runs fast inside conditionals and loops.

That backend has fast kernels for convolutions whose dimensions come in one order
(batch, space, channels; kernels as space, channels in, channels out). A pass of its
compiler transposes operands until they do, but in the outermost computation alone:
in a branch or in the body of a loop gradients of kernels, whose dimensions come in
another order, stay on loops that are tens of times slower. So what goes into a branch
or a loop is rewritten here, with the same transpositions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax import lax
from jax.extend import core

P = ParamSpec('P')
T = TypeVar('T')


def canonical(function: Callable[P, T]) -> Callable[P, T]:
    """The same function; its convolutions have the fast order of dimensions.

    For the bodies of ``lax.scan``, ``lax.cond`` and the like on the CPU: the steps
    and gradients of this package wrap what they put there by themselves, so this is
    for loops of one's own, such as many training steps in one ``lax.scan``.

    Args:
        function: of pytrees of arrays. What it calls, and what ``jax.grad`` and its
            relatives make inside of it, is rewritten too; a gradient that is taken of
            the result is not, so wrap last.

    Returns:
        A function with the same values, to rounding. On other backends, and where
        ``jax.disable_jit`` lets operations run one by one, it calls ``function``.

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
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
        evaluate = core.jaxpr_as_fun(_in_closed(program))
        outputs = evaluate(*jax.tree.leaves((args, kwargs)))
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
    """Equations that do what that of a convolution does, in the fast order."""
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

    inside = jax.make_jaxpr(convolve)(*(x.aval for x in equation.invars)).jaxpr
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


def _move(x: jax.Array, old: Sequence[int], new: Sequence[int]) -> jax.Array:
    """Brings dimensions from the places ``old`` to the places ``new``."""
    return lax.transpose(x, _places(old, new))


def _places(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """For each place of the new order, which of the old one it comes from."""
    return [old[new.index(place)] for place in range(len(new))]
