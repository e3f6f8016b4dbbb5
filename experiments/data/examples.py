"""Examples on the devices, and the batches of an epoch."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.devices import Devices
from experiments.data import augmentation as augmentations
from experiments.data.augmentation import Augmentation, normalize


class Epoch(NamedTuple):
    """What the batches of an epoch follow from.

    Attributes:
        order: int32 array [steps, batch size], from :func:`epoch_order`.
        key: from :func:`epoch_key`.
    """

    order: jax.Array
    key: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('images', 'labels'),
    meta_fields=('devices',),
)
@dataclasses.dataclass(frozen=True)
class Split:
    """Examples of one purpose.

    Attributes:
        images: uint8 array [N, height, width, channels]; where it is on devices,
            each has its share, and black images make the shares equal.
        labels: int32 array [N], or [N, positions] where each position of an example
            has a label.
        devices: the devices that the arrays are on; None on the host.
    """

    images: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray
    devices: Devices | None = None

    @property
    def size(self) -> int:
        """N."""
        return self.labels.shape[0]

    def on(self, devices: Devices) -> 'Split':
        """This split on devices; itself if it is there."""
        if self.devices == devices:
            return self
        images, labels = np.asarray(self.images)[: self.size], np.asarray(self.labels)
        return Split(devices.share(images), devices.replicate(labels), devices)

    def take(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images and labels of some examples: the number of devices divides theirs."""
        images, labels = jnp.asarray(self.images), jnp.asarray(self.labels)
        if self.devices is None:
            return images[rows], labels[rows]
        return self.devices.take(images, rows), self.devices.spread(labels[rows])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification task.

    Attributes:
        train: what is trained on.
        validation: held back for choosing settings; there may be none.
        test: held back for reporting; nothing is chosen by it.
        num_classes: how many classes there are.
        mean: [channels], subtracted from images in [0, 255]: the mean of the
            training images, unless a source says otherwise.
        std: [channels], divided by afterwards; likewise.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    mean: jax.Array
    std: jax.Array

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels."""
        return self.train.images.shape[1:]

    def with_label_noise(self, share: float, seed: int) -> 'Dataset':
        """This data set with some training labels wrong, the others untouched.

        Raises:
            ValueError: where an example has more than one label.
        """
        split = self.train
        if share == 0:
            return self
        if split.labels.ndim > 1:
            raise ValueError(
                'label_noise must be 0 where an example has several labels, got'
                f' {share!r}.'
            )
        labels = flip_labels(np.asarray(split.labels), share, self.num_classes, seed)
        if split.devices is not None:
            labels = split.devices.replicate(labels)
        return dataclasses.replace(
            self, train=dataclasses.replace(split, labels=labels)
        )

    def on(self, devices: Devices) -> 'Dataset':
        """This data set on devices; itself if it is there."""
        if self.train.devices == devices:
            return self
        mean, std = np.asarray(self.mean), np.asarray(self.std)
        return dataclasses.replace(
            self,
            train=self.train.on(devices),
            validation=self.validation.on(devices),
            test=self.test.on(devices),
            mean=devices.replicate(mean),
            std=devices.replicate(std),
        )


def flip_labels(
    labels: np.ndarray, share: float, num_classes: int, seed: int
) -> np.ndarray:
    """Gives a share of the labels to other classes, drawn uniformly.

    Args:
        labels: [N] integers.
        share: how many of them are wrong afterwards: exactly ``round(share * N)``.
        num_classes: how many classes there are.
        seed: chooses which labels, and what becomes of them.

    Returns:
        A new array [N].
    """
    rng = np.random.default_rng([seed, 0x1ABE1])
    flipped = rng.permutation(len(labels))[: round(share * len(labels))]
    shift = rng.integers(1, num_classes, size=len(flipped))
    noisy = labels.copy()
    noisy[flipped] = (labels[flipped] + shift) % num_classes
    return noisy


# --- Batches ------------------------------------------------------------------


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """How many full batches there are; what is left over waits for its epoch."""
    if batch_size > num_examples:
        raise ValueError(
            f'batch_size must be at most {num_examples}, the number of'
            f' training examples, got {batch_size}.'
        )
    return num_examples // batch_size


@functools.partial(jax.jit, static_argnames=('num_examples', 'batch_size'))
def epoch_order(
    key: jax.Array, epoch: jax.Array | int, *, num_examples: int, batch_size: int
) -> jax.Array:
    """Which examples the batches of an epoch hold.

    Args:
        key: the key of the run.
        epoch: the number of the epoch.
        num_examples: how many examples there are.
        batch_size: how many a batch holds.

    Returns:
        int32 array [steps, batch size]: every example at most once, and all of
        them if the batch size divides their number.
    """
    steps = steps_per_epoch(num_examples, batch_size)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
    return order[: steps * batch_size].reshape(steps, batch_size).astype(jnp.int32)


def epoch_key(key: jax.Array, epoch: jax.Array | int) -> jax.Array:
    """The key of the augmentation of an epoch, for :func:`take_batch`.

    Args:
        key: a key of the run, another one than that of :func:`epoch_order`.
        epoch: the number of the epoch.

    Returns:
        A key.
    """
    return jax.random.fold_in(key, epoch)


@functools.partial(jax.jit, static_argnames='augmentation')
def take_batch(
    split: Split,
    mean: jax.Array,
    std: jax.Array,
    order: jax.Array,
    index: jax.Array | int,
    key: jax.Array | None = None,
    *,
    augmentation: Augmentation | None = None,
) -> dict[str, jax.Array]:
    """One batch, gathered, augmented and normalised on the device.

    Args:
        split: the examples.
        mean: [channels], subtracted.
        std: [channels], divided by.
        order: [steps, batch size], from :func:`epoch_order`.
        index: which row of it.
        key: from :func:`epoch_key`; batches of one epoch draw different numbers.
        augmentation: how the images are changed at random; not at all without it.

    Returns:
        ``image`` [batch size, …] in float32, ``label`` [batch size], and
        ``index`` [batch size], the place of each example in the split. Of the first
        two each of the split's devices has its share.
    """
    rows = order[index]
    images, labels = split.take(rows)
    if augmentation is None:
        images = normalize(images, mean, std)
    elif key is None:
        raise ValueError('key must be a key where there is an augmentation, got None.')
    else:
        images = augmentations.augment(
            augmentation, jax.random.fold_in(key, index), images, mean, std
        )
    return {'image': images, 'label': labels, 'index': rows}
