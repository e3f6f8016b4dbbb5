"""What can be known of the inputs of a network's layers without running it."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.module import InterceptorContext
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

# Layers with a kernel that multiplies their input.
LAYERS = (nn.Conv, nn.Dense, nn.DenseGeneral)

# Operations that give no negative number if none goes in (a loop, a branch and what
# else is not named here may give any) …
_KEEP = frozenset(
    (
        *('add', 'div', 'max', 'min', 'mul', 'convert_element_type', 'copy', 'name'),
        *('reduce_max', 'reduce_min', 'reduce_sum'),
        *('reduce_window_max', 'reduce_window_sum'),
        *('broadcast_in_dim', 'concatenate', 'pad', 'reshape', 'slice', 'squeeze'),
        'transpose',
    )
)
# … those that never do, and those that run another program.
_MAKE = frozenset(('abs', 'exp', 'logistic', 'square'))
_CALL = frozenset(('custom_jvp_call', 'custom_vjp_call', 'jit', 'pjit', 'remat2'))

_MARK = 'input of layer '


def nonnegative_inputs(
    network: nn.Module, image_shape: tuple[int, ...]
) -> dict[tuple[str, ...], bool]:
    """Which layers of a network have inputs that cannot be negative.

    That is read off the operations between the layers: a ReLU's output is such an
    input, and so is what pooling, sums and means make of it.

    Args:
        network: a network, called as ``network(images, train)``.
        image_shape: height, width and channels of an image.

    Returns:
        For the path of each convolution and dense layer, in the order in which they
        are called, whether its input is known to hold no negative number.
    """
    paths: list[tuple[str, ...]] = []

    def mark(
        next_function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        module = context.module
        if isinstance(module, LAYERS) and context.method_name == '__call__':
            x, *others = args
            args = (checkpoint_name(x, f'{_MARK}{len(paths)}'), *others)
            paths.append(module.path)
        return next_function(*args, **kwargs)

    def forward(key: jax.Array, images: jax.Array) -> Any:
        with nn.intercept_methods(mark):
            return network.init_with_output(key, images, train=True)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    program = jax.make_jaxpr(forward)(jax.random.key(0), images).jaxpr
    found: dict[int, bool] = {}
    _follow(program, [False] * len(program.invars), found)
    inputs: dict[tuple[str, ...], bool] = {}
    for number, path in enumerate(paths):
        # A layer may be called more than once.
        inputs[path] = inputs.get(path, True) and found.get(number, False)
    return inputs


def _follow(
    program: core.Jaxpr, given: Sequence[bool], found: dict[int, bool]
) -> list[bool]:
    """Whether the outputs of a program cannot be negative; notes the marked values."""
    known: dict[Any, bool] = dict(zip(program.invars, given, strict=True))

    def is_known(value: Any) -> bool:
        if isinstance(value, core.Literal):
            return bool(np.all(np.asarray(value.val) >= 0))
        return known.get(value, False)

    for equation in program.eqns:
        name, params = equation.primitive.name, equation.params
        inputs = [is_known(value) for value in equation.invars]
        if name in _CALL:
            inner: Any = params.get('jaxpr', params.get('call_jaxpr'))
            outputs = _follow(getattr(inner, 'jaxpr', inner), inputs, found)
        elif name == 'max':
            outputs = [any(inputs)]
        else:
            outputs = [name in _MAKE or (name in _KEEP and all(inputs))]
            outputs *= len(equation.outvars)
        if name == 'name' and params['name'].startswith(_MARK):
            found[int(params['name'].removeprefix(_MARK))] = inputs[0]
        known.update(zip(equation.outvars, outputs, strict=True))
    return [is_known(value) for value in program.outvars]
