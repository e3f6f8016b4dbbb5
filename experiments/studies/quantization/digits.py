r"""The noisy digits of ``configs/digits.py`` in few bits: quantization-aware training.

``--config=experiments/studies/quantization/digits.py`` trains weights and activations
of 4 bits, ``…/digits.py:2`` those of 2. From random weights; to start from full
precision run the same network without quantization first, and name its workdir:

    python -m experiments.train --config=experiments/configs/digits.py \
        --config.method=sam --config.checkpoint_every=60 --workdir=runs/full/sam/seed0
    python -m experiments.train \
        --config=experiments/studies/quantization/digits.py:2 \
        --config.method=sam --config.init_from='runs/full/{method}/seed{seed}' \
        --workdir=runs/lsq/sam
"""

from typing import Any

import ml_collections

from experiments.configs import digits
from experiments.methods import titles


def get_config(bits: str = '4') -> ml_collections.ConfigDict:
    """Every number of a run.

    Args:
        bits: how many bits weights and activations have, in decimal digits.

    Returns:
        The configuration.

    Raises:
        ValueError: if ``bits`` is no number.
    """
    config: Any = digits.get_config()
    config.name = f'digits_lsq{bits}'
    config.quantization = {'bits': int(bits)}
    with_perturbed_steps(config)
    names = ('sgd', 'sam', 'vsam', 'steady_vsam', 'sam_steps', 'vsam_steps')
    config.compare.methods = names
    config.tune = {
        'seeds': (100, 101),
        'grid': (
            (
                'sgd',
                'methods.sgd.optimizer.learning_rate',
                (0.003, 0.005, 0.007, 0.014, 0.03, 0.1),
                {},
            ),
            *(
                (name, f'methods.{name}.rho', (0.5, 1.0, 1.4, 2.0), {})
                for name in names[1:]
            ),
        ),
    }
    return config


def with_perturbed_steps(config: Any) -> None:
    """Adds SAM and vSAM as they are without a mask: step sizes perturbed as well.

    The others take the second gradient at other weights on the same grids.

    Args:
        config: the configuration of a quantized network, which is changed.
    """
    for name in ('sam', 'vsam'):
        config.methods[f'{name}_steps'] = {
            'direction': name,
            'title': f'{titles.TITLES[name]}, steps perturbed',
            **config.methods[name].to_dict(),
        }
    for name in ('sam', 'asam', 'looksam', 'vsam', 'steady_vsam'):
        config.methods[name].perturb_step_sizes = False
