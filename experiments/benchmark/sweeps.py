"""Cost of a step against number of parameters, batch size and window.

On MLPs: they have the most parameters for their computation, so that what vSAM adds
(it goes through tensors of the size of the parameters) shows most.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.benchmark import jax_steps, rounds, variants
from experiments.benchmark.problems import Problem, mlp

PARAMETERS = (100_000, 1_000_000, 10_000_000)
BATCH_SIZES = (16, 64, 256, 1024)
WINDOWS = (10, 50, 250, 1000)
# What is held while another is swept.
_PARAMETERS = 1_000_000
_BATCH_SIZE = 128


class Point(NamedTuple):
    """What is measured at one place of a sweep.

    Attributes:
        problem: the network.
        window: K of vSAM.
        names: which of :data:`variants.VARIANTS`.
    """

    problem: Problem
    window: int
    names: tuple[str, ...]


_OF_VSAM = (variants.BASE, variants.SAMPLED, variants.REUSE, variants.TRACED_REUSE)


def _of_size(parameters: int, batch_size: int) -> Problem:
    """An MLP of about so many parameters."""
    return mlp(round(math.sqrt(parameters / 4)), batch_size)


def points(largest: int) -> dict[str, list[Point]]:
    """All sweeps by name: along each, one thing changes.

    Args:
        largest: parameters of the largest network.

    Returns:
        Lists of points.
    """
    return {
        'parameters': [
            Point(_of_size(n, _BATCH_SIZE), 50, variants.FEW)
            for n in (*(n for n in PARAMETERS if n < largest), largest)
        ],
        'batch_size': [
            Point(_of_size(min(_PARAMETERS, largest), n), 50, variants.FEW)
            for n in BATCH_SIZES
        ],
        'window': [
            Point(_of_size(min(_PARAMETERS, largest), _BATCH_SIZE), n, _OF_VSAM)
            for n in WINDOWS
        ],
    }


def measure(point: Point, number: int, advance: Callable[[], None]) -> dict[str, Any]:
    """Times the variants of one point.

    Args:
        point: the point.
        number: of rounds.
        advance: called after every round.

    Returns:
        ``parameters``, ``batch_size``, ``window`` and the rows of the steps.
    """
    runners = jax_steps.runners(point.problem, point.names, window=point.window)
    seconds = rounds.interleaved(runners, number, 2, advance)
    return {
        'parameters': point.problem.num_parameters,
        'batch_size': point.problem.batch_size,
        'window': point.window,
        'steps': rounds.rows(point.problem, runners, seconds),
    }
