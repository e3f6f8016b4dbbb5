"""Random changes of images, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import augmentation, examples, sources
from experiments.data.augmentation import Augmentation

MEAN = np.array([100.0, 50.0, 150.0], np.float32)
STD = np.array([60.0, 50.0, 70.0], np.float32)
EVERYTHING = Augmentation(padding=2, flip=True, cutout=4)


def images_and_key(count: int, seed: int = 0) -> tuple[np.ndarray, jax.Array]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    return images, jax.random.key(seed)


def in_numpy(settings: Augmentation, draws: augmentation.Draws, images: np.ndarray):
    """What `augmentation.apply` computes, one image after the other."""
    crops, flips, cuts, corners = (np.asarray(drawn) for drawn in draws)
    results = []
    for number, image in enumerate(images):
        height, width, _ = image.shape
        p = settings.padding
        padded = np.zeros((height + 2 * p, width + 2 * p, 3), np.uint8)
        padded[p : p + height, p : p + width] = image
        top, left = crops[number]
        image = padded[top : top + height, left : left + width]
        if settings.flip and flips[number]:
            image = image[:, ::-1]
        result = (image.astype(np.float32) - MEAN) / STD
        if settings.cutout and cuts[number]:
            top, left = corners[number]
            bottom, right = top + settings.cutout, left + settings.cutout
            result[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = 0
        results.append(result)
    return np.stack(results)


@pytest.mark.parametrize(
    'settings',
    [
        Augmentation(),
        Augmentation(padding=2),
        Augmentation(flip=True),
        Augmentation(cutout=4),
        Augmentation(cutout=3, cutout_probability=1.0),
        EVERYTHING,
    ],
    ids=str,
)
def test_every_change_is_what_numpy_makes_of_the_same_draws(settings):
    images, key = images_and_key(64)
    draws = augmentation.draw(settings, key, images.shape)
    expected = in_numpy(settings, draws, images)
    augment = jax.jit(augmentation.augment, static_argnums=0)
    result = augment(settings, key, images, MEAN, STD)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    changed = np.any(expected != (images - MEAN) / STD, axis=(1, 2, 3))
    assert np.any(changed) == (settings != Augmentation())


def test_the_draws_reach_every_place_and_no_other():
    images, key = images_and_key(4000)
    settings = Augmentation(padding=2, flip=True, cutout=4, cutout_probability=0.25)
    draws = augmentation.draw(settings, key, images.shape)
    for drawn, lowest, highest in [
        (draws.crop[:, 0], 0, 4),
        (draws.crop[:, 1], 0, 4),
        # The square's centre is any of 6 rows and 8 columns.
        (draws.corner[:, 0], -2, 3),
        (draws.corner[:, 1], -2, 5),
    ]:
        values, counts = np.unique(drawn, return_counts=True)
        np.testing.assert_array_equal(values, np.arange(lowest, highest + 1))
        np.testing.assert_allclose(counts, 4000 / len(values), rtol=0.2)
    assert 0.47 < np.mean(draws.flip) < 0.53
    assert 0.22 < np.mean(draws.cut) < 0.28
    # One draw says nothing about another.
    several = np.stack([*draws.crop.T, *draws.corner.T, draws.flip, draws.cut])
    correlations = np.corrcoef(several) - np.eye(len(several))
    assert np.max(np.abs(correlations)) < 0.07


def test_what_a_crop_brings_in_is_black_and_what_is_cut_out_is_the_mean():
    white = np.full((1, 6, 8, 3), 255, np.uint8)
    draws = augmentation.Draws(
        crop=jnp.array([[0, 2]]),
        flip=jnp.array([False]),
        cut=jnp.array([True]),
        corner=jnp.array([[3, 5]]),
    )
    result = augmentation.apply(EVERYTHING, draws, white, MEAN, STD)
    image = np.asarray(result)[0] * STD + MEAN
    np.testing.assert_allclose(image[:2], 0, atol=1e-4)
    np.testing.assert_allclose(image[2], 255)
    np.testing.assert_allclose(image[3:, 5:], np.broadcast_to(MEAN, (3, 3, 3)))
    np.testing.assert_allclose(image[3:, :5], 255)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'padding': -1}, r'padding must be an integer >= 0, got -1'),
        ({'cutout': 2.5}, r'cutout must be an integer >= 0, got 2.5'),
        ({'cutout_probability': 1.5}, r'cutout_probability .* \[0, 1\], got 1.5'),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


# --- Batches of an epoch ------------------------------------------------------


@pytest.fixture(scope='module')
def dataset() -> examples.Dataset:
    return sources.synthetic(train=40, validation=4, test=4, size=6)


def take(dataset: examples.Dataset, epoch: int, index: int, **arguments) -> np.ndarray:
    order = jnp.tile(jnp.arange(20), (2, 1))
    arguments.setdefault('key', examples.epoch_key(jax.random.key(0), epoch))
    arguments.setdefault('augmentation', EVERYTHING)
    batch = examples.take_batch(
        dataset.train, dataset.mean, dataset.std, order, index, **arguments
    )
    return np.asarray(batch['image'])


def test_a_resumed_epoch_sees_the_same_images_and_another_epoch_others(dataset):
    batch = take(dataset, epoch=3, index=1)
    np.testing.assert_array_equal(batch, take(dataset, epoch=3, index=1))
    # The order is the same in all of them, so what differs is the augmentation.
    assert np.any(batch != take(dataset, epoch=3, index=0))
    assert np.any(batch != take(dataset, epoch=2, index=1))
    key = examples.epoch_key(jax.random.key(1), 3)
    assert np.any(batch != take(dataset, epoch=3, index=1, key=key))


def test_without_augmentation_images_are_only_normalised(dataset):
    plain = take(dataset, epoch=0, index=0, augmentation=None, key=None)
    expected = augmentation.normalize(
        dataset.train.images[:20], dataset.mean, dataset.std
    )
    np.testing.assert_allclose(plain, expected, rtol=1e-6, atol=1e-6)
    nothing = take(dataset, epoch=0, index=0, augmentation=Augmentation())
    np.testing.assert_allclose(nothing, plain, rtol=1e-6, atol=1e-6)


def test_augmentation_needs_a_key(dataset):
    with pytest.raises(ValueError, match=r'key must be a key .* got None'):
        take(dataset, epoch=0, index=0, key=None)
