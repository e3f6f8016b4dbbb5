r"""Screens slices of the mini-batch: accuracy, tuned, per task and method.

    python -m experiments.studies.slices \
        --output=experiments/studies/slices/results/slices.json

What is finished in the output is not made again, so that an interrupted run goes on.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.common import names, progress, quantities
from experiments.report import provenance, statistics
from experiments.studies.slices import methods, report, screen, tasks

TUNING_SEEDS = tuple(range(300, 306))
FIRST_SEED = 400


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the arguments say."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--output', type=pathlib.Path, required=True)
    for flag, known in (('--tasks', tasks.TASKS), ('--methods', methods.METHODS)):
        parser.add_argument(flag, type=names.of(known), default=list(known))
    parser.add_argument(
        '--seeds', type=quantities.count, default=50, help='how many are reported'
    )
    parser.add_argument(
        '--check', action='store_true', help='SGD and SAM as the trainer runs them'
    )
    options = parser.parse_args(arguments)
    if options.check:
        check(options.output)
    else:
        run(options.output, options.tasks, options.methods, options.seeds)


def run(
    output: pathlib.Path,
    task_names: Sequence[str],
    method_names: Sequence[str],
    num_seeds: int,
    tuning: Sequence[int] = TUNING_SEEDS,
) -> None:
    """Screens methods on tasks and writes each unit when it is done.

    Args:
        output: the result file; what is in it is not made again.
        task_names: of :data:`tasks.TASKS`.
        method_names: of :data:`methods.METHODS`; SAM and SGD are made in any case.
        num_seeds: how many seeds are reported.
        tuning: the seeds that settings are chosen with.
    """
    content = report.read(output)
    units = content['units']
    seeds = list(range(FIRST_SEED, FIRST_SEED + num_seeds))
    for task in task_names:
        # Differences are paired, so all methods of a task have the same seeds.
        earlier = content.setdefault('seeds', {}).setdefault(task, seeds)
        if earlier != seeds:
            raise SystemExit(f'{output} has {len(earlier)} seeds of {task}: --seeds')
    content['tuning_seeds'] = list(tuning)
    wanted = [*dict.fromkeys(('sam', 'sgd', *method_names))]
    todo = [(t, m) for t in task_names for m in wanted if f'{t}/{m}' not in units]
    total = sum(screen.num_calls(tasks.TASKS[t], m, tuning, seeds) for t, m in todo)
    with progress.bar(total, 'slices') as bar:
        for task, name in todo:
            bar.note(f'{task} {name}')
            program = screen.Program(
                tasks.TASKS[task], methods.METHODS[name], advance=bar.advance
            )
            pair = units[f'{task}/sam']['chosen'] if f'{task}/sam' in units else None
            units[f'{task}/{name}'] = screen.screen(
                tasks.TASKS[task],
                name,
                tuning,
                seeds,
                None if name == 'sgd' or pair is None else tuple(pair),
                program,
            )
            _write(output, content)
    _write(output, content)


def check(output: pathlib.Path) -> None:
    """Runs SGD and SAM with the trainer's batch size, seeds and settings."""
    content = report.read(output)
    task = dataclasses.replace(tasks.TASKS['mlp_600'], batch_size=100)
    found = content.setdefault('check', {})
    for name in ('sgd', 'sam'):
        theirs = report.trainer_results(name)
        program = screen.Program(
            task, methods.METHODS[name], width=len(theirs['seeds'])
        )
        runs = [(seed, theirs['pair']) for seed in theirs['seeds']]
        values = [round(float(x), 4) for x in program(runs)[:, 1]]
        found[f'mlp_600 {name}'] = {
            'here': statistics.summary(values),
            'trainer': statistics.summary(theirs['values']),
            'difference': statistics.paired(values, theirs['values']),
        }
    _write(output, content)


def _write(output: pathlib.Path, content: dict[str, Any]) -> None:
    commands = content.setdefault('commands', [])
    if (command := provenance.command()) not in commands:
        commands.append(command)
    keys = ('commands', 'seeds', 'tuning_seeds', 'first_run', 'check')
    head = {key: content[key] for key in keys if key in content}
    report.write(
        output, {**head, **provenance.environment(), 'units': content['units']}
    )


if __name__ == '__main__':
    main()
