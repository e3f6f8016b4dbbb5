"""What is learnt in the proof, and with which settings."""

import dataclasses
import functools
from typing import Any

from experiments.configs import cifar100, right_labels
from experiments.studies.proof.task import SEEDS, Entry, Task

# Channels of the network's first stage: the first above 300,000 parameters. What that
# and others take on a CPU, .widths says.
WIDTH = 32
EPOCHS = 20
# The cheapest method that the frontier finds to be as good as SAM.
WINNER = 'slice_4_3'
# Cheaper still, but not as good on all tasks there.
EIGHTH = 'slice_8_3'
STEADY = 'steady_03'


ENTRIES = {
    'sgd': Entry('sgd'),
    'sam': Entry('sam'),
    'steady': Entry(STEADY),
    'winner': Entry(WINNER),
    'eighth': Entry(EIGHTH),
    'msam': Entry('msam', SEEDS[:2]),
    'sgd_equal': Entry('sgd', SEEDS[:2], True),
}
# Of text, what all of them make of the time that SAM takes.
EQUAL = {
    'sgd': Entry('sgd', SEEDS[:2]),
    'sam': Entry('sam', SEEDS[:2]),
    **{
        f'{name}_equal': Entry(method, SEEDS[:2], True)
        for name, method in {
            'sgd': 'sgd',
            'steady': STEADY,
            'winner': WINNER,
            'eighth': EIGHTH,
            'msam': 'msam',
        }.items()
    },
}
FEW = {
    name: dataclasses.replace(ENTRIES[name], seeds=SEEDS[:2])
    for name in ('sgd', 'sam', 'winner')
}


def cifar(
    model: str = 'small_resnet', label_noise: float = 0.0, bits: int = 0, **model_values
) -> Any:
    """All of CIFAR-100: 45,000 images to train on, 5,000 held back, shifts and flips.

    Args:
        model: one of the networks of the configuration.
        label_noise: the share of training labels that are wrong.
        bits: of weights and activations; 0 for full precision.
        **model_values: settings of the network that differ.
    """
    config: Any = cifar100.get_config()
    config.name = 'proof'
    config.data.validation = 5000
    config.augmentation.cutout = 0
    config.label_noise, config.label_smoothing = label_noise, 0.0
    config.model = model
    if model == 'small_resnet':
        config.models.small_resnet.update({'width': WIDTH, 'stem_stride': 2})
    config.models[model].update(model_values)
    config.quantization.bits = bits
    config.optimizer.weight_decay = 5e-4
    config.epochs = EPOCHS
    return config


def text() -> Any:
    """Half a megabyte of Python’s sources, for a small transformer."""
    config: Any = right_labels.get_config('bytes_256')
    config.name = 'proof_text'
    config.data.update({'train': 4096, 'validation': 512, 'test': 1024})
    config.models.decoder.update({'width': 64, 'depth': 2, 'heads': 2})
    config.epochs = 5
    return config


_RIGHT: Any = {'rho': 0.1, 'rate': 0.1, 'sgd_rate': 0.1}
_WRONG: Any = {'rho': 0.2, 'rate': 0.2, 'sgd_rate': 0.05}


def _cifar_task(title: str, settings: Any, **values: Any) -> Task:
    make = functools.partial(cifar, **values)
    return Task(title, make, **settings, entries=ENTRIES)


TASKS = {
    'right': _cifar_task('CIFAR-100, right labels', _RIGHT),
    'wrong_40': _cifar_task('CIFAR-100, 40 % wrong', _WRONG, label_noise=0.4),
    'text': Task(
        'Python’s sources, transformer, AdamW',
        text,
        rho=0.2,
        rate=3e-3,
        sgd_rate=3e-3,
        entries=EQUAL,
        judge='loss',
    ),
    'lsq_4': dataclasses.replace(
        _cifar_task('CIFAR-100, right labels, 4 bits (LSQ)', _RIGHT, bits=4),
        entries=FEW,
        checked=False,
    ),
    # Other shares of wrong labels, and larger networks for an accelerator: .gpu runs
    # some methods with ResNet-18.
    'wrong_20': _cifar_task('CIFAR-100, 20 % wrong', _WRONG, label_noise=0.2),
    'wrong_60': _cifar_task('CIFAR-100, 60 % wrong', _WRONG, label_noise=0.6),
    'resnet18': _cifar_task('CIFAR-100, ResNet-18', _RIGHT, model='resnet18'),
    'resnet18_wrong_40': _cifar_task(
        'CIFAR-100, 40 % wrong, ResNet-18', _WRONG, model='resnet18', label_noise=0.4
    ),
    'wide_resnet': _cifar_task(
        'CIFAR-100, WideResNet-16-4', _RIGHT, model='wide_resnet', depth=16, width=4
    ),
    'wide_resnet_wrong_40': _cifar_task(
        'CIFAR-100, 40 % wrong, WideResNet-16-4',
        _WRONG,
        model='wide_resnet',
        label_noise=0.4,
        depth=16,
        width=4,
    ),
}
CHOSEN = ('right', 'wrong_40', 'text', 'lsq_4')

# ResNet-18 on an accelerator: by name a method, and the multiple of the ρ that was
# carried over.
ON_GPU = {
    'sgd': ('sgd', 1.0),
    'sam': ('sam', 1.0),
    'winner': (WINNER, 1.0),
    'eighth': (EIGHTH, 1.0),
    'steady': (STEADY, 1.0),
    'winner_rho_2': (WINNER, 0.5),
    'sam_rho_2': ('sam', 0.5),
    'winner_rho_4': (WINNER, 0.25),
}
