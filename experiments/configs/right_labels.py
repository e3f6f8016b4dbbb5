"""Few examples with right labels: what is learnt by heart, but not wrongly.

``--config=experiments/configs/right_labels.py:TASK`` with a name of :data:`TASKS`:
networks on some of the digits, and a transformer on some of the sources of Python's
standard library. Few images of CIFAR-100 are ``cifar100_small.py:few``.
"""

from typing import Any, NamedTuple

import ml_collections

from experiments.configs import digits_tasks


class Decoder(NamedTuple):
    """A transformer, and the windows of text that it learns.

    Attributes:
        length: bytes of a window.
        width: of the transformer.
        depth: its layers.
    """

    length: int
    width: int
    depth: int


DECODERS = {'decoder': Decoder(128, 64, 3), 'small_decoder': Decoder(64, 32, 2)}


class Task(NamedTuple):
    """What tells a task from the others.

    Attributes:
        model: the network; those of :data:`DECODERS` learn text, the others digits.
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
    'bytes_8k': Task('small_decoder', 128, 50, 16),
    'bytes_16k': Task('small_decoder', 256, 25, 16),
    'bytes_32k': Task('small_decoder', 512, 12, 16),
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
    # Of the ViT: its settings and AdamW, which the decoders have as well.
    base = 'vit_600' if model in ('vit', *DECODERS) else 'clean_600'
    config: Any = digits_tasks.get_config(base)
    config.name = f'right_labels_{task}'
    config.epochs, config.batch_size = epochs, batch_size
    config.label_noise = 0.0
    if model in DECODERS:
        length, width, depth = DECODERS[model]
        config.model = 'decoder'
        config.data = {
            'name': 'python_sources',
            'train': train,
            'validation': 256,
            'test': 512,
            'length': length,
            'split_seed': 0,
        }
        config.models.decoder = {
            'width': width,
            'depth': depth,
            'heads': 2,
            'dtype': 'float32',
        }
    else:
        config.model = model
        # What is not trained on makes the tests more precise.
        config.data.update({'train': train, 'validation': 400, 'test': 900})
    config.log_every = config.eval_every = max(epochs // 10, 1)
    return config
