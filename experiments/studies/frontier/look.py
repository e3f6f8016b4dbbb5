r"""Looks where SAM gains over SGD with right labels, cheaply.

    python -m experiments.studies.frontier.look \
        --output=experiments/studies/frontier/results/look.jsonl

Each candidate (``tasks.CANDIDATES``): the base optimizer at three learning rates, SAM
at three radii and two rates, one seed; then both at their best with two other seeds.
What is in the output is not made again. A table is written beside it.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from experiments.common import configuration, files, names, quantities
from experiments.common.ledger import Ledger
from experiments.report import provenance, statistics, tables
from experiments.studies.frontier import protocol
from experiments.studies.frontier.protocol import Unit
from experiments.studies.frontier.task import Effort, Task
from experiments.studies.frontier.tasks import CANDIDATES
from experiments.training.loop import train
from experiments.training.many import Maker

_EFFORT_SEEDS = ((500,), (510, 511))
METHODS = ('sgd', 'sam')


@dataclasses.dataclass(frozen=True)
class Look(Task):
    """A candidate with fewer settings, seeds and, if asked for, epochs.

    Attributes:
        tuning: seeds that settings are chosen with.
        seeds: seeds that are reported.
    """

    tuning: tuple[int, ...] = _EFFORT_SEEDS[0]
    seeds: tuple[int, ...] = _EFFORT_SEEDS[1]

    @property
    def work(self) -> Effort:
        """How much is run."""
        return Effort(self.tuning, self.seeds, False)


def look_of(task: Task, epochs: float = 1.0, seeds: int = 2) -> Look:
    """A candidate as it is looked at.

    Args:
        task: the candidate.
        epochs: the share of its epochs that is run.
        seeds: how many seeds are reported.
    """
    fields = {
        field.name: getattr(task, field.name) for field in dataclasses.fields(task)
    }
    changes = fields.pop('changes')
    if epochs != 1:
        number = max(round(epochs * task.config().epochs), 1)
        changes = (
            *((key, value) for key, value in changes if key != 'epochs'),
            ('epochs', number),
            ('log_every', number),
            ('eval_every', number),
        )
    first = _EFFORT_SEEDS[1][0]
    fields |= {
        'radii': task.radii[1:4],
        'rates': task.rates[:2],
        'sgd_rates': task.sgd_rates[1:4],
        'changes': changes,
    }
    return Look(**fields, seeds=tuple(range(first, first + seeds)))


def rows_of(
    ledger: Ledger, looks: dict[str, Look]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a candidate per row."""
    header = ['Task', 'Steps', 'Parameters', 'SGD, %', 'SAM, %', 'SAM − SGD']
    header += ['Training, SGD, %', 'Bits, SAM − SGD', 'ρ', 'Seconds, SGD', 'SAM']
    rows = []
    for name, task in looks.items():
        found = [protocol.reported(ledger, Unit(name, task, m)) for m in METHODS]
        if None in found:
            continue
        sgd, sam = (lines or [] for lines in found)
        of = lambda lines, what: [line['test'][what] for line in lines]
        bits = '–'
        if task.judge == 'loss':
            bits = tables.bits(statistics.paired(of(sam, 'loss'), of(sgd, 'loss')))
        rows.append(
            [
                task.title,
                f'{sgd[0]["steps"]:,}',
                f'{sgd[0]["parameters"]:,}',
                tables.percent(statistics.summary(of(sgd, 'accuracy'))),
                tables.percent(statistics.summary(of(sam, 'accuracy'))),
                tables.points(
                    statistics.paired(of(sam, 'accuracy'), of(sgd, 'accuracy'))
                ),
                f'{100 * sgd[0]["training"]["accuracy"]:.0f}',
                bits,
                f'{sam[0]["rho"]:g}',
                *(f'{lines[0]["seconds"]:.0f}' for lines in (sgd, sam)),
            ]
        )
    return header, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the arguments say."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--output', type=pathlib.Path, required=True)
    parser.add_argument('--tasks', type=names.of(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument(
        '--epochs',
        type=quantities.positive,
        default=1.0,
        help='the share of the epochs that is run',
    )
    parser.add_argument(
        '--seeds', type=quantities.count, default=2, help='how many are reported'
    )
    parser.add_argument('--workdir', type=pathlib.Path, default='runs/frontier_look')
    options = parser.parse_args(arguments)
    looks = {
        name: look_of(CANDIDATES[name], options.epochs, options.seeds)
        for name in options.tasks
    }
    ledger = Ledger(options.output)
    runs = sum(sum(protocol.count(t, m)[1:]) for t in looks.values() for m in METHODS)
    runs -= sum(line['task'] in looks for line in ledger)
    try:
        Maker(ledger, options.workdir, train).work(
            lambda: protocol.jobs(ledger, looks, METHODS), total=runs, title='look'
        )
    except configuration.ConfigError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit('Interrupted. The same command goes on; the last run is made again.')
    header, rows = rows_of(ledger, looks)
    text = (
        f'{tables.markdown(header, rows)}\nAccuracy on test examples after the last'
        ' step, of the settings that are best on validation examples with another seed;'
        ' difference with its 95 % interval (t). Bits: test loss per byte. Seconds of'
        f' a run. Command: `{provenance.command()}`.\n'
    )
    with files.replacing(options.output.with_suffix('.md')) as file:
        file.write(text.encode())
    tables.show('SAM − SGD', header, rows)


if __name__ == '__main__':
    main()
