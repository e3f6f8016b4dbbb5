"""How good a network is on the examples held back."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.data.augmentation import normalize
from experiments.data.examples import Dataset, Split

PyTree = Any

# How many examples are evaluated at once.
_BATCH = 512


def evaluate(model: nn.Module, variables: PyTree, dataset: Dataset) -> dict[str, float]:
    """Accuracies and losses on the examples held back, of each kind there is.

    Args:
        model: the network.
        variables: its parameters, and the statistics of BatchNorm.
        dataset: on devices.

    Returns:
        ``test_accuracy``, ``test_loss`` and the same of the validation examples.
    """
    devices = dataset.test.devices
    assert devices is not None
    splits = {'validation': dataset.validation, 'test': dataset.test}
    splits = {name: split for name, split in splits.items() if split.size}
    totals = {}
    for name, split in splits.items():
        length = min(_BATCH, split.size)
        # So that each device gets the same number of them.
        length += -length % devices.count
        parts = [
            _evaluate_part(
                model, variables, split, dataset.mean, dataset.std, start, length
            )
            for start in range(0, split.size, length)
        ]
        totals[name] = sum(parts[1:], parts[0])
    return {
        f'{name}_{quantity}': float(total) / splits[name].size
        for name, pair in jax.device_get(devices.replicate(totals)).items()
        for quantity, total in zip(('accuracy', 'loss'), pair, strict=True)
    }


@functools.partial(jax.jit, static_argnames=('model', 'length'))
def _evaluate_part(
    model: nn.Module,
    variables: PyTree,
    split: Split,
    mean: jax.Array,
    std: jax.Array,
    start: jax.Array | int,
    length: int,
) -> jax.Array:
    """How many examples from ``start`` on are right, and the sum of their losses."""
    rows = start + jnp.arange(length)
    counts = rows < split.size
    images, labels = split.take(jnp.minimum(rows, split.size - 1))
    images = normalize(images, mean, std)
    logits = jnp.asarray(model.apply(variables, images, train=False))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = logits.argmax(-1) == labels
    # An example that has several labels counts as their mean.
    of_examples = lambda x: x.reshape(length, -1).mean(-1)
    return jnp.stack([jnp.sum(of_examples(x) * counts) for x in (right, losses)])
