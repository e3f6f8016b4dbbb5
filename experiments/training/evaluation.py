"""How good a network is on the examples held back."""

import functools
from collections.abc import Mapping
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
# Of equal width, that confidences are sorted into.
BINS = 15


def evaluate(model: nn.Module, variables: PyTree, dataset: Dataset) -> dict[str, float]:
    """How good a network is on the examples held back, of each kind there is.

    Args:
        model: the network.
        variables: its parameters, and the statistics of BatchNorm.
        dataset: on devices.

    Returns:
        ``test_accuracy``, ``test_loss`` and ``test_calibration_error``, and the same of
        the validation examples; see :func:`evaluate_splits`.
    """
    splits = {'validation': dataset.validation, 'test': dataset.test}
    return evaluate_splits(model, variables, dataset, splits)


def evaluate_splits(
    model: nn.Module, variables: PyTree, dataset: Dataset, splits: Mapping[str, Split]
) -> dict[str, float]:
    r"""How good a network is on some examples.

    Args:
        model: the network.
        variables: its parameters, and the statistics of BatchNorm.
        dataset: on devices; what images are normalised with.
        splits: by name, examples on these devices; empty ones are left out.

    Returns:
        For each split its ``{name}_accuracy``; ``{name}_loss``, the mean of −log p of
        the labels (the NLL); and ``{name}_calibration_error``, the expected calibration
        error over :data:`BINS` bins of equal width,

        .. math:: \frac{1}{N} \sum_b \Big| \sum_{i \in b} (p_i - r_i) \Big| ,

        where :math:`p_i` is the highest probability of an example, by which it belongs
        to a bin, and :math:`r_i` is 1 if that class is right and 0 if not.
    """
    devices = dataset.test.devices
    assert devices is not None
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
    found = {}
    for name, total in jax.device_get(devices.replicate(totals)).items():
        right, loss, *excess = total / splits[name].size
        found[f'{name}_accuracy'] = float(right)
        found[f'{name}_loss'] = float(loss)
        found[f'{name}_calibration_error'] = float(sum(map(abs, excess)))
    return found


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
    """Sums over examples from ``start`` on.

    Returns:
        float32 [2 + BINS]: how many are right, their losses, and for each bin of
        confidence how much there is more of it than there are right ones.
    """
    rows = start + jnp.arange(length)
    counts = rows < split.size
    images, labels = split.take(jnp.minimum(rows, split.size - 1))
    images = normalize(images, mean, std)
    logits = jnp.asarray(model.apply(variables, images, train=False))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = logits.argmax(-1) == labels
    confidence = jax.nn.softmax(logits).max(-1)
    bins = jnp.minimum(jnp.floor(confidence * BINS).astype(jnp.int32), BINS - 1)
    # An example that has several labels counts as their mean.
    positions = labels.size // length
    weights = counts.reshape(-1, *[1] * (labels.ndim - 1)) / positions
    excess = jnp.zeros(BINS).at[bins].add((confidence - right) * weights)
    sums = jnp.stack([jnp.sum(x * weights) for x in (right, losses)])
    return jnp.concatenate([sums, excess])
