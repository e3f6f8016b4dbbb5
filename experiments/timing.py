"""Times that can be compared although the machine is not quiet."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.experiment import Experiment


def interleaved(
    chunks: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Runs several pieces of work in turn, again and again.

    Whatever slows the machine down for a while slows all of them, so the ratios
    of times of the same round stay what they are.

    Args:
        chunks: pieces of work by name; each is waited for.
        rounds: how often each is timed, after one round that is not.

    Returns:
        The seconds of each piece in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in chunks}
    for number in range(rounds + 1):
        for name, chunk in chunks.items():
            start = time.perf_counter()
            jax.block_until_ready(chunk())
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def training_chunk(
    experiment: Experiment, steps: int, sample: bool | None = None
) -> Callable[[], Any]:
    """Some steps of a training loop, as the trainer runs them.

    Args:
        experiment: what to run.
        steps: how many steps a call makes; the next call goes on from there.
        sample: for planned methods, whether all of them are sampled or none.

    Returns:
        A function that makes the steps and returns the state.
    """
    state = experiment.init(seed=0)
    epoch = experiment.epoch(seed=0, epoch=0)
    keywords = {} if sample is None else {'sample': sample}

    def chunk() -> Any:
        nonlocal state
        for index in range(steps):
            batch = experiment.batch(experiment.dataset.train, epoch, index)
            state, _ = experiment.step(state, batch, **keywords)
        return state

    return chunk
