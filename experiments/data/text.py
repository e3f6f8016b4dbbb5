"""Bytes of text that is on every machine: the sources of Python's standard library."""

import functools
import os
import pathlib
import sysconfig
from collections.abc import Iterator, Mapping

import numpy as np

# Tests, tables of numbers and words, and what is not the library's own.
_LEFT_OUT = frozenset(
    {
        'test',
        'tests',
        'idlelib',
        'lib2to3',
        'encodings',
        'pydoc_data',
        'site-packages',
        'dist-packages',
    }
)
# Of ten files one is for validation and one for test.
_FOLDS = {'validation': (8,), 'test': (9,), 'train': tuple(range(8))}


def standard_library(
    sizes: Mapping[str, int], length: int, split_seed: int = 0
) -> dict[str, np.ndarray]:
    """Windows of the sources of the standard library, in splits of different files.

    The files are read from the installation, in the order of their names, and shuffled
    by the seed. Another version of Python has other files, so results are comparable
    on one version alone.

    Args:
        sizes: by split (``train``, ``validation``, ``test``), how many windows; 0 for
            all of ``train`` that there are.
        length: how many bytes a window predicts.
        split_seed: the order of the files.

    Returns:
        By split a uint8 array [windows, length + 1]. Windows follow each other; the
        last byte of one is the first of the next.

    Raises:
        ValueError: if there are not so many windows.
    """
    if length < 1:
        raise ValueError(f'length must be an integer >= 1, got {length!r}.')
    found = {}
    for split, size in sizes.items():
        text = _text(split, split_seed)
        there = (len(text) - 1) // length
        wanted = there if split == 'train' and size == 0 else size
        if not 0 <= wanted <= there:
            raise ValueError(
                f'{split} must be an integer in [0, {there}], the windows of {length}'
                f' bytes that there are, got {size!r}.'
            )
        rows = np.arange(wanted)[:, None] * length + np.arange(length + 1)
        found[split] = text[rows]
    return found


@functools.cache
def _text(split: str, split_seed: int) -> np.ndarray:
    """The bytes of the files of a split, one file after the other."""
    folder = pathlib.Path(sysconfig.get_path('stdlib'))
    files = sorted(_files(folder))
    order = np.random.default_rng(split_seed).permutation(len(files))
    chosen = [files[i] for n, i in enumerate(order) if n % 10 in _FOLDS[split]]
    return np.frombuffer(b'\n'.join(f.read_bytes() for f in chosen), np.uint8)


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for place, folders, names in os.walk(folder):
        # Not gone into: what is installed may be thousands of files.
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in names:
            # What the build wrote (_sysconfigdata) differs from machine to machine.
            if name.endswith('.py') and not name.startswith('_sysconfigdata'):
                yield pathlib.Path(place, name)
