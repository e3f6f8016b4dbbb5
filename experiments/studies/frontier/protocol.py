"""Which runs there are: settings are chosen with some seeds, and tested with others."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from experiments.common.ledger import Job, Ledger, quality
from experiments.methods.compared import METHODS, config_of
from experiments.studies.frontier.task import Task

# A radius and a learning rate.
Pair = tuple[float, float]
# Seconds of a run, of a task and a method.
Seconds = Callable[[str, str], float]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A method on a task.

    Attributes:
        name: of the task.
        task: the task.
        method: the name of the method.
    """

    name: str
    task: Task
    method: str

    def key(self, pair: Pair, seed: int) -> str:
        """What a run is called in the ledger."""
        rho, rate = pair
        return f'{self.name}/{self.method}/rho={rho:g},rate={rate:g}/seed{seed}'

    def job(self, pair: Pair, seed: int, tests: bool, seconds: float = 1.0) -> Job:
        """The run of a pair and a seed."""
        rho, rate = pair
        return Job(
            self.key(pair, seed),
            config_of(self.task.config(), self.method, rho, rate, seed),
            {
                'task': self.name,
                'method': self.method,
                'rho': rho,
                'rate': rate,
                'seed': seed,
            },
            seconds,
            tests,
        )

    def pairs(self, sam: Pair | None) -> list[Pair]:
        """The pairs that are tried.

        Args:
            sam: the pair chosen for SAM; of no use for SGD and SAM themselves.

        Returns:
            Pairs; none where they depend on SAM's and that is not known.
        """
        task, method = self.task, METHODS[self.method]
        if self.method == 'sgd':
            return [(0.0, rate) for rate in task.sgd_rates]
        if self.method == 'sam':
            return list(itertools.product(task.radii, task.rates))
        if sam is None:
            return []
        rho, rate = sam
        # Rounded so that they are what their keys say.
        return [
            (float(f'{rho * method.centre * multiple:.4g}'), rate)
            for multiple in method.spacing
        ]


def chosen(ledger: Ledger, unit: Unit, sam: Pair | None) -> Pair | None:
    """The pair that is best on validation examples, None while any is missing."""
    pairs, seeds = unit.pairs(sam), unit.task.work.tuning
    keys = {pair: [unit.key(pair, seed) for seed in seeds] for pair in pairs}
    if not keys or any(key not in ledger for row in keys.values() for key in row):
        return None
    judged = lambda key: quality(ledger[key], 'validation', unit.task.judge)
    return max(keys, key=lambda pair: statistics.fmean(map(judged, keys[pair])))


def sam_pair(ledger: Ledger, name: str, task: Task) -> Pair | None:
    """The pair chosen for SAM, None while it is not known."""
    return chosen(ledger, Unit(name, task, 'sam'), None)


def jobs(
    ledger: Ledger,
    tasks: Mapping[str, Task],
    methods: Iterable[str],
    seconds: Seconds = lambda task, method: 1.0,
    *,
    only_tuning: bool = False,
) -> list[Job]:
    """The runs that can be made as the ledger stands, also those that are in it.

    Args:
        ledger: what was run.
        tasks: the tasks.
        methods: the methods that may take part, as far as a task has them.
        seconds: how long a run takes.
        only_tuning: whether to leave out the runs that are reported.

    Returns:
        Tuning runs of each method, those of SAM and SGD first; and where these are
        made the runs with the other seeds.
    """
    found = []
    methods = tuple(methods)
    for name, task in tasks.items():
        sam = sam_pair(ledger, name, task)
        for method in task.methods:
            if method not in methods:
                continue
            unit = Unit(name, task, method)
            taken = seconds(name, method)
            found += [
                unit.job(pair, seed, tests=False, seconds=taken)
                for pair in unit.pairs(sam)
                for seed in task.work.tuning
            ]
            best = chosen(ledger, unit, sam)
            if best is not None and not only_tuning:
                found += [
                    unit.job(best, seed, tests=True, seconds=taken)
                    for seed in task.work.seeds
                ]
    return found


def count(task: Task, method: str) -> tuple[int, int, int]:
    """How many settings, tuning runs and reported runs a method has on a task."""
    unit = Unit('', task, method)
    settings = len(unit.pairs((1.0, 1.0)))
    return settings, settings * len(task.work.tuning), len(task.work.seeds)


def accuracies(ledger: Ledger, unit: Unit, split: str = 'test') -> list[float] | None:
    """Accuracies of the reported runs, one per seed; None while any is missing."""
    lines = reported(ledger, unit)
    return None if lines is None else [line[split]['accuracy'] for line in lines]


def reported(ledger: Ledger, unit: Unit) -> list[dict[str, Any]] | None:
    """The lines of the reported runs, one per seed; None while any is missing."""
    pair = chosen(ledger, unit, sam_pair(ledger, unit.name, unit.task))
    if pair is None:
        return None
    keys = [unit.key(pair, seed) for seed in unit.task.work.seeds]
    if any(key not in ledger for key in keys):
        return None
    return [ledger[key] for key in keys]
