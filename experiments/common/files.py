"""Files that are either the old ones or complete."""

import contextlib
import json
import math
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

import jax
import numpy as np

# Longer lines of JSON are broken where they hold more than numbers.
_LINE = 120


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block is left without error.

    Until then ``path`` is what it was, also if the process is killed or another
    one writes the same file.

    Args:
        path: the file that is made or replaced; its directory is there.

    Yields:
        A binary file to write to.
    """
    temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
    try:
        with temporary.open('xb') as file:
            yield file
            file.flush()
            # A new name must not outlive a crash that its content did not.
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a JSON file that is either the old one or complete."""
    text = _written(jsonable(content))
    with replacing(path) as file:
        file.write(f'{text}\n'.encode())


def _written(value: Any, margin: str = '') -> str:
    """JSON with lists of numbers, and whatever else is short, on one line."""
    line = json.dumps(value, allow_nan=False, ensure_ascii=False)
    nested = isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(x, dict | list) for x in value)
    )
    if not value or not nested or len(margin) + len(line) <= _LINE:
        return line
    inner = margin + ' '
    if isinstance(value, dict):
        parts = [
            f'{json.dumps(key, ensure_ascii=False)}: {_written(item, inner)}'
            for key, item in value.items()
        ]
        start, end = '{', '}'
    else:
        parts = [_written(item, inner) for item in value]
        start, end = '[', ']'
    lines = f',\n{inner}'.join(parts)
    return f'{start}\n{inner}{lines}\n{margin}{end}'


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
