"""Files of a run: where they are, how they are written, what they say about it.

====================  ==========================================================
``result.json``       settings, accuracies, times; there once a run is finished
``log.jsonl``         one line per logging interval: means, accuracies, speed
``trace.jsonl``       one line per interval with a list of numbers of each step
``checkpoints/``      the last complete checkpoints, where the settings ask for any
``tensorboard/``      the numbers of ``log.jsonl`` as events, for TensorBoard
====================  ==========================================================
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import resource
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats

from experiments import configuration, files

RESULT = 'result.json'
LOG = 'log.jsonl'
TRACE = 'trace.jsonl'
CHECKPOINTS = 'checkpoints'
TENSORBOARD = 'tensorboard'


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
    differs = configuration.differences(settings, jsonable(run))
    if differs:
        raise configuration.ConfigError(
            f'{path} holds a finished run with other settings:\n  '
            + '\n  '.join(differs)
            + '\nGive another workdir, or remove this one to run it again.'
        )
    return result


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a JSON file that is either the old one or complete."""
    text = json.dumps(jsonable(content), indent=1, allow_nan=False)
    with files.replacing(path) as file:
        file.write(f'{text}\n'.encode())


def jsonable(value: Any) -> Any:
    """Plain JSON values; numbers that are not finite, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray | jax.Array):
        return jsonable(np.asarray(value).tolist())
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, float):
        # Seven digits are what float32 has; more only make the files longer.
        return float(f'{value:.7g}') if math.isfinite(value) else None
    return value


class Lines:
    """A JSON-lines file that is appended to.

    Args:
        path: the file.
        keep: how many of its first steps stay: lines of later ones, written by a
            run that was then interrupted, are dropped.
    """

    def __init__(self, path: pathlib.Path, keep: int = 0):
        old = [entry for entry in read_lines(path) if entry['step'] <= keep]
        self.entries: list[dict[str, Any]] = old
        path.write_text(''.join(json.dumps(entry) + '\n' for entry in old))
        self._path = path

    def append(self, entry: dict[str, Any]) -> None:
        """Writes one line; ``entry['step']`` says up to which step it reaches."""
        entry = jsonable(entry)
        self.entries.append(entry)
        with self._path.open('a') as file:
            file.write(json.dumps(entry, allow_nan=False) + '\n')


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The entries of a JSON-lines file; a line that was cut short ends it."""
    entries = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries


class Events:
    """Scalars for TensorBoard; none where tensorboardX is not installed.

    Args:
        path: the directory of the events, made anew: what an interrupted run left
            there may lack events and have some of steps that are made again.
        entries: the entries of the log so far.
    """

    def __init__(self, path: pathlib.Path, entries: Iterable[dict[str, Any]] = ()):
        self._writer: Any = None
        if importlib.util.find_spec('tensorboardX') is None:
            return
        # Takes a while to import.
        import tensorboardX

        shutil.rmtree(path, ignore_errors=True)
        self._writer = tensorboardX.SummaryWriter(str(path), flush_secs=10)
        for entry in entries:
            self.append(entry)

    def __enter__(self) -> 'Events':
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def append(self, entry: dict[str, Any]) -> None:
        """Writes the finite numbers of an entry of the log, at its step."""
        if self._writer is None:
            return
        for name, value in entry.items():
            # Numbers that were not finite are null where the log was read.
            if name != 'step' and value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, entry['step'])


def environment() -> dict[str, Any]:
    """Versions and device, for the record."""
    device = jax.devices()[0]
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'vsam-jax')
    return {
        'versions': {
            'python': platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        'device': {
            'platform': device.platform,
            'kind': device.device_kind,
            'count': jax.device_count(),
            'cpu_cores': len(os.sched_getaffinity(0)),
            'machine': platform.machine(),
        },
    }


def system_variables() -> dict[str, str]:
    """Environment variables that change how fast programs run."""
    prefixes = ('MALLOC_', 'GLIBC_TUNABLES', 'LD_PRELOAD', 'XLA_', 'OMP_')
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)}


def command() -> str:
    """The command line of this process, without the interpreter's path."""
    arguments = sys.orig_argv[1:]
    if '-m' in arguments:
        arguments = arguments[arguments.index('-m') :]
    return shlex.join(['python', *arguments])


def peak_memory() -> int:
    """The most bytes used so far: of the device, of this process on the CPU."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != 'cpu' else None
    if stats and 'peak_bytes_in_use' in stats:
        return int(stats['peak_bytes_in_use'])
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def summary(values: Iterable[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values themselves."""
    values = [float(value) for value in values]
    return {
        'mean': float(np.mean(values)),
        'sd': float(np.std(values, ddof=1)) if len(values) > 1 else None,
        'values': values,
    }


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Mean of the differences ``values − others``, and its 95 % interval (t).

    Args:
        values: numbers, one per seed.
        others: as many, of the same seeds.

    Returns:
        The mean, and ``low`` and ``high``, which are None for a single seed.
    """
    differences = np.subtract(values, others)
    number, mean = len(differences), float(np.mean(differences))
    if number < 2:
        return {'mean': mean, 'low': None, 'high': None}
    error = float(np.std(differences, ddof=1)) / math.sqrt(number)
    half = float(stats.t.ppf(0.975, number - 1)) * error
    return {'mean': mean, 'low': mean - half, 'high': mean + half}


def quartiles(values: Iterable[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = np.quantile(list(values), (0.25, 0.5, 0.75))
    return {'median': float(median), 'low': float(low), 'high': float(high)}
