"""CIFAR-100 as the publication trains on it, but for how images are normalised.

Mean and deviation are CIFAR-100's own. The reference takes CIFAR-10's for both data
sets; ``--config.data.statistics=cifar10`` does the same.

``--config=experiments/configs/cifar100.py:short`` is for one accelerator and an
afternoon: 30 epochs instead of 200, convolutions in bfloat16, 5,000 of the training
images held back to tune on.
"""

from typing import Any

import ml_collections

from experiments.configs import cifar

SCHEDULES = ('published', 'short')


def get_config(schedule: str = 'published') -> ml_collections.ConfigDict:
    """Every number of a run.

    Args:
        schedule: one of :data:`SCHEDULES`.

    Returns:
        The configuration.

    Raises:
        ValueError: for another schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(
            f'schedule must be one of {", ".join(SCHEDULES)}; got {schedule!r}.'
        )
    config: Any = cifar.recipe('cifar100', statistics='cifar100')
    if schedule == 'short':
        config.name = 'cifar100_short'
        config.epochs = 30
        config.data.validation = 5000
        for model in config.models.values():
            model.dtype = 'bfloat16'
        # Those that matter most come first, should time run out.
        methods = ('sgd', 'sam', 'vsam', 'steady_vsam', 'looksam', 'esam', 'saf')
        config.compare.methods = methods
    return config
