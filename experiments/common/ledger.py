"""A file of results, a line of JSON each, that several processes may add to."""

import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.common import files


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is to be made, and ends as a line of a :class:`Ledger`.

    Attributes:
        key: what it is called in the file; also where it is made, below the workdir.
        config: every number of it.
        notes: what its line says besides the results.
        seconds: how long it is expected to take.
        tests: whether its line has results on the test examples. What settings are
            chosen with has none.
    """

    key: str
    config: Any
    notes: Mapping[str, Any]
    seconds: float = 1.0
    tests: bool = True


class Ledger:
    """Results by key, in a file that only ever grows.

    A line that was cut short, because the process or the machine stopped, is as if it
    were not there: what it was of is made again.

    Args:
        path: the file; it is made with the first result.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._lines: dict[str, dict[str, Any]] = {}
        self.reload()

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._lines[key]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._lines.values())

    def __len__(self) -> int:
        return len(self._lines)

    def reload(self) -> None:
        """Reads what other processes have added."""
        if not self._path.exists():
            return
        # A line may have been cut short within a letter.
        for text in self._path.read_text(errors='replace').splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            self._lines[line['key']] = line

    def add(self, key: str, content: Mapping[str, Any]) -> None:
        """Writes a line; numbers have seven digits, those not finite become null.

        Args:
            key: what the result is of; a later line takes the place of an earlier one.
            content: JSON values.
        """
        line = {'key': key, **files.jsonable(dict(content))}
        text = json.dumps(line, allow_nan=False, ensure_ascii=False)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open('a+b') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # The end of a line that was cut short.
                text = text if file.read(1) == b'\n' else '\n' + text
            file.write(f'{text}\n'.encode())
            file.flush()
            os.fsync(file.fileno())
        self._lines[key] = line


def quality(line: Mapping[str, Any], split: str, judge: str) -> float:
    """How good a run is; more is better, and what is not finite is worst.

    Args:
        line: what a ledger says of the run.
        split: ``'validation'`` or ``'test'``.
        judge: ``'accuracy'`` or ``'loss'``, of which less is better.
    """
    value = line[split][judge]
    if value is None:
        return -float('inf')
    return -value if judge == 'loss' else value
