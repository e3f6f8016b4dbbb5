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

from experiments.common import configuration, files

RESULT = 'result.json'


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
    if not (path / RESULT).exists():
        return None
    result = result_of(path)
    # Both sides went the same way: in the file, numbers have seven digits.
    differs = configuration.differences(result['config'], files.jsonable(run))
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
        The result; its settings, under ``'config'``, are a dictionary.

    Raises:
        ConfigError: if no finished run is there.
    """
    file = path / RESULT
    try:
        result = json.loads(file.read_text())
        if not isinstance(result['config'], dict):
            raise TypeError(f'no settings but {result["config"]!r}')
    except OSError as error:
        raise configuration.ConfigError(
            f'expected the workdir of a finished run, got {str(path)!r}: there is no'
            f' {RESULT} that can be read ({error.strerror}).'
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise configuration.ConfigError(
            f'{file} is no result of a run ({error!r}). Move it away, and the run is'
            ' made again.'
        ) from error
    return result
