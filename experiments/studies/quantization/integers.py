"""A quantized network in whole numbers, as a device without floating point runs it.

:func:`export` makes the weights integers. :func:`apply` runs a network with them: each
quantized layer rounds its input to integers, multiplies and sums integers, and scales
the sums by both steps once. What is between the layers stays as it was.
"""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.models import lsq
from experiments.models.quantization import (
    INPUT_QUANTIZER,
    KERNEL_QUANTIZER,
    Layer,
    Quantized,
    replaced,
)

PyTree = Any


def export(model: Quantized, variables: PyTree) -> PyTree:
    """The variables of a quantized network with integers for weights.

    Args:
        model: the network.
        variables: its variables.

    Returns:
        A tree like ``variables`` in which the kernel of each quantized layer is int8,
        in steps of ``kernel_quantizer/step``, and the steps are positive. Numbers of
        fewer bits fill a part of the range.
    """
    # The dictionaries are new, so the caller's stay as they are.
    exported = jax.tree.map(jnp.asarray, variables)
    for layer in model.layers:
        params = _at(exported['params'], layer.path)
        for quantizer in (KERNEL_QUANTIZER, INPUT_QUANTIZER):
            params[quantizer]['step'] = lsq.positive(params[quantizer]['step'])
        params['kernel'] = lsq.to_levels(
            params['kernel'],
            params[KERNEL_QUANTIZER]['step'],
            *lsq.levels(layer.bits, signed=True),
        ).astype(jnp.int8)
    return exported


def apply(model: Quantized, exported: PyTree, x: jax.Array) -> jax.Array:
    """Runs a network whose weights are integers, in evaluation mode.

    Sums are int32, which holds those of 65,000 products of 8 bits each.

    Args:
        model: the quantized network.
        exported: its variables, from :func:`export`.
        x: images [batch, height, width, channels].

    Returns:
        Logits [batch, classes]: those of ``model.apply`` but for rounding.
    """

    def in_integers(module: Any, layer: Layer, x: jax.Array) -> jax.Array:
        params = _at(exported['params'], layer.path)
        step = params[INPUT_QUANTIZER]['step']
        integers = lsq.to_levels(
            x, step, *lsq.levels(layer.bits, layer.signed_input)
        ).astype(jnp.int32)
        # The same layer of its own, with nothing but the sums of products.
        sums = module.clone(
            parent=None, use_bias=False, promote_dtype=_as_they_are
        ).apply({'params': {'kernel': params['kernel'].astype(jnp.int32)}}, integers)
        y = sums * (step * params[KERNEL_QUANTIZER]['step']) + params.get('bias', 0)
        return y.astype(module.dtype or y.dtype)

    with replaced(model.layers, in_integers):
        return jnp.asarray(model.network.apply(exported, x, train=False))


def _at(params: PyTree, path: tuple[str, ...]) -> PyTree:
    for key in path:
        params = params[key]
    return params


def _as_they_are(*arrays: Any, **_: Any) -> tuple[Any, ...]:
    return arrays
