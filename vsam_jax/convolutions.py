"""Rewrites convolutions into the form that XLA's CPU backend runs fast.

*Dimension order.* The CPU backend has fast kernels for convolutions with one order of
dimensions (batch, space, channels; kernels as space, channels in, channels out). A
compiler pass transposes operands into that order, but only in the outermost
computation. The gradient of a kernel has another order. In a branch or in the body of
a loop it therefore runs in much slower loops. This module transposes it everywhere.

*Portions.* The gradient of a kernel is a sum over all examples and places. A
convolution computes it, whose operands are transposed from the first to the last
dimension. Whole mini-batches do not fit in the caches for that, but a few examples at
a time do.

*The switch.* The environment variable ``VSAM_JAX_CONVOLUTIONS`` turns both off (``0``)
or on (``1``, the default).

*The fallback.* Programs are rewritten as jaxprs, whose form JAX does not guarantee
between versions. If this module cannot rewrite a jaxpr, the function runs as written,
and the process warns once. The tests of this module were run with jax 0.10.2
(Python 3.11) and 0.12.0.1 (Python 3.12).
"""

# Annotations are not evaluated, so that this module can be imported even if jax.extend
# loses a name.
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
    """Returns the same function with convolutions that run fast on the CPU.

    Take it for your own gradients on the CPU, as ``canonical(jax.grad(loss))``. It
    matters most in the bodies of ``lax.scan``, ``lax.cond`` and the like, for instance
    with many training steps in one ``lax.scan``. The step builders of this package wrap
    gradients already. So does the conditional that chooses whether a step is sampled.

    Args:
        function: a function of pytrees of arrays that changes none in place (split an
            NNX module first). The rewriting covers everything inside it, such as calls
            and ``jax.grad``. It does not cover a gradient taken of the result, so wrap
            last.
        enabled: whether to rewrite convolutions. None, the default, follows the
            environment variable ``VSAM_JAX_CONVOLUTIONS``: ``1`` or unset means yes,
            ``0`` means no. It is read whenever the function is called or traced. A
            program that ``jax.jit`` has compiled does not change.

    Returns:
        A function with the same values, up to rounding. It sums gradients of kernels in
        portions of the mini-batch, as many examples at a time as the caches of the
        cores hold. It does so only with one device (an array spread over several is not
        cut), for float32 or float64 results, and without groups of channels. On other
        backends, and outside ``jax.jit`` and other tracing transformations, it just
        calls ``function``. (A program exported for another platform is traced on this
        one, and rewritten.)

        If the program of ``function`` cannot be rewritten, ``function`` is called again
        and runs unchanged. The first time this happens in a process, it issues a
        ``RuntimeWarning``. Errors raised by ``function`` itself are passed on.

    Raises:
        TypeError: if ``enabled`` is neither a bool nor None. From the result: if you
            call it with an NNX object, such as a module, whatever the switch says.
        ValueError: from the result, if ``VSAM_JAX_CONVOLUTIONS`` is used and is neither
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
        # Only when called, because asking for the backend starts it.
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

        # Errors raised here are those of the function itself.
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
    """Returns the program as a function, with rewritten convolutions.

    Args:
        program: the program to rewrite.
        arrays: its arguments.

    Returns:
        A function of the arguments. It has been traced once on its own, without a
        trace in the program that is being traced now. None, after a warning, if the
        program cannot be rewritten.
    """
    try:
        rewritten = _in_closed(program, {})
        fast = core.jaxpr_as_fun(rewritten)
        if rewritten is program:  # There was nothing to rewrite.
            return fast
        _check_types(jax.make_jaxpr(fast)(*arrays).out_avals, program.out_avals)
    except Exception as error:  # A version of jax may raise anything.
        _warn_once(error)
        return None
    return fast


def _check_types(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """Raises if types (shapes, dtypes, shardings) are not the expected ones."""
    if list(found) != list(expected):
        raise TypeError(f'types {list(expected)} became {list(found)}')


_has_warned = False


def _warn_once(error: Exception) -> None:
    """Warns about the first program in a process that could not be rewritten."""
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    warnings.warn(
        'vsam_jax.convolutions could not rewrite a program for the CPU, and uses it as'
        f' it is: {type(error).__name__}: {error} (jax {jax.__version__}). Values are'
        ' the same; convolutions in branches and loops may be slow. This warning comes'
        f' once. To silence it set the environment variable {_VARIABLE}=0, or pass'
        ' enabled=False to canonical.',
        RuntimeWarning,
        stacklevel=4,  # Where the wrapped function is called.
    )


def _is_tracing() -> bool:
    """Whether operations are being traced, rather than run one by one."""
    return isinstance(lax.full((), 0.0), Tracer)


def _check_pure(args: Any, kwargs: Any) -> None:
    # Modules, optimizers, metrics, random-number streams. A caller who has one has
    # imported Flax, so this module need not import it.
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
    """The traced arrays in a tree, and a function that puts others in their places.

    Everything else stays as it is: strings, Python numbers, and arrays with known
    values, on which a function may branch.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_array = [isinstance(x, Tracer) and isinstance(x, jax.Array) for x in leaves]
    arrays = [x for x, is_one in zip(leaves, is_array, strict=True) if is_one]
    # Keeps no array in the closure beyond the call, since it may be traced.
    others = [None if is_one else x for x, is_one in zip(leaves, is_array, strict=True)]

    def merge(arrays: Sequence[jax.Array]) -> Any:
        given = iter(arrays)
        merged = [
            next(given) if is_one else x
            for x, is_one in zip(others, is_array, strict=True)
        ]
        return jax.tree.unflatten(structure, merged)

    return arrays, merge


