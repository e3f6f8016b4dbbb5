"""Convolutions as XLA's CPU backend runs them fast.

*In one order.* That backend has fast kernels for convolutions whose dimensions come
in one order (batch, space, channels; kernels as space, channels in, channels out). A
pass of its compiler transposes operands until they do, but in the outermost
computation alone: in a branch or in the body of a loop gradients of kernels, whose
dimensions come in another order, stay on loops that are far slower. Here
they are transposed everywhere.

*In portions.* The gradient of a kernel is a sum over all examples and places, taken by
a convolution whose operands are transposed from the first to the last dimension. Whole
mini-batches do not fit into the caches for that; some examples at a time do.

*The switch.* The environment variable ``VSAM_JAX_CONVOLUTIONS`` turns both off (``0``)
and on (``1``, the default).

*The fallback.* Programs are rewritten as jaxprs, of which JAX promises little from one
version to the next. A jaxpr that this module cannot rewrite is left alone: the function
runs as it was written, and the process warns once. The tests of this module were run
with jax 0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.12).
"""

# Annotations that are not evaluated: a name that jax.extend loses must not keep this
# module from being imported.
from __future__ import annotations

import functools
import operator
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend import core

__all__ = ['canonical']

P = ParamSpec('P')
T = TypeVar('T')

_VARIABLE = 'VSAM_JAX_CONVOLUTIONS'


def canonical(
    function: Callable[P, T], *, enabled: bool | None = None
) -> Callable[P, T]:
    """The same function; its convolutions are those that the CPU is fast at.

    The functions of this package that build training steps wrap gradients by
    themselves, and so does a conditional that chooses whether a step is sampled. This
    is for gradients of one's own, ``canonical(jax.grad(loss))``, above all in the
    bodies of ``lax.scan``, ``lax.cond`` and the like: many training steps in one
    ``lax.scan``, say.

    Args:
        function: of pytrees of arrays, which it does not change in place (split an
            module of NNX before). What it calls, and what ``jax.grad`` and its
            relatives make inside of it, is rewritten too; a gradient that is taken of
            the result is not, so wrap last.
        enabled: whether convolutions are rewritten. None, the default, follows the
            environment variable ``VSAM_JAX_CONVOLUTIONS``: ``1`` or not set for yes,
            ``0`` for no. It is read whenever the function is called or traced; a
            program that ``jax.jit`` has compiled stays what it is.

    Returns:
        A function with the same values, to rounding. Gradients of kernels are summed
        in portions of the mini-batch, as many examples at a time as the caches of the
        cores hold, where there is one device (what is spread over several is not cut),
        results are float32 or float64, and channels are not in groups. On other
        backends, and outside of ``jax.jit`` and other transformations that trace, it
        calls ``function``. (A program that is exported for another platform is traced
        on this one, and rewritten.)

        Where the program of ``function`` cannot be rewritten, ``function`` is called
        once more and stays as it is. The first time in a process that this happens it
        gives a ``RuntimeWarning``. What ``function`` raises by itself is passed on.

    Raises:
        TypeError: if ``enabled`` is neither a bool nor None. From the result, when it
            is called with an object of NNX, such as a module, whatever the switch says.
        ValueError: from the result, if ``VSAM_JAX_CONVOLUTIONS`` is needed and neither
            ``0`` nor ``1``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from vsam_jax import convolutions
        >>> x, kernel = jnp.ones((1, 1, 4, 4)), jnp.ones((2, 1, 3, 3))
        >>> loss = lambda kernel: jnp.mean(jax.lax.conv(x, kernel, (1, 1), 'SAME') ** 2)
        >>> def descend(kernel, _):
        ...   return kernel - 0.01 * jax.grad(loss)(kernel), None
        >>> kernel, _ = jax.lax.scan(convolutions.canonical(descend), kernel, length=3)
    """
    if enabled is not None and not isinstance(enabled, bool):
        raise TypeError(f'enabled must be a bool or None, got {enabled!r}.')

    @functools.wraps(function)
    def rewritten(*args: P.args, **kwargs: P.kwargs) -> T:
        _check_pure(args, kwargs)
        is_enabled = _is_enabled() if enabled is None else enabled
        # Not before it is called: to ask for the backend starts it.
        if not is_enabled or not _is_tracing() or jax.default_backend() != 'cpu':
            return function(*args, **kwargs)
        arrays, merge = _split((args, kwargs))
        merge_result: Any = None

        def of_arrays(*arrays: jax.Array) -> list[jax.Array]:
            nonlocal merge_result
            inner: Any = merge(arrays)
            result = function(*inner[0], **inner[1])  # pyright: ignore[reportCallIssue]
            outputs, merge_result = _split(result)
            return outputs

        # What this raises are errors of the function itself.
        program = jax.make_jaxpr(of_arrays)(*arrays)
        fast = _rewrite(program, arrays)
        if fast is None:
            return function(*args, **kwargs)
        return merge_result(fast(*arrays))

    return rewritten


