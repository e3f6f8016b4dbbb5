"""CIFAR-100 as the publication trains on it, but for how images are normalised.

Mean and deviation are CIFAR-100's own. The reference takes CIFAR-10's for both data
sets; ``--config.data.statistics=cifar10`` does the same.
"""

import ml_collections

from experiments.configs import cifar


def get_config() -> ml_collections.ConfigDict:
    """Every number of a run."""
    return cifar.recipe('cifar100', statistics='cifar100')
