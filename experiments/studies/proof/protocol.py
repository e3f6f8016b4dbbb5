"""Which runs there are: settings are checked with one seed, reported with others."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from experiments.common import configuration
from experiments.common.ledger import Job, Ledger, quality
from experiments.methods.compared import METHODS, config_of
from experiments.studies.proof.task import (
    CHECK,
    MULTIPLES,
    TUNING_SEED,
    Entry,
    Task,
)


@dataclasses.dataclass(frozen=True)
class Unit:
    """An entry of a task.

    Attributes:
        name: of the task.
        task: the task.
        entry: the name of the entry.
        stretch: seconds of a step of SAM by those of the entry: what its epochs are
            multiplied with for equal time.
        seconds: of a reported run.
    """

    name: str
    task: Task
    entry: str
    stretch: float = 1.0
    seconds: float = 1.0

    @property
    def key(self) -> str:
        """What it is called in a plan."""
        return f'{self.name}/{self.entry}'

    @property
    def row(self) -> Entry:
        """What the task says of it."""
        return self.task.entries[self.entry]

    @property
    def method(self) -> str:
        """One of :data:`METHODS`."""
        return self.row.method

    @property
    def epochs(self) -> int:
        """Of a reported run."""
        if not self.row.equal_time:
            return self.task.epochs
        return max(round(self.stretch * self.task.epochs), 1)

    def pairs(self) -> list[tuple[float, float]]:
        """ρ and learning rate, those carried over in the middle."""
        task, centre = self.task, METHODS[self.method].centre
        multiples = MULTIPLES if task.checked else (1.0,)
        short = lambda value: float(f'{value:.4g}')
        if self.method == 'sgd':
            return [(0.0, short(task.sgd_rate * m)) for m in multiples]
        return [(short(task.rho * centre * m), task.rate) for m in multiples]

    def checks(self) -> list[Job]:
        """The runs that settings are chosen with, none where there is no choice."""
        pairs = self.pairs()
        epochs = max(round(CHECK * self.task.epochs), 1)
        return [
            self._job(pair, TUNING_SEED, epochs, tests=False)
            for pair in pairs
            if len(pairs) > 1
        ]

    def reported(self, pair: tuple[float, float]) -> list[Job]:
        """The runs with the settings that were chosen."""
        return [
            self._job(pair, seed, self.epochs, tests=True) for seed in self.row.seeds
        ]

    def _job(
        self, pair: tuple[float, float], seed: int, epochs: int, tests: bool
    ) -> Job:
        rho, rate = pair
        config = config_of(self.task.config(), self.method, rho, rate, seed)
        place = self.key if tests else f'{self.name}/checks/{self.method}'
        return Job(
            f'{place}/rho={rho:g},rate={rate:g}/seed{seed}',
            configuration.with_values(config, {'epochs': epochs}),
            {
                'task': self.name,
                'entry': self.entry,
                'method': self.method,
                'rho': rho,
                'rate': rate,
                'seed': seed,
                'judge': self.task.judge,
            },
            self.seconds * epochs / self.epochs,
            tests,
        )


def chosen(ledger: Ledger, unit: Unit) -> tuple[float, float] | None:
    """ρ and learning rate that are best on validation examples.

    Args:
        ledger: what was run.
        unit: the entry.

    Returns:
        The pair; None while a check is missing.
    """
    checks = unit.checks()
    if not checks:
        return unit.pairs()[0]
    if any(job.key not in ledger for job in checks):
        return None
    judged = [quality(ledger[j.key], 'validation', unit.task.judge) for j in checks]
    return unit.pairs()[judged.index(max(judged))]


def jobs(ledger: Ledger, unit: Unit) -> list[Job]:
    """The runs of an entry that can be made as the ledger stands, or are made."""
    pair = chosen(ledger, unit)
    return unit.checks() + ([] if pair is None else unit.reported(pair))


def lines(ledger: Ledger, unit: Unit) -> list[dict[str, Any]]:
    """The lines of the reported runs that are made, at most one per seed."""
    pair = chosen(ledger, unit)
    made = unit.reported(pair) if pair is not None else []
    return [ledger[job.key] for job in made if job.key in ledger]


def mean(found: list[dict[str, Any]], *path: str) -> float | None:
    """The mean over lines of a number in them; None if one of them lacks it."""
    values = []
    for line in found:
        value: Any = line
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        values.append(value)
    return None if None in values else statistics.fmean(values)


def percent(lines: list[dict[str, Any]], *path: str) -> str:
    """A mean over lines in percent, – where a line lacks it."""
    value = mean(lines, *path)
    return '–' if value is None else f'{100 * value:.1f}'


def number(lines: list[dict[str, Any]], *path: str) -> str:
    """A mean over lines, – where a line lacks it."""
    value = mean(lines, *path)
    return '–' if value is None else f'{value:.3f}'
