"""Sharpness-aware training for JAX with a fraction of the second gradients."""

import importlib
from typing import TYPE_CHECKING, Any

from vsam_jax import (
    checkpoint,
    convolutions,
    perturbation,
    reuse,
    sampling,
    sharding,
    statistics,
)
from vsam_jax._diagnosis import Diagnosis, diagnose
from vsam_jax._family import aesam, asyncsam, fsam, gsam, vasso, wsam
from vsam_jax._methods import asam, lean_sam, looksam, sam, steady_vsam, vsam
from vsam_jax._metrics import metrics
from vsam_jax._momentum import MSAMState, msam, msam_eval_params
from vsam_jax._planned import PlannedStep
from vsam_jax._schedules import rho_schedule
from vsam_jax._state import VSAMState
from vsam_jax._transform import sharpness_aware

if TYPE_CHECKING:
    from vsam_jax import linen, nnx

__version__ = '0.2.0'

__all__ = [
    'Diagnosis',
    'MSAMState',
    'PlannedStep',
    'VSAMState',
    'aesam',
    'asam',
    'asyncsam',
    'checkpoint',
    'convolutions',
    'diagnose',
    'fsam',
    'gsam',
    'lean_sam',
    'linen',
    'looksam',
    'metrics',
    'msam',
    'msam_eval_params',
    'nnx',
    'perturbation',
    'reuse',
    'rho_schedule',
    'sam',
    'sampling',
    'sharding',
    'sharpness_aware',
    'statistics',
    'steady_vsam',
    'vasso',
    'vsam',
    'wsam',
]


def __getattr__(name: str) -> Any:
    # These import Flax, so they are loaded only on access.
    if name in ('linen', 'nnx'):
        return importlib.import_module(f'vsam_jax.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return [*__all__, '__version__']