def _is_enabled() -> bool:
    """Whether the environment says that convolutions are rewritten."""
    value = os.environ.get(_VARIABLE, '1')
    if value not in ('0', '1'):
        raise ValueError(
            f'The environment variable {_VARIABLE} must be 1 (convolutions are'
            f' rewritten, as when it is not set) or 0 (they are not), got {value!r}.'
        )
    return value == '1'


def _rewrite(
    program: core.ClosedJaxpr, arrays: Sequence[jax.Array]
) -> Callable[..., list[jax.Array]] | None:
    """The program as a function, with other convolutions.

    Args:
        program: the one to rewrite.
        arrays: its arguments.

    Returns:
        A function of the arguments. It has been traced once, apart from what is being
        traced now, in which nothing has been written down. None, after a warning, for
        a program that cannot be rewritten.
    """
    try:
        rewritten = _in_closed(program, {})
        fast = core.jaxpr_as_fun(rewritten)
        if rewritten is program:  # There was nothing to rewrite.
            return fast
        _check_types(jax.make_jaxpr(fast)(*arrays).out_avals, program.out_avals)
    except Exception as error:  # Whatever a version of jax may raise.
        _warn_once(error)
        return None
    return fast


def _check_types(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """Raises an error if types (shapes, dtypes, shardings) are not those expected."""
    if list(found) != list(expected):
        raise TypeError(f'types {list(expected)} became {list(found)}')


_has_warned = False


def _warn_once(error: Exception) -> None:
    """Warns of the first program in a process that could not be rewritten."""
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    warnings.warn(
        'vsam_jax.convolutions could not rewrite a program for the CPU, and uses it as'
        f' it is: {type(error).__name__}: {error} (jax {jax.__version__}). Values are'
        ' the same; convolutions in branches and loops may be slow. This is said once.'
        f' To silence it set the environment variable {_VARIABLE}=0, or pass'
        ' enabled=False to canonical.',
        RuntimeWarning,
        stacklevel=4,  # Where the wrapped function is called.
    )


def _is_tracing() -> bool:
    """Whether operations are written down here, rather than run one by one."""
    return isinstance(lax.full((), 0.0), Tracer)


def _check_pure(args: Any, kwargs: Any) -> None:
    # Modules, optimizers, metrics, streams of random numbers. Who has one has imported
    # Flax, which this module does not need.
    kind = getattr(sys.modules.get('flax.nnx'), 'Pytree', None)
    if kind is None:
        return
    is_object = lambda x: isinstance(x, kind)
    leaves = jax.tree.leaves((args, kwargs), is_leaf=is_object)
    if found := {type(x).__name__ for x in leaves if is_object(x)}:
        raise TypeError(
            'The function must not be called with objects of NNX, got'
            f' {", ".join(sorted(found))}: it would change a copy. Split them before'
            ' (nnx.split), and merge them inside of the function.'
        )


def _split(tree: Any) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Any]]:
    """The traced arrays in a tree, and what puts others into their places.

    Whatever else there is stays what it is: strings, Python numbers, and arrays with
    values, by which a function may decide what to do.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_array = [isinstance(x, Tracer) and isinstance(x, jax.Array) for x in leaves]
    arrays = [x for x, is_one in zip(leaves, is_array, strict=True) if is_one]
    # No array outlives the call in it: it may be traced.
    others = [None if is_one else x for x, is_one in zip(leaves, is_array, strict=True)]

    def merge(arrays: Sequence[jax.Array]) -> Any:
        given = iter(arrays)
        merged = [
            next(given) if is_one else x
            for x, is_one in zip(others, is_array, strict=True)
        ]
        return jax.tree.unflatten(structure, merged)

    return arrays, merge


# Programs by the identity of those that they stand for, so that what is shared stays
# shared, and is compiled once.
_Memo = dict[int, Any]


def _in_closed(program: core.ClosedJaxpr, memo: _Memo) -> core.ClosedJaxpr:
    if id(program) not in memo:
        inner = _in_jaxpr(program.jaxpr, memo)
        same = inner is program.jaxpr
        memo[id(program)] = program if same else program.replace(jaxpr=inner)
    return memo[id(program)]


def _in_jaxpr(program: core.Jaxpr, memo: _Memo) -> core.Jaxpr:
    """The program with other convolutions, also in programs inside of it."""
    if id(program) not in memo:
        equations = []
        for equation in program.eqns:
            if equation.primitive is core.primitives.conv_general_dilated_p:
                equations.extend(_transposed(equation))
                continue
            params = {k: _in_any(x, memo) for k, x in equation.params.items()}
            same = all(x is equation.params[k] for k, x in params.items())
            equations.append(equation if same else equation.replace(params=params))
        old = program.eqns
        same = len(old) == len(equations) and all(map(operator.is_, old, equations))
        memo[id(program)] = program if same else program.replace(eqns=equations)
    return memo[id(program)]


def _in_any(x: Any, memo: _Memo) -> Any:
    """A parameter of an equation; programs may lie in tuples, as those of ``cond``."""
    if isinstance(x, core.ClosedJaxpr):
        return _in_closed(x, memo)
    if isinstance(x, core.Jaxpr):
        return _in_jaxpr(x, memo)
    if type(x) is tuple:
        mapped = tuple(_in_any(y, memo) for y in x)
        return x if all(map(operator.is_, x, mapped)) else mapped
    return x


def _transposed(equation: core.JaxprEqn) -> list[core.JaxprEqn]:
    """Equations that do what that of a convolution does, in the fast order.

    A gradient of a kernel never has it as JAX makes it.
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
    run = convolve if examples is None else _in_portions(convolve, examples)
    with equation.ctx.manager:  # Of the mesh, for one.
        closed = jax.make_jaxpr(run)(*(x.aval for x in equation.invars))
    # Apart from the axes that a value inside of shard_map varies over: JAX keeps them
    # only while it traces one, and finds them anew when it does so again.
    typed = lambda x: (x.shape, x.dtype, x.weak_type, x.sharding)
    _check_types(
        [typed(x) for x in closed.out_avals], [typed(x.aval) for x in equation.outvars]
    )
    if closed.consts:
        raise NotImplementedError('a convolution became one with constants')
    inside = closed.jaxpr
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
    if jax.device_count() > 1:
        return None  # The examples may be spread over them.
    # Not all cores of a machine need be this process's.
    affinity = getattr(os, 'sched_getaffinity', None)
    return _CACHE * (len(affinity(0)) if affinity else os.cpu_count() or 1)


