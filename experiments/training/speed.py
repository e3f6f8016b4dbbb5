"""How long the steps of several configurations take, a chunk of each in turn."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments.common import timing
from experiments.data.examples import Dataset
from experiments.training.experiment import Experiment, build


class Running:
    """A run that goes on for a chunk of steps at a time.

    Args:
        experiment: what is run, with the seed of its configuration.

    Attributes:
        experiment: as above.
        state: after the steps so far.
        step: how many these are.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.state = experiment.init(experiment.config.seed)
        self.step = 0
        self.batch = self._take()
        experiment.step.compile(self.state, self.batch)

    def _take(self) -> Any:
        batches = self.experiment.batches
        epoch, index = divmod(self.step, batches.steps_per_epoch)
        if index == 0:
            self._epoch = batches.epoch(self.experiment.config.seed, epoch)
        return batches.take(batches.dataset.train, self._epoch, index)

    def chunk(self, steps: int) -> Any:
        """Makes so many steps; returns the state, for which one may wait."""
        for _ in range(steps):
            self.state = self.experiment.step(self.state, self._take())
            self.step += 1
        return self.state


def processor_seconds(work: Callable[[], Any]) -> float:
    """Seconds that a piece of work keeps the processor busy.

    On a CPU those that this process computes, all its threads together: what it takes
    on one core that nothing else uses. Elsewhere those until the result is there.

    Args:
        work: what is timed; what it returns is waited for.
    """
    if jax.default_backend() != 'cpu':
        return timing.seconds_of(work)
    start = time.process_time()
    jax.block_until_ready(work())
    return time.process_time() - start


def measure(
    configs: Mapping[str, Any],
    dataset: Dataset,
    rounds: int,
    chunk: int,
    advance: Callable[[], Any] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Times the steps of configurations that differ in their method.

    Args:
        configs: by name, configurations of the same data.
        dataset: that data.
        rounds: how many rounds.
        chunk: steps in a round; a multiple of how often second gradients are taken.
        advance: called after every round.

    Returns:
        By name the seconds of a ``step`` (median over rounds), of all that is done
        before the first one (``setup``: compiling, above all) and of evaluating
        (``evaluation``), as :func:`processor_seconds` has them; the number of
        ``parameters``.
    """
    runs, found = {}, {}
    for name, config in configs.items():

        def start(name: str = name, config: Any = config) -> Any:
            runs[name] = Running(build(config, dataset, shared=True))
            return runs[name].experiment.evaluate(runs[name].state)

        setup = processor_seconds(start)
        run = runs[name]
        again = functools.partial(run.experiment.evaluate, run.state)
        found[name] = {
            'setup': setup,
            'evaluation': processor_seconds(again),
            'parameters': sum(x.size for x in jax.tree.leaves(run.state.params)),
        }
    seconds = timing.interleaved(
        {
            name: functools.partial(
                processor_seconds, functools.partial(run.chunk, chunk)
            )
            for name, run in runs.items()
        },
        rounds,
        skipped=0,
        advance=advance,
    )
    for name, taken in seconds.items():
        found[name]['step'] = float(np.median(taken)) / chunk
    return found
