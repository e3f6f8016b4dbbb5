"""Names on a command line, separated by commas."""

import argparse
from collections.abc import Callable, Iterable


def of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """The ``type`` of an argument of :mod:`argparse` that takes some of the names.

    Args:
        known: the names that there are.

    Returns:
        A function that makes a list of a text and, for what is none of the names,
        raises :class:`argparse.ArgumentTypeError`, which names those that there are.

    Example:
        >>> of(['sgd', 'sam'])('sam,sgd')
        ['sam', 'sgd']
    """
    known = tuple(known)

    def names(text: str) -> list[str]:
        found = text.split(',')
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f'{", ".join(unknown)}: there are {", ".join(known)}'
            )
        return found

    return names
