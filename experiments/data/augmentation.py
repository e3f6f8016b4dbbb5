"""Random changes of training images, made on the device, a batch at a time.

What is drawn is a function of the key alone (:func:`draw`); what becomes of the
images follows from what is drawn (:func:`apply`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Which changes are made; by itself none.

    Attributes:
        padding: images are shifted by up to so many pixels in each direction; what
            comes in is black.
        flip: whether every other image is mirrored, left to right.
        cutout: height and width of a square that is set to the mean of all images.
            It may reach beyond the border.
        cutout_probability: the share of images that this is done to.
    """

    padding: int = 0
    flip: bool = False
    cutout: int = 0
    cutout_probability: float = 0.5

    def __post_init__(self):
        for name in ('padding', 'cutout'):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f'{name} must be an integer >= 0, got {value!r}.')
        if not 0 <= self.cutout_probability <= 1:
            raise ValueError(
                'cutout_probability must be a share in [0, 1], got'
                f' {self.cutout_probability!r}.'
            )


class Draws(NamedTuple):
    """What is drawn for a batch of B images.

    Attributes:
        crop: int32 [B, 2], in [0, 2 padding]: row and column of the padded image
            where the crop starts.
        flip: bool [B].
        cut: bool [B], whether a square is cut out.
        corner: int32 [B, 2], row and column of the square's first corner.
    """

    crop: jax.Array
    flip: jax.Array
    cut: jax.Array
    corner: jax.Array


def draw(settings: Augmentation, key: jax.Array, shape: tuple[int, ...]) -> Draws:
    """Draws for a batch.

    Args:
        settings: which changes are made.
        key: another one for each batch.
        shape: of the batch of images, [B, height, width, channels].

    Returns:
        Draws; those of changes that are not made are not used.
    """
    batch, *size, _ = shape
    crop_key, flip_key, cut_key, corner_key = jax.random.split(key, 4)
    # The centre of the square may be any pixel.
    first = -(settings.cutout // 2)
    return Draws(
        crop=jax.random.randint(crop_key, (batch, 2), 0, 2 * settings.padding + 1),
        flip=jax.random.bernoulli(flip_key, shape=(batch,)),
        cut=jax.random.bernoulli(cut_key, settings.cutout_probability, (batch,)),
        corner=jax.random.randint(
            corner_key, (batch, 2), first, first + jnp.array(size)
        ),
    )


def apply(
    settings: Augmentation,
    draws: Draws,
    images: jax.Array,
    mean: jax.Array,
    std: jax.Array,
) -> jax.Array:
    """Makes the changes and normalises.

    Args:
        settings: which changes are made.
        draws: from :func:`draw`.
        images: uint8 [B, height, width, channels].
        mean: [channels], subtracted.
        std: [channels], divided by.

    Returns:
        float32 array of the images' shape. What a crop brings in is 0 before, what
        is cut out is 0 after normalisation.
    """
    size = images.shape[1:]
    if settings.padding:
        around = (settings.padding, settings.padding)
        padded = jnp.pad(images, ((0, 0), around, around, (0, 0)))
        images = jax.vmap(
            lambda image, start: jax.lax.dynamic_slice(image, (*start, 0), size)
        )(padded, draws.crop)
    if settings.flip:
        images = jnp.where(draws.flip[:, None, None, None], images[:, :, ::-1], images)
    normal = normalize(images, mean, std)
    if settings.cutout:
        inside = [
            (jnp.arange(n) >= corner[:, None])
            & (jnp.arange(n) < corner[:, None] + settings.cutout)
            for n, corner in zip(size[:2], draws.corner.T, strict=True)
        ]
        square = inside[0][:, :, None] & inside[1][:, None, :]
        gone = square & draws.cut[:, None, None]
        normal = jnp.where(gone[..., None], 0, normal)
    return normal


def augment(
    settings: Augmentation,
    key: jax.Array,
    images: jax.Array,
    mean: jax.Array,
    std: jax.Array,
) -> jax.Array:
    """Both at once: draws by the key, changes and normalises a batch."""
    return apply(settings, draw(settings, key, images.shape), images, mean, std)


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """uint8 images as float32, by mean and deviation of each channel."""
    return (images.astype(jnp.float32) - mean) / std
