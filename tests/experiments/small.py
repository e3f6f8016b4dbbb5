"""Small networks and settings that several tests use."""

from typing import Any

import ml_collections

from experiments.common import configuration
from experiments.configs import digits
from experiments.methods import method

# What methods are made for, where it does not matter.
TASK = method.Task(
    num_steps=10,
    steps_per_epoch=5,
    num_examples=20,
    num_classes=3,
    last_tensors=lambda n: lambda params: params,
)


# The same networks with less of everything, for what has to be compiled.
SMALL = {
    'mlp': {'width': 2},
    'cnn': {'width': 2},
    'small_resnet': {'width': 2},
    'resnet18': {'width': 2},
    'resnet50': {'width': 2},
    'wide_resnet': {'depth': 10, 'width': 1},
    'pyramidnet': {'depth': 14, 'alpha': 12, 'width': 2},
    'mobilenet': {'width': 2},
    'vit': {'width': 6, 'depth': 2},
}

# Those that have the parts of all: BatchNorm and none, shortcuts, grouped, attention.
QUICK = ('cnn', 'resnet18', 'mobilenet', 'vit')

# Settings of a run of three steps an epoch that takes no time.
TINY = {
    'data.train': 120,
    'data.validation': 20,
    'data.test': 30,
    'model': 'mlp',
    'models.mlp.width': 8,
    'models.mlp.depth': 1,
    'batch_size': 40,
}


def tiny_digits(**values: Any) -> ml_collections.ConfigDict:
    """The configuration of the digits with less of everything, changed as told."""
    return changed(configuration.with_values(digits.get_config(), TINY), **values)


def changed(config: Any, **values: Any) -> ml_collections.ConfigDict:
    """A copy with other values; a double underscore stands for a dot."""
    return configuration.with_values(
        config, {name.replace('__', '.'): value for name, value in values.items()}
    )
