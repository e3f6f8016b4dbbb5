"""Data sets that live on the devices, and the batches of an epoch.

Images stay uint8 on the device; shuffling, augmentation and normalisation run
there too. What is random is a function of keys alone: the batches of an epoch
follow from (seed, epoch), whatever ran before, and however many devices there are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from experiments import augmentation as augmentations
from experiments import configuration, tfds_data
from experiments.augmentation import Augmentation, normalize
from experiments.devices import Devices


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
        labels: int32 array [N].
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
        """This data set with some training labels wrong, the others untouched."""
        split = self.train
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


# --- Sources ------------------------------------------------------------------


def digits(
    train: int = 1000, validation: int = 297, test: int = 500, split_seed: int = 0
) -> Dataset:
    """The 1,797 handwritten 8×8 digits that come with scikit-learn.

    Args:
        train: how many examples are trained on.
        validation: how many are held back for choosing settings.
        test: how many are held back for reporting.
        split_seed: chooses which are which. It is no seed of a run: whatever is
            chosen on the validation examples of one run is reported on the test
            examples of another, so both must be the same examples in all of them.

    Returns:
        The data set, with true labels.
    """
    # The images hold the whole numbers 0 to 16; 255/16 keeps them apart in uint8.
    source: Any = datasets.load_digits()
    images = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None]
    sizes = {'train': train, 'validation': validation, 'test': test}
    _check_sizes(sizes, len(images))
    order = np.random.default_rng(split_seed).permutation(len(images))
    splits = _split(images, source.target, order, sizes)
    return _dataset(splits, num_classes=10, statistics='train')


def synthetic(
    train: int = 1024,
    validation: int = 128,
    test: int = 128,
    size: int = 32,
    channels: int = 3,
    num_classes: int = 10,
    split_seed: int = 0,
) -> Dataset:
    """Random images and labels: nothing to learn, for timing a training loop.

    Args:
        train: how many examples are trained on.
        validation: how many are held back for choosing settings.
        test: how many are held back for reporting.
        size: height and width of an image.
        channels: channels of an image.
        num_classes: how many classes there are.
        split_seed: chooses the numbers.

    Returns:
        The data set.
    """
    rng = np.random.default_rng(split_seed)
    sizes = {'train': train, 'validation': validation, 'test': test}
    total = sum(sizes.values())
    images = rng.integers(0, 256, (total, size, size, channels), dtype=np.uint8)
    labels = rng.integers(0, num_classes, total)
    splits = _split(images, labels, np.arange(total), sizes)
    return _dataset(splits, num_classes, statistics='train')


def tfds(
    dataset: str,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    train: int = 0,
    validation: int = 5000,
    test: int = 0,
    split_seed: int = 0,
    train_split: str = 'train',
    test_split: str = 'test',
    label: str = '',
    statistics: str = 'train',
    num_classes: int = 0,
) -> Dataset:
    """Images of one shape from TensorFlow Datasets, see :mod:`experiments.tfds_data`.

    Args:
        dataset: the name that TensorFlow Datasets has for it.
        data_dir: the directory of prepared data sets; if it is empty, that of the
            environment variable ``TFDS_DATA_DIR``.
        cache_dir: where the decoded images are kept; if it is empty, in ``data_dir``.
        train: how many examples are trained on; 0 means all that are left.
        validation: how many examples of the training split are held back for
            choosing settings, 0 for none. Which these are does not depend on
            ``train``.
        test: how many examples of the test split are reported on; 0 means all.
        split_seed: chooses which are which, see :func:`digits`.
        train_split: what the data set calls the examples to train on.
        test_split: what it calls those to report on.
        label: the feature that holds the classes; if it is empty, the one that the
            data set names.
        statistics: the mean and deviation that images are normalised with: a name
            in :data:`NORMALIZATIONS`, or ``'train'`` for those of the images that
            are trained on.
        num_classes: how many classes there must be; 0 means as many as there are.

    Returns:
        The data set, with true labels.
    """
    read = functools.partial(
        tfds_data.read,
        dataset,
        data_dir=data_dir,
        cache_dir=cache_dir,
        label=label,
        num_classes=num_classes,
    )
    seen, unseen = read(train_split), read(test_split)
    shapes = {content.images.shape[1:] for content in (seen, unseen)}
    if len(shapes) > 1:
        raise ValueError(
            f'{train_split} and {test_split} of {dataset} must hold images of one'
            f' shape, got {shapes}.'
        )
    size, test_size = len(seen.labels), len(unseen.labels)
    sizes = {'validation': validation, 'train': train or max(size - validation, 1)}
    test_sizes = {'test': test or test_size}
    _check_sizes(sizes, size)
    _check_sizes(test_sizes, test_size)
    rng = np.random.default_rng(split_seed)
    order, test_order = rng.permutation(size), rng.permutation(test_size)
    splits = _split(seen.images, seen.labels, order, sizes)
    splits |= _split(unseen.images, unseen.labels, test_order, test_sizes)
    return _dataset(splits, seen.num_classes, statistics)


# Mean and deviation of each channel, by the images that they were measured on.
NORMALIZATIONS = {
    'cifar10': ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    'cifar100': ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
}


def _check_sizes(sizes: dict[str, int], available: int) -> None:
    for name, size in sizes.items():
        low = 0 if name == 'validation' else 1
        if size < low:
            raise ValueError(f'{name} must be an integer >= {low}, got {size!r}.')
    if sum(sizes.values()) > available:
        raise ValueError(
            f'{" + ".join(sizes)} must be at most {available}, got'
            f' {sum(sizes.values())}.'
        )


def _split(
    images: np.ndarray, labels: np.ndarray, order: np.ndarray, sizes: dict[str, int]
) -> dict[str, Split]:
    ends = np.cumsum(list(sizes.values()))
    parts = np.split(order[: ends[-1]], ends[:-1])
    return {
        name: Split(images[part], labels[part].astype(np.int32))
        for name, part in zip(sizes, parts, strict=True)
    }


def _dataset(splits: dict[str, Split], num_classes: int, statistics: str) -> Dataset:
    seen = np.asarray(splits['train'].images)
    if statistics == 'train':
        mean, std = channel_statistics(seen)
    else:
        known = ('train', *NORMALIZATIONS)
        if statistics not in NORMALIZATIONS:
            raise ValueError(
                f'statistics must be one of {", ".join(known)}; got {statistics!r}.'
            )
        mean, std = NORMALIZATIONS[statistics]
        if len(mean) != seen.shape[-1]:
            raise ValueError(
                f'statistics must be of {seen.shape[-1]} channels, as the images have;'
                f' those of {statistics} are of {len(mean)}.'
            )
    return Dataset(
        **splits,
        num_classes=num_classes,
        mean=jnp.asarray(mean, jnp.float32),
        std=jnp.asarray(std, jnp.float32),
    )


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of uint8 images [N, …, channels]."""
    # From how often each value occurs: floats of all images would take gigabytes.
    counts = np.zeros((images.shape[-1], 256))
    for part in np.array_split(images, len(images) // 1000 + 1):
        for count, channel in zip(counts, np.moveaxis(part, -1, 0), strict=True):
            count += np.bincount(channel.ravel(), minlength=256)
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ np.arange(256)
    variance = np.sum(share * (np.arange(256) - mean[:, None]) ** 2, axis=1)
    return mean, np.sqrt(variance)


SOURCES: dict[str, Callable[..., Dataset]] = {
    'digits': digits,
    'synthetic': synthetic,
    'cifar10': functools.partial(tfds, 'cifar10', statistics='cifar10', num_classes=10),
    'cifar100': functools.partial(
        tfds, 'cifar100', statistics='cifar100', num_classes=100
    ),
    # The same images, by the 20 groups that the 100 classes form.
    'cifar100_coarse': functools.partial(
        tfds,
        'cifar100',
        label='coarse_label',
        statistics='cifar100',
        num_classes=20,
    ),
    'tfds': tfds,
}


def load(settings: Any, devices: Devices | None = None) -> Dataset:
    """The data set that ``config.data`` describes: its name and its arguments.

    Args:
        settings: ``config.data``.
        devices: where it is put, the first device if that is None. Each process
            reads all of it into its memory, and sends devices their shares.

    Returns:
        The data set, with true labels.
    """
    arguments = dict(settings)
    source = configuration.pick('config.data.name', SOURCES, arguments.pop('name', ''))
    dataset = configuration.call(source, 'config.data', arguments)
    return dataset.on(devices or Devices.first(1))


# --- Batches ------------------------------------------------------------------


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """How many full batches there are; what is left over waits for its epoch."""
    if batch_size > num_examples:
        raise configuration.ConfigError(
            f'config.batch_size must be at most {num_examples}, the number of'
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
