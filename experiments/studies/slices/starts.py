"""What the runs of a task start from: the network, its data, weights and order."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs import digits_tasks
from experiments.data import sources
from experiments.data.augmentation import normalize
from experiments.data.examples import Dataset, epoch_order, flip_labels
from experiments.models import zoo
from experiments.studies.slices.tasks import (
    Examples,
    PyTree,
    Start,
    Task,
    Transformer,
)


def network(task: Task) -> nn.Module:
    """The network of a task."""
    if task.settings.model == 'vit':
        return Transformer(num_classes=10)
    return zoo.create(task.settings.model, task.settings.models.mlp, num_classes=10)


def examples(task: Task) -> Examples:
    """Images and labels of a task."""
    dataset = _dataset(task.config)
    ready = lambda split: normalize(
        jnp.asarray(split.images), dataset.mean, dataset.std
    )
    held = lambda split: (ready(split), jnp.asarray(split.labels))
    return Examples(ready(dataset.train), held(dataset.validation), held(dataset.test))


def starts(task: Task, seeds: tuple[int, ...]) -> Start:
    """The starts of some seeds, their arrays with a leading axis for these."""
    made = [_start(task, seed) for seed in seeds]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *made)


@functools.lru_cache(maxsize=128)
def _start(task: Task, seed: int) -> Start:
    dataset = _dataset(task.config)
    # The streams of `experiments.training.experiment`.
    init_key, order_key = (
        jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), number)
        for number in (0, 1)
    )
    labels = flip_labels(
        np.asarray(dataset.train.labels), task.settings.label_noise, 10, seed
    )
    epochs = -(-task.steps * task.batch_size // dataset.train.size) + 1
    orders = [
        epoch_order(
            order_key,
            epoch,
            num_examples=dataset.train.size,
            batch_size=task.batch_size,
        )
        for epoch in range(epochs)
    ]
    order = np.concatenate(jax.device_get(orders))[: task.steps]
    images = jnp.zeros((1, *dataset.image_shape))
    variables = _init(network(task), init_key, images)
    return jax.device_get(Start(variables, jnp.asarray(labels), jnp.asarray(order)))


@functools.partial(jax.jit, static_argnums=0)
def _init(model: nn.Module, key: jax.Array, images: jax.Array) -> PyTree:
    return model.init(key, images, train=True)


@functools.cache
def _dataset(config: str) -> Dataset:
    chosen: Any = digits_tasks.get_config(config)
    settings = dict(chosen.data)
    return sources.SOURCES[settings.pop('name')](**settings)
