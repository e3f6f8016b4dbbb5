r"""Runs the methods on the tasks, in the order: plan, runs, times, report.

    python -m experiments.studies.frontier --plan
    taskset -c 0 python -m experiments.studies.frontier --shard=0/2 &
    taskset -c 1 python -m experiments.studies.frontier --shard=1/2
    python -m experiments.studies.frontier.cost
    python -m experiments.studies.frontier --report

Results are lines of ``results/runs.jsonl``. What is there is not made again, so the
same command goes on after an interruption.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments.common import configuration, names, shards
from experiments.common.ledger import Job, Ledger
from experiments.common.shards import Shard
from experiments.methods.compared import METHODS
from experiments.report import tables
from experiments.studies.frontier import plan, protocol, report
from experiments.studies.frontier.task import Task
from experiments.studies.frontier.tasks import CHOSEN, TASKS
from experiments.training import plans
from experiments.training.loop import train
from experiments.training.many import Maker

RESULTS = pathlib.Path(__file__).parent / 'results'
WAY_OUT = 'leave out --tasks or --methods'


def make_plan(
    folder: pathlib.Path,
    workdir: pathlib.Path,
    tasks: dict[str, Task],
    methods: Sequence[str],
) -> dict[str, Any]:
    """Makes the probes and, from these, ``plan.json`` and ``plan.md``."""
    ledger = Ledger(folder / 'probes.jsonl')
    jobs = plan.probes(tasks)
    Maker(ledger, workdir / 'probes', train).work(
        lambda: jobs, total=len(jobs), title='probes'
    )
    made = plan.make(ledger, tasks, methods)
    plan.write(made, folder)
    return made


def run(
    folder: pathlib.Path,
    workdir: pathlib.Path,
    tasks: dict[str, Task],
    methods: Sequence[str],
    shard: Shard,
    over: bool = False,
) -> None:
    """Makes the runs of a plan that are not made yet.

    Args:
        folder: where plan and results are.
        workdir: where runs are made.
        tasks: the tasks; those of the plan.
        methods: the methods.
        shard: which tasks, so that processes take about as long.
        over: whether more than :data:`plan.LIMIT_HOURS` are allowed.

    Raises:
        ConfigError: without a plan of these tasks and methods, or if it is too long.
    """
    known = plans.read(folder)
    for name, task in tasks.items():
        lacking = {m for m in task.methods if m in methods} - set(
            known['tasks'].get(name, {}).get('methods', ())
        )
        if lacking:
            raise configuration.ConfigError(
                f'{plans.PLAN} must plan {", ".join(sorted(lacking))} on {name};'
                ' make it again with --plan.'
            )
    seconds = functools.partial(plan.run_seconds, known)
    hours = lambda name: known['tasks'][name]['hours']
    plans.check_length(known, sum(map(hours, tasks)), WAY_OUT, over)
    # Whole tasks: where the other methods look for settings depends on SAM's.
    share = plans.share_out(tasks, hours, shard.count)[shard.index]
    own = {name: tasks[name] for name in tasks if name in share}
    ledger = Ledger(folder / 'runs.jsonl')
    lines = [line for line in ledger if line['task'] in own]
    total = sum(
        row['seconds']
        for name in own
        for method, row in known['tasks'][name]['methods'].items()
        if method in methods
    ) - sum(seconds(x['task'], x['method']) for x in lines if x['method'] in methods)

    def jobs() -> list[Job]:
        # Task by task, so that data and programs of one are there at a time.
        for name, task in own.items():
            found = protocol.jobs(ledger, {name: task}, methods, seconds)
            if any(job.key not in ledger for job in found):
                return found
        return []

    Maker(ledger, workdir, train).work(jobs, total=total, title='frontier')


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the arguments say."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--plan', action='store_true', help='how long it all takes')
    parser.add_argument('--report', action='store_true', help='tables and figure')
    parser.add_argument('--tasks', type=names.of(TASKS), default=list(CHOSEN))
    parser.add_argument('--methods', type=names.of(METHODS), default=list(METHODS))
    parser.add_argument('--shard', default='', help='index/count: a share of the tasks')
    parser.add_argument('--over', action='store_true', help='allow a longer plan')
    parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
    parser.add_argument('--workdir', type=pathlib.Path, default='runs/frontier')
    options = parser.parse_args(arguments)
    tasks, methods = {name: TASKS[name] for name in options.tasks}, options.methods
    try:
        shard = shards.parse(options.shard)
        if options.plan:
            made = make_plan(options.results, options.workdir, tasks, methods)
            tables.show('plan', *plan.rows_of(made))
            plans.check_length(made, made['core_hours'], WAY_OUT, options.over)
        elif options.report:
            for file in report.write(options.results):
                print(f'written to {file}')
        else:
            run(options.results, options.workdir, tasks, methods, shard, options.over)
    except configuration.ConfigError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit('Interrupted. The same command goes on; the last run is made again.')


if __name__ == '__main__':
    main()
