"""Data sets that live on the devices, and the batches of an epoch.

Images stay uint8 on the device; shuffling, augmentation and normalisation run
there too. What is random is a function of keys alone: the batches of an epoch
follow from (seed, epoch), whatever ran before, and however many devices there are.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from experiments.common import configuration
from experiments.common.devices import Devices
from experiments.data import prepared, text
from experiments.data.examples import Dataset, Split

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
    images, labels = _digits()
    sizes = {'train': train, 'validation': validation, 'test': test}
    _check_sizes(sizes, len(images))
    order = np.random.default_rng(split_seed).permutation(len(images))
    splits = _split(images, labels, order, sizes)
    return _dataset(splits, num_classes=10, statistics='train')


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of all digits."""
    source: Any = datasets.load_digits()
    # The images hold the whole numbers 0 to 16; 255/16 keeps them apart in uint8.
    images = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None]
    return images, source.target


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
    """Images of one shape from TensorFlow Datasets, see :mod:`.prepared`.

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
        prepared.read,
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


def python_sources(
    train: int = 1024,
    validation: int = 512,
    test: int = 512,
    length: int = 128,
    split_seed: int = 0,
) -> Dataset:
    """Bytes of Python's standard library, each to be told from those before it.

    A window of text is an example: a picture of one row whose pixels are bytes, and
    the label of each pixel is the next byte. The splits are of different files, see
    :func:`.text.standard_library`.

    Args:
        train: how many windows are trained on; 0 means all that there are.
        validation: how many are held back for choosing settings.
        test: how many are held back for reporting.
        length: bytes of a window.
        split_seed: chooses which files are which, see :func:`digits`.

    Returns:
        The data set: images uint8 [N, 1, length, 1], not to be normalised, and labels
        int32 [N, length].
    """
    sizes = {'train': train, 'validation': validation, 'test': test}
    splits = {
        name: Split(rows[:, None, :-1, None], rows[:, 1:].astype(np.int32))
        for name, rows in text.standard_library(sizes, length, split_seed).items()
    }
    return Dataset(**splits, num_classes=256, mean=jnp.zeros(1), std=jnp.ones(1))


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
    'python_sources': python_sources,
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
