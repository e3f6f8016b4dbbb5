"""Quantization-aware training of any network, without a second version of it.

:func:`quantize` wraps a network. Each of its convolutions and dense layers, those
inside of attention too, then sees its kernel and its input on grids with learned steps
(:mod:`.lsq`); all else, BatchNorm and biases and the products of attention,
stays as it is. The first and the last layer get 8 bits. The grid of an input has no
negative numbers where the input cannot be negative, as after a ReLU.

Parameters keep their paths. A layer has two more, ``kernel_quantizer/step`` and
``input_quantizer/step``. ``init`` starts these from the kernel and from the images that
it is given, so give it a batch of training images, in training mode.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import traverse_util
from flax.linen.dtypes import promote_dtype
from flax.linen.module import InterceptorContext

from experiments.models import lsq
from experiments.models.layer_inputs import nonnegative_inputs

PyTree = Any

BITS = (2, 3, 4, 8)
# Of the first and the last layer.
_EDGE_BITS = 8

KERNEL_QUANTIZER = 'kernel_quantizer'
INPUT_QUANTIZER = 'input_quantizer'


class Layer(NamedTuple):
    """How one layer is quantized.

    Attributes:
        path: where it stands in the network.
        bits: of its kernel and its input.
        signed_input: whether its input may be negative; a kernel always may.
    """

    path: tuple[str, ...]
    bits: int
    signed_input: bool


@dataclasses.dataclass(frozen=True)
class QuantizedOperands:
    """What a Flax layer that is to be quantized takes as its ``promote_dtype``.

    ``nn.Dense(10, promote_dtype=QuantizedOperands(bits=4))`` is a quantized dense
    layer, and so with a convolution.

    Attributes:
        bits: of kernel and input.
        signed_input: whether the input may be negative.
    """

    bits: int
    signed_input: bool = True

    def __call__(
        self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, dtype: Any
    ) -> list[Any]:
        """Input and kernel on their grids; called by the layer, inside of it."""
        kernel = lsq.Quantizer(self.bits, signed=True, name=KERNEL_QUANTIZER)(kernel)
        x = lsq.Quantizer(
            self.bits, self.signed_input, has_batch=True, name=INPUT_QUANTIZER
        )(x)
        return promote_dtype(x, kernel, bias, dtype=dtype)


class Quantized(nn.Module):
    """A network whose layers are quantized; its variables are the network's, and steps.

    Attributes:
        network: the network, called as ``network(images, train)``.
        layers: how which of its layers are quantized.
    """

    network: nn.Module
    layers: tuple[Layer, ...]

    def setup(self) -> None:
        """Leaves no trace of the wrapper in the paths of variables."""
        nn.share_scope(self, self.network)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""

        def quantized(module: Any, layer: Layer, *args: Any, **kwargs: Any) -> Any:
            operands = QuantizedOperands(layer.bits, layer.signed_input)
            # In the place of the layer, with the same parameters.
            copy = module.clone(parent=module.scope, promote_dtype=operands)
            return copy(*args, **kwargs)

        with replaced(self.layers, quantized):
            return self.network(x, train)


def replaced(
    layers: Iterable[Layer], function: Callable[..., Any]
) -> contextlib.AbstractContextManager[None]:
    """While the context lasts, calls of these layers are calls of a function.

    Args:
        layers: which layers. One that is quantized already stays as it is.
        function: ``function(module, layer, *args, **kwargs)`` returns what the call
            of the layer is to return; ``module`` is the Flax module.

    Returns:
        A context manager.
    """
    layer_at = {layer.path: layer for layer in layers}

    def call(
        next_function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        module: Any = context.module
        layer = layer_at.get(module.path)
        if (
            layer is None
            or context.method_name != '__call__'
            or isinstance(module.promote_dtype, QuantizedOperands)
        ):
            return next_function(*args, **kwargs)
        return function(module, layer, *args, **kwargs)

    return nn.intercept_methods(call)


def quantize(
    network: nn.Module, image_shape: tuple[int, ...], bits: int = 0
) -> nn.Module:
    """The same network with weights and activations of a few bits.

    Args:
        network: a network, called as ``network(images, train)``.
        image_shape: height, width and channels of an image.
        bits: of the kernel and the input of each layer but the first and the last,
            which have 8: 2, 3, 4 or 8. 0 leaves the network as it is.

    Returns:
        A network that is called in the same way.

    Raises:
        ValueError: for other numbers of bits.
    """
    if isinstance(bits, bool) or bits not in (0, *BITS):
        raise ValueError(
            f'bits must be one of {", ".join(map(str, BITS))}, or 0 for full precision;'
            f' got {bits!r}.'
        )
    if bits == 0:
        return network
    nonnegative = nonnegative_inputs(network, image_shape)
    paths = list(nonnegative)
    edges = paths[:1] + paths[-1:]
    return Quantized(
        network,
        tuple(
            Layer(path, _EDGE_BITS if path in edges else bits, not nonnegative[path])
            for path in paths
        ),
    )


def is_step_size(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at this path is the step of a grid."""
    return path[-1] == 'step' and path[-2] in (KERNEL_QUANTIZER, INPUT_QUANTIZER)


def all_but_step_sizes(params: PyTree) -> PyTree:
    """A mask of the parameters that a network has in full precision too.

    Args:
        params: nested dictionaries of parameters.

    Returns:
        A tree of booleans like ``params``, as ``perturb_mask`` of
        :func:`vsam_jax.vsam` takes it.
    """
    return traverse_util.path_aware_map(lambda path, _: not is_step_size(path), params)
