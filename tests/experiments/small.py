"""Small networks and settings that several tests use."""

from typing import Any

import ml_collections

from experiments.common import configuration
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


def changed(config: Any, **values: Any) -> ml_collections.ConfigDict:
    """A copy with other values; a double underscore stands for a dot."""
    return configuration.with_values(
        config, {name.replace('__', '.'): value for name, value in values.items()}
    )
