"""Sharpness-aware training for JAX at nearly the price of SGD."""

from vsam_jax import perturbation, reuse, sampling, statistics
from vsam_jax.dispatch import PlannedStep
from vsam_jax.methods import STATIC_ARGS, asam, looksam, random_sam, sam, vsam
from vsam_jax.state import VSAMState
from vsam_jax.train_state import TrainState, make_train_step
from vsam_jax.transform import sharpness_aware

__version__ = '0.1.0'

__all__ = [
    'STATIC_ARGS',
    'PlannedStep',
    'TrainState',
    'VSAMState',
    'asam',
    'looksam',
    'make_train_step',
    'perturbation',
    'random_sam',
    'reuse',
    'sam',
    'sampling',
    'sharpness_aware',
    'statistics',
    'vsam',
]
