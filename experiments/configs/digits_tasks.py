"""The digits in runs of several lengths, with several networks and shares of noise.

``--config=experiments/configs/digits_tasks.py:TASK`` with a name of :data:`TASKS`.
"""

from typing import Any, NamedTuple

import ml_collections

from experiments.configs import digits


class Task(NamedTuple):
    """What tells a task from the others.

    Attributes:
        model: the network.
        epochs: of ten steps each.
        label_noise: the share of wrong labels.
        window: that of the published controller.
    """

    model: str
    epochs: int
    label_noise: float = 0.4
    window: int = 10


TASKS = {
    'mlp_200': Task('mlp', 20),
    'mlp_600': Task('mlp', 60),
    'mlp_2000': Task('mlp', 200),
    'mlp_20000': Task('mlp', 2000, window=50),
    'clean_600': Task('mlp', 60, label_noise=0.0),
    'cnn_600': Task('cnn', 60),
    'vit_600': Task('vit', 60),
}


def get_config(task: str = 'mlp_600') -> ml_collections.ConfigDict:
    """Every number of a run.

    Args:
        task: one of :data:`TASKS`.

    Returns:
        The configuration.

    Raises:
        ValueError: for another task.
    """
    if task not in TASKS:
        raise ValueError(f'task must be one of {", ".join(TASKS)}; got {task!r}.')
    model, epochs, label_noise, window = TASKS[task]
    config: Any = digits.get_config()
    config.name = f'digits_{task}'
    config.model, config.epochs, config.label_noise = model, epochs, label_noise
    config.models.vit = {
        'patch': 2,
        'width': 32,
        'depth': 2,
        'heads': 2,
        'dtype': 'float32',
    }
    # Ten looks are enough.
    config.log_every = config.eval_every = max(epochs // 10, 2)
    if model == 'vit':
        config.optimizer = {'name': 'adamw', 'learning_rate': 3e-3, 'weight_decay': 0.1}
    config.methods.vsam.update({'window': window, 'warmup_steps': 2 * window - 1})
    return config
