"""Times of several ways to make a step, interleaved.

Every runner makes a few steps in turn, round after round, in a new order each time.
A cost is the median over the rounds of (its time / the time of another one in the
same round), so that whatever else the machine does in a round touches both.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from experiments.benchmark import variants
from experiments.benchmark.problems import Problem
from experiments.common import timing
from experiments.report import statistics

# A runner runs for about so many seconds in a round.
_SECONDS = 0.3
# One that is this many times slower than the first one is timed in few rounds.
_SLOW = 8.0
_ROUNDS_OF_SLOW = 3


class Runner(Protocol):
    """Something that makes steps and says how long they took."""

    @property
    def steps(self) -> int:
        """How many optimizer steps a cycle is."""
        ...

    def run(self, cycles: int) -> float:
        """Makes some cycles of steps and returns the seconds that a step took."""
        ...


def interleaved(
    runners: Mapping[str, Runner],
    rounds: int,
    steps: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Times runners in turn.

    Args:
        runners: by name; the first one is the quick one.
        rounds: how many rounds.
        steps: how many steps a runner makes in a round, or more if they are short.
        advance: called after every round, for a progress bar.

    Returns:
        By name the seconds of a step, round after round; those of a slow one are
        from the first few rounds.
    """
    for runner in runners.values():
        runner.run(1)  # May take many times what the next calls take.
    warm = {name: runner.run(1) for name, runner in runners.items()}
    first = next(iter(runners))
    least = max(_SLOW * warm[first], _SECONDS)
    slow = {name: _ROUNDS_OF_SLOW for name in runners if warm[name] > least}
    steps = max(steps, math.ceil(_SECONDS / warm[first]))
    cycles = {
        name: 1 if name in slow else math.ceil(steps / runner.steps)
        for name, runner in runners.items()
    }
    return timing.interleaved(
        {
            name: functools.partial(runner.run, cycles[name])
            for name, runner in runners.items()
        },
        rounds,
        skipped=0,
        at_most=slow,
        advance=advance,
    )


def ratios(
    seconds: Mapping[str, Sequence[float]], name: str, to: str
) -> dict[str, Any]:
    """Median and quartiles of a time as a multiple of another of the same round."""
    # A slow one took part in the first rounds only.
    pairs = zip(seconds[name], seconds[to], strict=False)
    return statistics.quartiles(a / b for a, b in pairs)


def milliseconds_of(seconds: Sequence[float]) -> float:
    """The median of the times of a step."""
    return 1e3 * float(np.median(seconds))


def rows(
    problem: Problem,
    runners: Mapping[str, Any],
    seconds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """What was measured of each runner.

    Args:
        problem: the network.
        runners: by title, those of a library after that of its base optimizer.
        seconds: from :func:`interleaved`.

    Returns:
        For each title the cost as a multiple of the base optimizer of the same
        library (median and quartiles) and of ``optax.contrib.sam`` (where it is
        there), the number of rounds, milliseconds of a step, examples a second,
        seconds of compilation, operations of a step and conditionals.
    """
    bases: dict[str, str] = {}
    found = {}
    for title, runner in runners.items():
        base = bases.setdefault(runner.library, title)
        milliseconds = milliseconds_of(seconds[title])
        row = {
            'library': runner.library,
            'times_base': ratios(seconds, title, base),
            'rounds': len(seconds[title]),
            'step_milliseconds': milliseconds,
            'examples_per_second': 1e3 * problem.batch_size / milliseconds,
            'compile_seconds': runner.compile_seconds,
            'flops': runner.flops,
            'conditionals': runner.conditionals,
        }
        if variants.OPTAX_SAM in seconds:
            row['times_optax_sam'] = ratios(seconds, title, variants.OPTAX_SAM)
        found[title] = row
    return found
