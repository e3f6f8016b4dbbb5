"""The mini-batches of a run, which follow from its seed alone."""

from typing import Any

import jax
import numpy as np

from experiments.common.devices import Devices
from experiments.data import examples
from experiments.data.augmentation import Augmentation
from experiments.data.examples import Dataset, Epoch, Split

PyTree = Any


class Batches:
    """Examples on the devices, and the order in which runs see them.

    Args:
        dataset: the data set, anywhere.
        augmentation: how training images are changed at random.
        batch_size: examples of a mini-batch.
        devices: where the examples are to be.

    Attributes:
        dataset: the data set, with true labels, on the devices.
        augmentation: as above.
        batch_size: as above.
        devices: as above.
        steps_per_epoch: full batches of an epoch.

    Raises:
        ValueError: if there is no such batch on these devices.
    """

    def __init__(
        self,
        dataset: Dataset,
        augmentation: Augmentation,
        batch_size: int,
        devices: Devices,
    ):
        if batch_size % devices.count:
            raise ValueError(
                'batch_size must be a multiple of the number of devices,'
                f' {devices.count}, got {batch_size}.'
            )
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.devices = devices
        self.steps_per_epoch = examples.steps_per_epoch(dataset.train.size, batch_size)
        self.dataset = dataset.on(devices)

    def epoch(self, seed: int, epoch: int) -> Epoch:
        """What the batches of an epoch follow from, a function of both numbers."""
        order = examples.epoch_order(
            stream(seed, 1),
            epoch,
            num_examples=self.dataset.train.size,
            batch_size=self.batch_size,
        )
        key = examples.epoch_key(stream(seed, 2), epoch)
        return self.devices.replicate(Epoch(order, key))

    def take(self, split: Split, epoch: Epoch, index: int) -> PyTree:
        """One batch of an epoch; all epochs have the same number of them.

        Args:
            split: the training examples, with right labels or with those of a run.
            epoch: from :meth:`epoch`.
            index: which of its batches.
        """
        return examples.take_batch(
            split,
            self.dataset.mean,
            self.dataset.std,
            epoch.order,
            np.int32(index % self.steps_per_epoch),
            epoch.key,
            augmentation=self.augmentation,
        )


def stream(seed: int, number: int) -> jax.Array:
    """A key of its own for each use that a run makes of its seed."""
    key = jax.random.key(seed, impl='threefry2x32')
    return jax.random.fold_in(key, number)
