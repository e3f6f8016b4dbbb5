"""Sharpness-aware training for JAX with a fraction of the second gradients."""

from vsam_jax import (
    checkpoint,
    convolutions,
    perturbation,
    reuse,
    sampling,
    statistics,
)
from vsam_jax._metrics import metrics
from vsam_jax.dispatch import PlannedStep
from vsam_jax.methods import (
    asam,
    looksam,
    random_sam,
    sam,
    static_args,
    steady_vsam,
    vsam,
)
from vsam_jax.nnx_step import PlannedNNXStep, make_nnx_train_step
from vsam_jax.sharding import state_shardings
from vsam_jax.state import VSAMState, find_state
from vsam_jax.train_state import TrainState, make_train_step
from vsam_jax.transform import sharpness_aware

__version__ = '0.1.0'

__all__ = [
    'PlannedNNXStep',
    'PlannedStep',
    'TrainState',
    'VSAMState',
    'asam',
    'checkpoint',
    'convolutions',
    'find_state',
    'looksam',
    'make_nnx_train_step',
    'make_train_step',
    'metrics',
    'perturbation',
    'random_sam',
    'reuse',
    'sam',
    'sampling',
    'sharpness_aware',
    'state_shardings',
    'static_args',
    'statistics',
    'steady_vsam',
    'vsam',
]