def _portion(equation: core.JaxprEqn) -> int | None:
    """How many examples to take at a time in the gradient of a kernel.

    None stands for all of them, and for convolutions of another kind.
    """
    cache, params = _cache(), equation.params
    # Typed as any variable's; those of a convolution are arrays.
    variables: list[Any] = [*equation.invars, *equation.outvars]
    inputs, kernel, outputs = (x.aval for x in variables)
    given = params['dimension_numbers']
    if (
        cache is None
        # The sum is over the first axis of both, as that over examples is.
        or (given.lhs_spec[1], given.rhs_spec[1]) != (0, 0)
        or params['feature_group_count'] > 1
        or params['batch_group_count'] > 1
        # The sum is kept in the dtype of the result.
        or outputs.dtype not in (jnp.float32, jnp.float64)
        # Of an axis that a type says is sharded nothing is cut, of a symbolic one
        # nothing is known.
        or not all(
            x.sharding.mesh.empty or x.sharding.mesh.are_all_axes_auto
            for x in (inputs, kernel)
        )
        or not all(type(n) is int for n in (*inputs.shape, *kernel.shape))
    ):
        return None
    examples = inputs.shape[0]
    read = _num_bytes(inputs) + _num_bytes(kernel)
    number = min(-(-read // cache), examples)
    # To add to a sum as large as what is summed takes longer than is won.
    if number < 2 or _num_bytes(outputs) * number > read:
        return None
    return -(-examples // number)


def _num_bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize


def _in_portions(
    convolve: Callable[[jax.Array, jax.Array], jax.Array], examples: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The same sum over the first axis of both arguments, some at a time.

    Args:
        convolve: maps inputs and kernel to their convolution.
        examples: how many at a time.

    Returns:
        A function of the same arguments.
    """

    def summed(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        def portion(start: jax.Array | int, size: int) -> jax.Array:
            cut = lambda x: lax.dynamic_slice_in_dim(x, start, size)
            return convolve(cut(inputs), cut(kernel))

        number, rest = divmod(inputs.shape[0], examples)
        total = portion(0, examples)
        if number > 1:
            add = lambda i, total: total + portion(i * examples, examples)
            total = lax.fori_loop(1, number, add, total)
        return total + portion(number * examples, rest) if rest else total

    return summed


def _move(x: jax.Array, old: Sequence[int], new: Sequence[int]) -> jax.Array:
    """Brings dimensions from the places ``old`` to the places ``new``."""
    return lax.transpose(x, _places(old, new))


def _places(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """For each place of the new order, which of the old one it comes from."""
    return [old[new.index(place)] for place in range(len(new))]
