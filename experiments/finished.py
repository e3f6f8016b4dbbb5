"""What a finished run left behind: its result and the weights in its checkpoints."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from experiments import configuration, results
from experiments.configuration import ConfigError

PyTree = Any


def result_of(path: pathlib.Path) -> dict[str, Any]:
    """What ``result.json`` of a run holds.

    Args:
        path: the workdir of the run.

    Returns:
        The result; its settings, under ``'config'``, are a dictionary, without the
        directories of the machine that it ran on.

    Raises:
        ConfigError: if no finished run is there.
    """
    try:
        result = json.loads((path / results.RESULT).read_text())
        if not isinstance(result['config'], dict):
            raise TypeError(f'no settings but {result["config"]!r}')
        settings = configuration.without_places(result['config'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'expected the workdir of a finished run, got {str(path)!r}: {error!r}.'
        ) from error
    return {**result, 'config': settings}


def steps(path: pathlib.Path) -> list[int]:
    """The steps that a run has checkpoints of, in order.

    Raises:
        ConfigError: if there are none.
    """
    directory = (path / results.CHECKPOINTS).absolute()
    # A manager would make the directory.
    if directory.is_dir():
        with _manager(directory) as manager:
            found = sorted(manager.all_steps())
        if found:
            return found
    raise ConfigError(
        f'{path} holds no checkpoint; run it with config.checkpoint_every > 0.'
    )


def variables(path: pathlib.Path, like: PyTree, step: int | None = None) -> PyTree:
    """The variables of a network, from a checkpoint.

    Args:
        path: the workdir of the run.
        like: ``params`` and, where the network has any, ``batch_stats``: arrays or
            ``jax.ShapeDtypeStruct`` objects, which say what is read. Where the
            checkpoint lacks one of them, that leaf comes back as it is.
        step: of which step; None for the last one.

    Returns:
        A tree like ``like`` of arrays on the host, in the shapes of the checkpoint.

    Raises:
        ConfigError: if there is no checkpoint.
    """
    # Takes seconds to import.
    import orbax.checkpoint as ocp

    step = steps(path)[-1] if step is None else step
    arguments = ocp.args.PyTreeRestore(
        item=like,
        partial_restore=True,
        # Not as jax.Array: those would go back to the devices of the run.
        restore_args=jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like
        ),
    )
    with _manager((path / results.CHECKPOINTS).absolute()) as manager:
        return manager.restore(step, args=ocp.args.Composite(state=arguments))['state']


def _manager(directory: pathlib.Path) -> Any:
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(directory)
