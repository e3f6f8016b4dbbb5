"""How long all runs take, from a few short ones, before any is made."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.common import configuration, files
from experiments.common.ledger import Job, Ledger
from experiments.methods.compared import METHODS
from experiments.studies.frontier import protocol
from experiments.studies.frontier.protocol import Unit
from experiments.studies.frontier.task import Task
from experiments.training import plans

LIMIT_HOURS = 8.0
# Seeds that nothing else is run with; the second run compiles nothing.
SEEDS = (690, 691)
# About so many steps are timed.
STEPS = 120
PROBES = {'one': 'sgd', 'two': 'sam', 'some': 'steady_03'}


def probes(tasks: Mapping[str, Task]) -> list[Job]:
    """Short runs of each task: one for each class of cost, with two seeds."""
    found = []
    for name, task in tasks.items():
        pair = (task.radii[2], task.rates[0])
        for cost, method in PROBES.items():
            for seed in SEEDS:
                job = Unit(name, task, method).job(pair, seed, tests=False)
                config = job.config
                epochs = max(STEPS // _steps_per_epoch(config), 1)
                changes = {'epochs': epochs, 'log_every': epochs, 'eval_every': epochs}
                found.append(
                    Job(
                        f'{name}/{cost}/seed{seed}',
                        configuration.with_values(config, changes),
                        {'task': name, 'cost': cost},
                        tests=False,
                    )
                )
    return found


def _steps_per_epoch(config: Any) -> int:
    return config.data.train // config.batch_size


def make(
    ledger: Ledger, tasks: Mapping[str, Task], methods: Iterable[str]
) -> dict[str, Any]:
    """The plan, from finished probes.

    Args:
        ledger: of the probes.
        tasks: the tasks.
        methods: those that may take part.

    Returns:
        The content of ``plan.json``: for each task its steps, what a run of each class
        of cost takes (``run``), and a method once (``setup``: compiling, evaluating for
        the first time); for each of its methods the number of runs; and seconds.
    """
    methods = tuple(methods)
    found = {}
    for name, task in tasks.items():
        config = task.config()
        steps = config.epochs * _steps_per_epoch(config)
        seconds = {}
        for cost in PROBES:
            first, second = (ledger[f'{name}/{cost}/seed{seed}'] for seed in SEEDS)
            # The quicker of the two: whatever else ran is none of it.
            step = min(line['seconds'] / line['steps'] for line in (first, second))
            rest = second['wall'] - second['seconds']
            setup = max(first['wall'] - first['seconds'] - rest, 0.0)
            seconds[cost] = {'run': steps * step + rest, 'setup': setup}
        rows = {}
        for method in task.methods:
            if method in methods:
                _, tuning, reported = protocol.count(task, method)
                cost = seconds[METHODS[method].cost]
                rows[method] = {
                    'tuning_runs': tuning,
                    'reported_runs': reported,
                    'seconds': cost['setup'] + (tuning + reported) * cost['run'],
                }
        found[name] = {
            'title': task.title,
            'steps': steps,
            'seconds': seconds,
            'methods': rows,
            'hours': sum(row['seconds'] for row in rows.values()) / 3600,
        }
    hours = sum(row['hours'] for row in found.values())
    return files.jsonable({'tasks': found, **plans.total(hours, LIMIT_HOURS)})


def rows_of(plan: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a task per row, and the sum."""
    header = ['Task', 'Steps', 'Methods', 'Tuning runs', 'Reported runs']
    header += ['Seconds a run: one gradient', 'some', 'two', 'Core hours']
    rows, totals = [], [0, 0]
    for task in plan['tasks'].values():
        runs = [
            sum(method[kind] for method in task['methods'].values())
            for kind in ('tuning_runs', 'reported_runs')
        ]
        totals = [old + new for old, new in zip(totals, runs, strict=True)]
        rows.append(
            [
                task['title'],
                f'{task["steps"]:,}',
                str(len(task['methods'])),
                *map(str, runs),
                *(f'{task["seconds"][c]["run"]:.1f}' for c in ('one', 'some', 'two')),
                f'{task["hours"]:.2f}',
            ]
        )
    rows.append(
        ['all', '', '', *map(str, totals), '', '', '', f'{plan["core_hours"]:.2f}']
    )
    return header, rows


def write(plan: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes ``plan.json`` and ``plan.md``."""
    note = f'Measured with runs of about {STEPS} steps on one core.'
    plans.write(plan, folder, *rows_of(plan), note)


def run_seconds(plan: Mapping[str, Any], task: str, method: str) -> float:
    """How long a run takes, that of a method with its share of the setup."""
    row = plan['tasks'][task]['methods'][method]
    return row['seconds'] / (row['tuning_runs'] + row['reported_runs'])
