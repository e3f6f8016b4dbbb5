"""CIFAR-10 as the publication trains on it; normalised with its own statistics."""

import ml_collections

from experiments.configs import cifar


def get_config() -> ml_collections.ConfigDict:
    """Every number of a run."""
    return cifar.recipe('cifar10', statistics='cifar10')