# Maps the id of a program to its rewritten form, so that shared programs stay shared
# and are compiled once.
_Memo = dict[int, Any]


def _in_closed(program: core.ClosedJaxpr, memo: _Memo) -> core.ClosedJaxpr:
    if id(program) not in memo:
        inner = _in_jaxpr(program.jaxpr, memo)
        same = inner is program.jaxpr
        memo[id(program)] = program if same else program.replace(jaxpr=inner)
    return memo[id(program)]


def _in_jaxpr(program: core.Jaxpr, memo: _Memo) -> core.Jaxpr:
    """The program with rewritten convolutions, also in programs inside it."""
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
    """A rewritten parameter of an equation; ``cond`` has tuples of programs."""
    if isinstance(x, core.ClosedJaxpr):
        return _in_closed(x, memo)
    if isinstance(x, core.Jaxpr):
        return _in_jaxpr(x, memo)
    if type(x) is tuple:
        mapped = tuple(_in_any(y, memo) for y in x)
        return x if all(map(operator.is_, x, mapped)) else mapped
    return x


def _transposed(equation: core.JaxprEqn) -> list[core.JaxprEqn]:
    """Equations that compute the same convolution in the fast dimension order.

    JAX never creates the gradient of a kernel in that order.
    """
    given = equation.params['dimension_numbers']
    number = len(given.lhs_spec)
    space = tuple(range(1, number - 1))
    # A spec lists the dimensions of batch (for kernels, outputs), then channels (for
    # kernels, inputs), then space.
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
    with equation.ctx.manager:  # For instance, the mesh.
        closed = jax.make_jaxpr(run)(*(x.aval for x in equation.invars))
    # Does not compare the axes that a value inside shard_map varies over: JAX keeps
    # them only while it traces shard_map, and infers them again the next time.
    typed = lambda x: (x.shape, x.dtype, x.weak_type, x.sharding)
    _check_types(
        [typed(x) for x in closed.out_avals], [typed(x.aval) for x in equation.outvars]
    )
    if closed.consts:
        raise NotImplementedError('a convolution became one with constants')
    inside = closed.jaxpr
    # Its equations, with the variables of the equation that they replace.
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


# The cache of a core, in bytes. Half and twice as much differed by only a few percent
# where this was measured.
_CACHE = 2**20


def _cache() -> int | None:
    """How many bytes of operands a portion holds; None for no portions."""
    if jax.device_count() > 1:
        return None  # The examples may be spread over the devices.
    # This process may be limited to some cores of the machine.
    affinity = getattr(os, 'sched_getaffinity', None)
    return _CACHE * (len(affinity(0)) if affinity else os.cpu_count() or 1)


def _portion(equation: core.JaxprEqn) -> int | None:
    """How many examples to process at a time in the gradient of a kernel.

    None means all of them. It is also returned for other convolutions.
    """
    cache, params = _cache(), equation.params
    # Their avals have a general type, but those of a convolution are arrays.
    variables: list[Any] = [*equation.invars, *equation.outvars]
    inputs, kernel, outputs = (x.aval for x in variables)
    given = params['dimension_numbers']
    if (
        cache is None
        # A sum over examples is one over the first axis of both.
        or (given.lhs_spec[1], given.rhs_spec[1]) != (0, 0)
        or params['feature_group_count'] > 1
        or params['batch_group_count'] > 1
        # The sum is kept in the dtype of the result.
        or outputs.dtype not in (jnp.float32, jnp.float64)
        # An axis whose type says that it is sharded cannot be cut, and the size of a
        # symbolic axis is unknown.
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
    # Adding to a sum as large as the operands would cost more time than it saves.
    if number < 2 or _num_bytes(outputs) * number > read:
        return None
    return -(-examples // number)


def _num_bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize


def _in_portions(
    convolve: Callable[[jax.Array, jax.Array], jax.Array], examples: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The same sum over the first axis of both arguments, some examples at a time.

    Args:
        convolve: maps inputs and kernel to their convolution.
        examples: how many examples at a time.

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
    """Moves dimensions from the places ``old`` to the places ``new``."""
    return lax.transpose(x, _places(old, new))


def _places(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """For each place in the new order, its place in the old order."""
    return [old[new.index(place)] for place in range(len(new))]
