"""Numbers on a command line: those that make no sense are refused by their name."""

import argparse
import math


def count(text: str) -> int:
    """The ``type`` of an argument of :mod:`argparse` that counts something.

    Args:
        text: a whole number from 1 on.

    Raises:
        argparse.ArgumentTypeError: for anything else.

    Example:
        >>> count('3')
        3
    """
    try:
        found = int(text)
    except ValueError:
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(
            f'must be a whole number of at least 1, got {text!r}'
        )
    return found


def positive(text: str) -> float:
    """The ``type`` of an argument of :mod:`argparse` that measures something.

    Args:
        text: a finite number above 0.

    Raises:
        argparse.ArgumentTypeError: for anything else.

    Example:
        >>> positive('0.3')
        0.3
    """
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(
            f'must be a finite number above 0, got {text!r}'
        )
    return found
