"""The noisy images of ``configs/cifar100_small.py`` in a few bits, from random weights.

``--config=experiments/studies/quantization/cifar100_small.py`` trains weights and
activations of 4 bits, ``…:2`` those of 2. Learning rate and ρ of each method are those
that were chosen for it in full precision: what carries over is what is asked.
"""

import pathlib
from typing import Any

import ml_collections

from experiments.common import configuration
from experiments.configs import cifar100_small
from experiments.report import tuning
from experiments.studies.quantization import digits

_TUNING = pathlib.Path(__file__).parents[2] / 'results/cifar100_small/noisy/tuning.json'


def get_config(bits: str = '4') -> ml_collections.ConfigDict:
    """Every number of a run.

    Args:
        bits: how many bits weights and activations have, in decimal digits.

    Returns:
        The configuration.

    Raises:
        ValueError: if ``bits`` is no number.
    """
    config: Any = cifar100_small.get_config('noisy')
    names = ('sgd', 'sam', 'vsam', 'steady_vsam')
    chosen = tuning.load_chosen(_TUNING, config.name)
    for name in names:
        config = configuration.with_values(config, chosen[name])
    config.name = f'cifar100_small_lsq{bits}'
    config.quantization = {'bits': int(bits)}
    digits.with_perturbed_steps(config)
    config.compare.update({'methods': names, 'seeds': (0, 1, 2, 3, 4)})
    # Nothing is tuned.
    del config.tune
    return config
