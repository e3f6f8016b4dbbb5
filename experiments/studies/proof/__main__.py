r"""Runs the proof, in the order: plan, runs, table.

    taskset -c 0 python -m experiments.studies.proof --plan
    taskset -c 0 python -m experiments.studies.proof --shard=0/2 &
    taskset -c 1 python -m experiments.studies.proof --shard=1/2
    python -m experiments.studies.proof --report

Results are lines of ``results/runs.jsonl``. What is there is not made again, and a run
that was interrupted goes on from its last checkpoint.
"""

import argparse
import hashlib
import itertools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common import configuration, names, progress, shards
from experiments.common.ledger import Job, Ledger
from experiments.common.shards import Shard
from experiments.data import sources
from experiments.report import tables
from experiments.studies.proof import measures, plan, protocol, report
from experiments.studies.proof.task import Task
from experiments.studies.proof.tasks import CHOSEN, TASKS
from experiments.training import plans, speed
from experiments.training.loop import train
from experiments.training.many import Maker

RESULTS = pathlib.Path(__file__).parent / 'results'
WAY_OUT = 'name fewer --tasks, or take a smaller WIDTH or fewer EPOCHS in tasks.py'


def make_plan(folder: pathlib.Path, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Times steps where that is not done yet; writes ``plan.json`` and ``plan.md``."""
    ledger = Ledger(folder / 'speeds.jsonl')
    with progress.bar(len(tasks), 'speeds') as bar:
        for name, task in tasks.items():
            bar.note(name)
            settings = hashlib.sha256(plan.settings_of(task).encode()).hexdigest()[:8]
            if name not in ledger or ledger[name]['settings'] != settings:
                config = task.config()
                dataset = sources.load(config.data)
                speeds = speed.measure(
                    plan.timed(task), dataset, plan.ROUNDS, plan.CHUNK
                )
                ledger.add(
                    name,
                    {
                        'settings': settings,
                        'steps_per_epoch': dataset.train.size // config.batch_size,
                        'methods': speeds,
                    },
                )
            bar.advance()
    made = plan.make(ledger, tasks)
    plan.write(made, folder)
    return made


def run(
    folder: pathlib.Path,
    workdir: pathlib.Path,
    tasks: Mapping[str, Task],
    entries: Sequence[str],
    shard: Shard,
    over: bool = False,
) -> None:
    """Makes the runs of a plan that are not made yet.

    Args:
        folder: where plan and results are.
        workdir: where runs are made; their files stay there.
        tasks: the tasks; those of the plan.
        entries: names of what is compared.
        shard: which runs, so that processes take about as long.
        over: whether more than :data:`plan.LIMIT_HOURS` are allowed.

    Raises:
        ConfigError: without a plan of these tasks and entries, or if it is too long.
    """
    known = plans.read(folder)
    planned = plan.units(known, tasks, entries)
    # Entries of the same method share the runs that settings are chosen with.
    of_work = lambda unit: f'{unit.name}/{unit.method}'
    seconds: dict[str, float] = {}
    for unit in planned:
        row = known['tasks'][unit.name]['entries'][unit.entry]
        seconds[of_work(unit)] = seconds.get(of_work(unit), 0.0) + row['seconds']
    plans.check_length(known, sum(seconds.values()) / 3600, WAY_OUT, over)
    share = plans.share_out(seconds, seconds.__getitem__, shard.count)[shard.index]
    own = [unit for unit in planned if of_work(unit) in share]
    ledger = Ledger(folder / 'runs.jsonl')

    def jobs() -> list[Job]:
        # Task by task, method by method: each has programs of its own.
        for _, group in itertools.groupby(sorted(own, key=of_work), of_work):
            found = [job for unit in group for job in protocol.jobs(ledger, unit)]
            if any(job.key not in ledger for job in found):
                return found
        return [job for unit in own for job in protocol.jobs(ledger, unit)]

    maker = Maker(ledger, workdir, train, keep=True, more=measures.of_run)
    maker.work(jobs, total=sum(seconds[name] for name in share), title='proof')


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the arguments say."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--plan', action='store_true', help='how long it all takes')
    parser.add_argument('--report', action='store_true', help='the table')
    parser.add_argument('--tasks', type=names.of(TASKS), default=list(CHOSEN))
    parser.add_argument('--entries', default='', help='those of the tasks if empty')
    parser.add_argument('--shard', default='', help='index/count: a share of the runs')
    parser.add_argument('--over', action='store_true', help='allow a longer plan')
    parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
    parser.add_argument('--workdir', type=pathlib.Path, default='runs/proof')
    options = parser.parse_args(arguments)
    tasks = {name: TASKS[name] for name in options.tasks}
    there = dict.fromkeys(entry for task in tasks.values() for entry in task.entries)
    try:
        entries = names.of(there)(options.entries) if options.entries else list(there)
        shard = shards.parse(options.shard)
        if options.plan:
            made = make_plan(options.results, tasks)
            tables.show('plan', *plan.rows_of(made))
            plans.check_length(made, made['core_hours'], WAY_OUT, options.over)
        elif options.report:
            print(f'written to {report.write(options.results)}')
        else:
            run(options.results, options.workdir, tasks, entries, shard, options.over)
    except argparse.ArgumentTypeError as error:
        parser.error(f'--entries: {error}')
    except configuration.ConfigError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit('Interrupted. The same command goes on.')


if __name__ == '__main__':
    main()
