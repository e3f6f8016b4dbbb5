"""The processes of a run, one per host of a pod, say.

Each runs the same program; process 0 alone writes files.
"""

import functools
import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.common import configuration

T = TypeVar('T')


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of a run; before jax is asked for any device.

    Args:
        coordinator: ``'HOST:PORT'`` of process 0. None, as the others: what the
            cluster says, where jax knows it (TPU pods, Slurm, Open MPI, Kubernetes).
        num_processes: how many processes there are.
        process_id: which one this is, from 0 on.

    Raises:
        ConfigError: if something was left out that is not known otherwise.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (TypeError, ValueError) as error:
        raise configuration.ConfigError(
            f'processes cannot be joined: {error} Where jax does not know the cluster,'
            ' coordinator, num_processes and process_id must be given.'
        ) from error


def is_first() -> bool:
    """Whether this is process 0, which writes files."""
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
    """Calls a function in process 0 alone.

    Args:
        function: takes nothing and returns a JSON value. It must use no array that
            is not on a device of this process.

    Returns:
        What it returned, in all processes.

    Raises:
        ConfigError: in all processes, if the function raised one.
    """
    if jax.process_count() == 1:
        return function()
    outcome = {}
    if is_first():
        try:
            outcome = {'value': function()}
        except configuration.ConfigError as error:
            outcome = {'error': str(error)}
    outcome = json.loads(_from_first(json.dumps(outcome).encode()))
    if 'error' in outcome:
        raise configuration.ConfigError(outcome['error'])
    return outcome['value']


def _from_first(content: bytes) -> bytes:
    """The bytes that process 0 has."""
    broadcast = functools.partial(
        multihost_utils.broadcast_one_to_all, is_source=is_first()
    )
    # Arrays must have one shape in all processes.
    size = int(broadcast(np.int32(len(content))))
    return np.asarray(
        broadcast(np.frombuffer(content.ljust(size)[:size], np.uint8))
    ).tobytes()
