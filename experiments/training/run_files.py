"""Files of a run: where they are, how they are written, what they say about it.

====================  ==========================================================
``result.json``       settings, accuracies, times; there once a run is finished
``log.jsonl``         one line per logging interval: means, accuracies, speed
``trace.jsonl``       one line per interval with a list of numbers of each step
``checkpoints/``      the last complete checkpoints, where the settings ask for any
``tensorboard/``      the numbers of ``log.jsonl`` as events, for TensorBoard
====================  ==========================================================
"""

import json
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from experiments.common import configuration, files

PyTree = Any

RESULT = 'result.json'

CHECKPOINTS = 'checkpoints'


def open_workdir(workdir: str | os.PathLike) -> pathlib.Path:
    """Makes the directory and checks that files can be written into it.

    Raises:
        ConfigError: if that is not so.
    """
    path = pathlib.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise configuration.ConfigError(
            'workdir must be a directory that files can be written into, got'
            f' {str(path)!r}: {error.strerror}.'
        ) from error
    return path


def finished(path: pathlib.Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run in ``path``, None if there is none.

    Args:
        path: the workdir of the run.
        run: its settings, from :func:`configuration.of_run`.

    Returns:
        What ``result.json`` holds.

    Raises:
        ConfigError: if the run there had other settings.
    """
    file = path / RESULT
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text())
        settings = configuration.without_places(result['config'])
    except (ValueError, KeyError, TypeError) as error:
        raise configuration.ConfigError(
            f'{file} is no result of a run ({error!r}). Move it away.'
        ) from error
    # Both sides went the same way: in the file, numbers have seven digits.
    differs = configuration.differences(settings, files.jsonable(run))
    if differs:
        raise configuration.ConfigError(
            f'{path} holds a finished run with other settings:\n  '
            + '\n  '.join(differs)
            + '\nGive another workdir, or remove this one to run it again.'
        )
    return result


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
        result = json.loads((path / RESULT).read_text())
        if not isinstance(result['config'], dict):
            raise TypeError(f'no settings but {result["config"]!r}')
        settings = configuration.without_places(result['config'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise configuration.ConfigError(
            f'expected the workdir of a finished run, got {str(path)!r}: {error!r}.'
        ) from error
    return {**result, 'config': settings}


def steps(path: pathlib.Path) -> list[int]:
    """The steps that a run has checkpoints of, in order.

    Raises:
        ConfigError: if there are none.
    """
    directory = (path / CHECKPOINTS).absolute()
    # A manager would make the directory.
    if directory.is_dir():
        with _manager(directory) as manager:
            found = sorted(manager.all_steps())
        if found:
            return found
    raise configuration.ConfigError(
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
    with _manager((path / CHECKPOINTS).absolute()) as manager:
        return manager.restore(step, args=ocp.args.Composite(state=arguments))['state']


def _manager(directory: pathlib.Path) -> Any:
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(directory)
