"""Few examples with right labels: what is learnt by heart, but not wrongly.

``--config=experiments/configs/right_labels.py:TASK`` with a name of :data:`TASKS`:
networks on some of the digits, and a transformer on some of the sources of Python's
standard library. Few images of CIFAR-100 are ``cifar100_small.py:few``.
"""

from typing import Any, NamedTuple

import ml_collections

from experiments.configs import digits_tasks


class Task(NamedTuple):
    """What tells a task from the others.

    Attributes:
        model: the network; ``'decoder'`` learns text, the others digits.
        train: images, or windows of text.
        epochs: how often each is seen.
        batch_size: examples of a mini-batch; 8 divides it.
    """

    model: str
    train: int
    epochs: int
    batch_size: int


TASKS = {
    'vit_192': Task('vit', 192, 300, 96),
    'vit_96': Task('vit', 96, 300, 48),
    'vit_480': Task('vit', 480, 120, 96),
    'cnn_48': Task('cnn', 48, 600, 48),
    'cnn_96': Task('cnn', 96, 300, 48),
    'cnn_192': Task('cnn', 192, 300, 96),
    'cnn_480': Task('cnn', 480, 120, 96),
    'mlp_96': Task('mlp', 96, 300, 48),
    'bytes_256': Task('decoder', 256, 40, 32),
    'bytes_1024': Task('decoder', 1024, 10, 32),
}


def get_config(task: str = 'vit_192') -> ml_collections.ConfigDict:
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
    model, train, epochs, batch_size = TASKS[task]
    # Of the ViT: its settings and AdamW, which the decoder has as well.
    base = 'vit_600' if model in ('vit', 'decoder') else 'clean_600'
    config: Any = digits_tasks.get_config(base)
    config.name = f'right_labels_{task}'
    config.model, config.epochs, config.batch_size = model, epochs, batch_size
    config.label_noise = 0.0
    if model == 'decoder':
        config.data = {
            'name': 'python_sources',
            'train': train,
            'validation': 256,
            'test': 512,
            'length': 128,
            'split_seed': 0,
        }
        config.models.decoder = {
            'width': 64,
            'depth': 3,
            'heads': 2,
            'dtype': 'float32',
        }
    else:
        # What is not trained on makes the tests more precise.
        config.data.update({'train': train, 'validation': 400, 'test': 900})
    config.log_every = config.eval_every = max(epochs // 10, 1)
    return config
