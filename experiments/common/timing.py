"""Times that can be compared although the machine is not quiet."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def seconds_of(work: Callable[[], Any]) -> float:
    """How long it takes until what a piece of work returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def interleaved(
    timers: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    skipped: int = 1,
    at_most: Mapping[str, int] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Times several pieces of work in turn, each round in a new order.

    Whatever slows the machine down for a while slows all of them, so the ratios
    of times of the same round stay what they are.

    Args:
        timers: by name, functions that do a piece of work and return its seconds.
        rounds: how many rounds.
        skipped: how many rounds before them are not kept.
        at_most: by name, in how many of the first rounds to take part.
        advance: called after every round that is kept, for a progress bar.

    Returns:
        By name what each returned, round after round.
    """
    order = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(-skipped, rounds):
        for name in order.permutation(list(timers)):
            if number < (at_most or {}).get(name, rounds):
                taken = timers[name]()
                if number >= 0:
                    seconds[name].append(taken)
        if number >= 0:
            advance()
    return seconds
