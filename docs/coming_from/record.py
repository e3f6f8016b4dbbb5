"""Runs the peers' programs of these pages and keeps what they compute.

    python docs/coming_from/record.py davda54_sam keras ...

Each page has a program in a peer's form, in the block after ``<!-- peer -->``. It is
run as it stands, where the peer is installed, and leaves the parameters in ``w`` and
``b``. Pages that are not named keep what was recorded before.
"""

import importlib.metadata
import json
import pathlib
import re
import sys
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent
RECORDED = HERE / 'recorded.json'

# What to name beside the numbers: packages, and what has no release to name.
PACKAGES = {
    'davda54_sam': ('torch',),
    'pytorch_optimizer': ('pytorch_optimizer', 'torch'),
    'composer': ('mosaicml', 'torch'),
    'keras': ('tf_keras', 'tensorflow_cpu'),
}
SOURCES = {'davda54_sam': 'sam.py at 3c3afdb'}


def main(pages: list[str]) -> None:
    """Records the named pages."""
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    for page in pages:
        recorded[page] = {'made_with': made_with(page), 'params': params_of(page)}
    RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + '\n')


def program(page: str) -> str:
    """The peer's program of a page."""
    text = (HERE / f'{page}.md').read_text()
    found = re.search(r'^<!-- peer -->\n```python\n(.*?)^```', text, re.DOTALL | re.M)
    if found is None:
        raise ValueError(f'page must have a block after <!-- peer -->, {page} has none')
    return found[1]


def params_of(page: str) -> dict[str, list[float]]:
    """Runs the peer's program; its parameters, each as a flat list."""
    names: dict[str, Any] = {'__name__': page}
    exec(compile(program(page), page, 'exec'), names)
    return {name: flat(names[name]) for name in ('w', 'b')}


def flat(array: Any) -> list[float]:
    """The numbers of an array of NumPy or PyTorch."""
    detach = getattr(array, 'detach', lambda: array)
    return np.ravel(np.asarray(detach())).tolist()


def made_with(page: str) -> str:
    """The versions that a page's numbers come from."""
    names = [SOURCES[page]] if page in SOURCES else []
    for package in PACKAGES[page]:
        names.append(f'{package} {importlib.metadata.version(package)}')
    return ', '.join(names)


if __name__ == '__main__':
    main(sys.argv[1:])
