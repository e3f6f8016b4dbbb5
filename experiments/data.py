"""Data sets that live on the device, and the batches of an epoch.

Images stay uint8 on the device; shuffling and normalisation run there too. What
is random is a function of keys alone: the batches of an epoch follow from (seed,
epoch), whatever ran before.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from experiments import configuration


class Split(NamedTuple):
    """Examples of one purpose.

    Attributes:
        images: uint8 array [N, height, width, channels].
        labels: int32 array [N].
    """

    images: jax.Array
    labels: jax.Array

    @property
    def size(self) -> int:
        """N."""
        return self.labels.shape[0]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification task.

    Attributes:
        train: what is trained on.
        validation: held back for choosing settings.
        test: held back for reporting; nothing is chosen by it.
        num_classes: how many classes there are.
        mean: [channels], the mean of the training images in [0, 255].
        std: [channels], their standard deviation.
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
        labels = flip_labels(
            np.asarray(self.train.labels), share, self.num_classes, seed
        )
        train = self.train._replace(labels=jnp.asarray(labels, jnp.int32))
        return dataclasses.replace(self, train=train)


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
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f'{name} must be an integer >= 1, got {size!r}.')
    if sum(sizes.values()) > len(images):
        raise ValueError(
            f'train + validation + test must be at most {len(images)}, got'
            f' {sum(sizes.values())}.'
        )
    order = np.random.default_rng(split_seed).permutation(len(images))
    return _split(images, source.target, order, sizes, num_classes=10)


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
    return _split(images, labels, np.arange(total), sizes, num_classes)


def _split(
    images: np.ndarray,
    labels: np.ndarray,
    order: np.ndarray,
    sizes: dict[str, int],
    num_classes: int,
) -> Dataset:
    ends = np.cumsum(list(sizes.values()))
    parts = np.split(order[: ends[-1]], ends[:-1])
    splits = {
        name: Split(jnp.asarray(images[part]), jnp.asarray(labels[part], jnp.int32))
        for name, part in zip(sizes, parts, strict=True)
    }
    seen = images[parts[list(sizes).index('train')]].astype(np.float64)
    return Dataset(
        **splits,
        num_classes=num_classes,
        mean=jnp.asarray(seen.mean(axis=(0, 1, 2)), jnp.float32),
        std=jnp.asarray(seen.std(axis=(0, 1, 2)), jnp.float32),
    )


SOURCES: dict[str, Callable[..., Dataset]] = {'digits': digits, 'synthetic': synthetic}


def load(settings: Any) -> Dataset:
    """The data set that ``config.data`` describes: its name and its arguments."""
    arguments = dict(settings)
    source = configuration.pick('config.data.name', SOURCES, arguments.pop('name', ''))
    return configuration.call(source, 'config.data', arguments)


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


@jax.jit
def take_batch(
    split: Split,
    mean: jax.Array,
    std: jax.Array,
    order: jax.Array,
    index: jax.Array | int,
) -> dict[str, jax.Array]:
    """One batch, gathered and normalised on the device.

    Args:
        split: the examples.
        mean: [channels], subtracted.
        std: [channels], divided by.
        order: [steps, batch size], from :func:`epoch_order`.
        index: which row of it.

    Returns:
        ``image`` [batch size, …] in float32, ``label`` [batch size], and
        ``index`` [batch size], the place of each example in the split.
    """
    rows = order[index]
    return {
        'image': normalize(split.images[rows], mean, std),
        'label': split.labels[rows],
        'index': rows,
    }


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """uint8 images as float32 of mean 0 and deviation 1 per channel."""
    return (images.astype(jnp.float32) - mean) / std
