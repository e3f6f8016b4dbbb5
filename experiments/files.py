"""Files that are either the old ones or complete."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import BinaryIO


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
