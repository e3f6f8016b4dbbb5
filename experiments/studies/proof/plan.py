"""How long all runs take, from a few steps of each method, before any is made."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.common import configuration, files
from experiments.common.ledger import Ledger
from experiments.methods.compared import METHODS, config_of
from experiments.studies.proof.protocol import Unit
from experiments.studies.proof.task import TUNING_SEED, Task
from experiments.training import plans

LIMIT_HOURS = 10.0
# A multiple of how often methods take a second gradient.
CHUNK = 3
ROUNDS = 5


def timed(task: Task) -> dict[str, Any]:
    """By method, the configurations whose steps are timed."""
    config = task.config()
    methods = dict.fromkeys(entry.method for entry in task.entries.values())
    return {
        method: config_of(
            config, method, task.rho * METHODS[method].centre, task.rate, TUNING_SEED
        )
        for method in methods
    }


def settings_of(task: Task) -> str:
    """What times depend on, as text."""
    configs = timed(task).values()
    return json.dumps([configuration.of_run(config) for config in configs])


def make(ledger: Ledger, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """The plan, from times of steps.

    Args:
        ledger: for each task its ``steps_per_epoch``, and by method what
            :func:`experiments.training.speed.measure` says (``methods``).
        tasks: the tasks.

    Returns:
        The content of ``plan.json``: for each task the seconds of ``steps``, its
        parameters, and for each of its entries the epochs, the number of runs and
        their seconds.
    """
    found = {}
    for name, task in tasks.items():
        speeds = ledger[name]['methods']
        rows, checked = {}, set()
        for entry, row in task.entries.items():
            stretch = speeds['sam']['step'] / speeds[row.method]['step']
            unit = Unit(name, task, entry, stretch)
            seconds = run_seconds(
                unit, speeds[row.method], ledger[name]['steps_per_epoch']
            )
            # An entry of the same method has the same checks.
            checks = [] if row.method in checked else unit.checks()
            checked.add(row.method)
            share = sum(job.config.epochs for job in checks) / unit.epochs
            rows[entry] = {
                'method': row.method,
                'stretch': stretch,
                'epochs': unit.epochs,
                'checks': len(checks),
                'reported': len(row.seeds),
                'run_seconds': seconds,
                'seconds': speeds[row.method]['setup']
                + seconds * (share + len(row.seeds)),
            }
        found[name] = {
            'title': task.title,
            'parameters': speeds['sam']['parameters'],
            'steps_per_epoch': ledger[name]['steps_per_epoch'],
            'step_seconds': {m: row['step'] for m, row in speeds.items()},
            'entries': rows,
            'hours': sum(row['seconds'] for row in rows.values()) / 3600,
        }
    hours = sum(row['hours'] for row in found.values())
    return files.jsonable({'tasks': found, **plans.total(hours, LIMIT_HOURS)})


def run_seconds(unit: Unit, speed: Mapping[str, float], steps: int) -> float:
    """Seconds of a reported run, with an evaluation after each epoch.

    Args:
        unit: the entry.
        speed: of its method.
        steps: of an epoch.
    """
    return unit.epochs * (steps * speed['step'] + speed['evaluation'])


def units(
    plan: Mapping[str, Any], tasks: Mapping[str, Task], entries: Iterable[str]
) -> list[Unit]:
    """What a plan plans.

    Args:
        plan: the plan.
        tasks: the tasks that are wanted.
        entries: names of the entries that are wanted.

    Raises:
        ConfigError: if the plan lacks one of them.
    """
    found = []
    wanted = set(entries)
    for name, task in tasks.items():
        rows = plan['tasks'].get(name, {}).get('entries', {})
        for entry, row in task.entries.items():
            if entry not in wanted:
                continue
            if entry not in rows or rows[entry]['method'] != row.method:
                raise configuration.ConfigError(
                    f'{plans.PLAN} must plan {entry} ({row.method}) on {name}; make it'
                    ' again with --plan.'
                )
            planned = rows[entry]
            found.append(
                Unit(name, task, entry, planned['stretch'], planned['run_seconds'])
            )
    return found


def rows_of(plan: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: an entry per row, and the sum."""
    header = ['Task', 'Parameters', 'Entry', 'Epochs', 'Step, ms', 'Seconds a run']
    header += ['Runs', 'Shorter runs before', 'Core hours']
    rows = []
    for task in plan['tasks'].values():
        for name, row in task['entries'].items():
            step = task['step_seconds'][row['method']]
            rows.append(
                [
                    task['title'],
                    f'{task["parameters"]:,}',
                    name,
                    str(row['epochs']),
                    f'{1e3 * step:.0f}',
                    f'{row["run_seconds"]:.0f}',
                    str(row['reported']),
                    str(row['checks']),
                    f'{row["seconds"] / 3600:.2f}',
                ]
            )
    rows.append(['all', *[''] * 7, f'{plan["core_hours"]:.2f}'])
    return header, rows


def write(plan: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes ``plan.json`` and ``plan.md``."""
    note = (
        f'From {CHUNK * ROUNDS} steps of each method, in turns. Seconds are those that'
        ' a core is busy.'
    )
    plans.write(plan, folder, *rows_of(plan), note)
