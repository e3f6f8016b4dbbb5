"""The files that numbers of a run are written to while it goes on."""

import importlib.util
import json
import math
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.common import files

LOG = 'log.jsonl'

TRACE = 'trace.jsonl'

TENSORBOARD = 'tensorboard'


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
        entry = files.jsonable(entry)
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


class RunLog:
    """The files that numbers of a run are written to while it goes on.

    Args:
        path: the workdir.
        keep: how many steps of what an interrupted run wrote stay.
    """

    def __init__(self, path: pathlib.Path, keep: int):
        self._log = Lines(path / LOG, keep=keep)
        self._trace = Lines(path / TRACE, keep=keep)
        self._events = Events(path / TENSORBOARD, self.entries)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Those of the log."""
        return self._log.entries

    def __enter__(self) -> 'RunLog':
        return self

    def __exit__(self, *error: object) -> None:
        self._events.__exit__(*error)

    def append(self, entry: dict[str, Any], numbers: dict[str, np.ndarray]) -> None:
        """Writes the numbers of an interval and those of each of its steps."""
        self._trace.append({'step': entry['step'], **numbers})
        self._log.append(entry)
        self._events.append(entry)
