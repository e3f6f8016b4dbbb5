"""What is learnt: the digits of the controllers study, without convolutions.

:mod:`.starts` makes of a task what its runs start from.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.configs import digits_tasks
from experiments.models.networks.attention import Block
from experiments.models.networks.layers import logits

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Task:
    """A network, its data and what the radius and the learning rate are tuned over.

    Attributes:
        title: how it is called in tables.
        config: the task of ``experiments/configs/digits_tasks.py`` that it comes from;
            of that are data, share of wrong labels, network and base optimizer.
        radii: ρ of SAM; other methods have multiples of them (``Method.radii``).
        rates: learning rates of all methods but SGD.
        sgd_rates: those of SGD.
        batch_size: how many examples a mini-batch holds. 96 is the number nearest to
            the configuration's 100 that 16 divides; both make ten steps of an epoch.
        num_steps: how many steps there are; 0 for those of the configuration.
    """

    title: str
    config: str
    radii: tuple[float, ...]
    rates: tuple[float, ...]
    sgd_rates: tuple[float, ...]
    batch_size: int = 96
    num_steps: int = 0

    @property
    def settings(self) -> Any:
        """The configuration."""
        return _settings(self.config)

    @property
    def steps(self) -> int:
        """The length of a run."""
        return self.num_steps or 10 * self.settings.epochs


_NOISY = {
    'radii': (0.5, 0.7, 1.0, 1.4, 2.0),
    'rates': (0.02, 0.06, 0.2),
    'sgd_rates': (0.0003, 0.001, 0.003, 0.01, 0.03),
}
TASKS = {
    'mlp_600': Task('MLP, 600 steps, 40 % wrong', 'mlp_600', **_NOISY),
    'clean_600': Task(
        'MLP, 600 steps, right labels',
        'clean_600',
        radii=(0.06, 0.12, 0.25, 0.5, 1.0),
        rates=(0.03, 0.1, 0.3),
        sgd_rates=(0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    'mlp_2000': Task('MLP, 2,000 steps, 40 % wrong', 'mlp_2000', **_NOISY),
    'transformer_300': Task(
        'transformer, AdamW, 300 steps, 40 % wrong',
        'vit_600',
        radii=(0.05, 0.1, 0.2, 0.4, 0.8),
        rates=(1e-3, 3e-3, 1e-2),
        sgd_rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        num_steps=300,
    ),
}


class Transformer(nn.Module):
    """A transformer on four patches, embedded by a matrix product.

    Many networks side by side make a convolution one of groups, which takes long.

    Attributes:
        num_classes: the number of logits.
        width: numbers per token.
        depth: how many blocks there are.
        heads: attention heads of a block.
    """

    num_classes: int
    width: int = 16
    depth: int = 2
    heads: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, classes] of images [batch, 8, 8, 1]."""
        del train  # Nothing in it behaves differently.
        x = x.reshape(-1, 2, 4, 2, 4).swapaxes(2, 3).reshape(-1, 4, 16)
        x = nn.Dense(self.width)(x)
        x += self.param('positions', nn.initializers.normal(0.02), (1, 4, self.width))
        for number in range(self.depth):
            x = Block(self.heads, jnp.float32, name=f'_Block_{number}')(x)
        return logits(nn.LayerNorm()(x), self.num_classes)


class Examples(NamedTuple):
    """What all runs of a task share.

    Attributes:
        train: float32 [N, 8, 8, 1], normalised, and likewise the images held back.
        validation: the images that settings are chosen by, and their labels.
        test: the images that are reported on, and their labels.
    """

    train: jax.Array
    validation: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


class Start(NamedTuple):
    """What a run has of its seed, which is what the trainer makes of that seed.

    Attributes:
        variables: parameters and statistics of BatchNorm before the first step.
        labels: int32 [N], of the training examples, some of them wrong.
        order: int32 [steps, batch size], the examples of each mini-batch.
    """

    variables: PyTree
    labels: jax.Array
    order: jax.Array


@functools.cache
def _settings(config: str) -> Any:
    return digits_tasks.get_config(config)
