"""Files of a run: where they are, how they are written, what they say about it.

====================  ==========================================================
``settings.json``     the settings, from the start of the run on
``result.json``       settings, accuracies, times; there once a run is finished
``log.jsonl``         one line per logging interval: means, accuracies, speed
``trace.jsonl``       one line per interval with a list of numbers of each step
``checkpoints/``      the last complete checkpoints, where the settings ask for any
``tensorboard/``      the numbers of ``log.jsonl`` as events, for TensorBoard
====================  ==========================================================
"""

import contextlib
import fcntl
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from experiments.common import configuration, files

SETTINGS = 'settings.json'
RESULT = 'result.json'
# What a run writes besides; see run_log and checkpoints.
_OTHERS = ('log.jsonl', 'trace.jsonl', 'checkpoints', 'tensorboard')


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


@contextlib.contextmanager
def claimed(path: pathlib.Path, run: dict[str, Any]) -> Iterator[None]:
    """Keeps others out of a workdir until the block is left, or the process killed.

    Args:
        path: the workdir, from :func:`open_workdir`.
        run: the settings of the run, from :func:`configuration.of_run`.

    Raises:
        ConfigError: if another process is at work there, if a run with other settings
            was begun there, or if there are files that this run would replace.
    """
    directory = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise configuration.ConfigError(
                f'{path} is in use: another process makes a run there. Give another'
                ' workdir, or wait until it is finished.'
            ) from error
        except OSError:
            pass  # A file system without locks.
        _begin(path, files.jsonable(run))
        try:
            yield
        finally:
            if not _written(path):
                # It ended before its first step, so other settings may follow.
                (path / SETTINGS).unlink()
    finally:
        os.close(directory)


def _begin(path: pathlib.Path, run: dict[str, Any]) -> None:
    """Writes the settings of a run, or checks that they are those there."""
    file = path / SETTINGS
    if not file.exists():
        if foreign := _written(path):
            raise configuration.ConfigError(
                f'{path} holds {", ".join(foreign)} of something else: there is no'
                f' {SETTINGS}. Give another workdir, or move them away.'
            )
        files.write_json(file, run)
        return
    try:
        settings = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise configuration.ConfigError(
            f'{file} holds no settings of a run ({error!r}). Move it away with what'
            ' else is there of the run.'
        ) from error
    _check_same(path, settings, run)


def _written(path: pathlib.Path) -> list[str]:
    """The files of a run that are there, but for its settings."""
    return [name for name in (RESULT, *_OTHERS) if (path / name).exists()]


def _check_same(
    path: pathlib.Path, there: dict[str, Any], here: dict[str, Any]
) -> None:
    differs = configuration.differences(there, here)
    if differs:
        raise configuration.ConfigError(
            f'{path} holds a run with other settings:\n  '
            + '\n  '.join(differs)
            + '\nGive another workdir, or remove this one to run it again.'
        )


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
    _check_same(path, result['config'], files.jsonable(run))
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
