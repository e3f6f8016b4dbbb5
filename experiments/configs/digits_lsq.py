r"""The noisy digits of ``digits.py`` in a few bits: quantization-aware training.

``--config=experiments/configs/digits_lsq.py`` trains weights and activations of 4 bits,
``…/digits_lsq.py:2`` those of 2. From random weights; to start from full precision run
the same network without quantization first, and name its workdir:

    python -m experiments.train --config=experiments/configs/digits.py \
        --config.method=sam --config.checkpoint_every=60 --workdir=runs/full/sam/seed0
    python -m experiments.train --config=experiments/configs/digits_lsq.py:2 \
        --config.method=sam --config.init_from='runs/full/{method}/seed{seed}' \
        --workdir=runs/lsq/sam
"""

import ml_collections

from experiments.configs import digits


def get_config(bits: str = '4') -> ml_collections.ConfigDict:
    """Every number of a run.

    Args:
        bits: how many bits weights and activations have, in decimal digits.

    Returns:
        The configuration.

    Raises:
        ValueError: if ``bits`` is no number.
    """
    config = digits.get_config()
    config.name = f'digits_lsq{bits}'
    config.quantization = {'bits': int(bits)}
    for method in ('sam', 'asam', 'looksam', 'vsam'):
        # The second gradient is taken at other weights on the same grids.
        getattr(config.methods, method).update({'perturb_step_sizes': False})
    return config
