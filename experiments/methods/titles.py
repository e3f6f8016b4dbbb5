"""How methods are written in tables and figures."""

from typing import Any

TITLES = {
    'sgd': 'SGD',
    'sam': 'SAM',
    'asam': 'ASAM',
    'gsam': 'GSAM',
    'wsam': 'WSAM',
    'fsam': 'F-SAM',
    'vasso': 'VaSSO',
    'asyncsam': 'AsyncSAM',
    'aesam': 'AE-SAM',
    'msam': 'MSAM',
    'looksam': 'LookSAM',
    'esam': 'ESAM',
    'saf': 'SAF',
    'vsam': 'vSAM',
    'steady_vsam': 'steady vSAM',
    'lean_sam': 'lean SAM',
    'part_ascent': 'ascent on a part',
    'amplified': 'amplified',
}


def title(name: str, settings: Any = None) -> str:
    """How a method is written in tables and figures.

    Args:
        name: ``config.method``.
        settings: ``config.methods[name]``, which may have a ``title`` of its own.
    """
    return dict(settings or {}).get('title') or TITLES.get(name, name)
