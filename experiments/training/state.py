"""The state of a run, which keeps the numbers of its last steps."""

from typing import Any

import jax

import vsam_jax

PyTree = Any

# What is kept of every step.
COLUMNS = ('loss', 'accuracy', 'sampled', 'budget', 'grad_norm', 'psf_norm')


class RunState(vsam_jax.linen.TrainState):
    """A train state that keeps the numbers of its last steps on the device.

    Attributes:
        record: float32 [rows, len(COLUMNS)]; step i stands in row i % rows. The
            host reads it once per interval instead of waiting for every step.
        memory: what the method keeps besides the state of its optimizer; () if that
            is nothing.
    """

    record: jax.Array
    memory: PyTree
