"""How methods are written in tables and figures."""

from typing import Any

TITLES = {
    'sgd': 'SGD',
    'sam': 'SAM',
    'asam': 'ASAM',
    'looksam': 'LookSAM',
    'esam': 'ESAM',
    'saf': 'SAF',
    'vsam': 'vSAM',
    'steady_vsam': 'steady vSAM',
}


def title(name: str, settings: Any = None) -> str:
    """How a method is written in tables and figures.

    Args:
        name: ``config.method``.
        settings: ``config.methods[name]``, which may have a ``title`` of its own.
    """
    return dict(settings or {}).get('title') or TITLES.get(name, name)
