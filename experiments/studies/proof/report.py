"""The table of the proof, from the lines of its runs alone."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.common import files
from experiments.common.ledger import Ledger
from experiments.methods.compared import METHODS
from experiments.report import provenance, statistics, tables
from experiments.studies.proof import plan, protocol
from experiments.studies.proof.protocol import Unit
from experiments.studies.proof.rounding import BITS
from experiments.studies.proof.task import TUNING_SEED
from experiments.studies.proof.tasks import TASKS
from experiments.training import plans

# Who fits less of the labels that it was trained on underfits.
FITTED = 0.9
TABLE = 'table.md'
_HEADER = ['', 'Seeds', 'Epochs', 'Time × SGD', 'ρ', 'Rate']


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes ``table.md``.

    Args:
        folder: where ``plan.json`` and ``runs.jsonl`` are.

    Returns:
        The file.

    Raises:
        ConfigError: without a plan.
    """
    known = plans.read(folder)
    ledger = Ledger(folder / 'runs.jsonl')
    parts, missing = [], []
    for name, planned in known['tasks'].items():
        task = TASKS[name]
        rows = {
            unit.entry: (unit, protocol.lines(ledger, unit))
            for unit in plan.units(known, {name: task}, task.entries)
        }
        if not any(lines for _, lines in rows.values()):
            missing.append(task.title)
            continue
        missing += [
            f'{_title(unit)} ({task.title})'
            for unit, lines in rows.values()
            if not lines
        ]
        table = of_text if task.judge == 'loss' else of_images
        parts.append(
            f'### {task.title}\n\n{planned["parameters"]:,} parameters.\n\n'
            f'{tables.markdown(*table(rows, planned["step_seconds"]))}\n'
            f'{provenance.made_on(x for _, lines in rows.values() for x in lines)}\n'
        )
    if missing:
        parts.append(f'Planned, but not run: {"; ".join(missing)}.\n')
    parts.append(
        'Mean ± sd over seeds. In brackets: difference from SAM on the same seeds, with'
        ' its 95 % interval (t). Best: the epoch that is best on the examples held back'
        ' from training. NLL and ECE (expected calibration error, 15 bins): of the test'
        ' examples. Fitted: accuracy on the training images as they are, with the'
        f' labels that were trained on; † below {100 * FITTED:.0f} %: it underfits.'
        f' ρ and learning rate (Rate) were chosen with seed {TUNING_SEED} in shorter'
        ' runs, * at an end of those tried. Time: from the steps that'
        ' the plan timed in turns, on a CPU core. An entry at equal time'
        ' has as many epochs as fit in SAM’s.'
        f' Command: `{provenance.command()}`.\n'
    )
    path = folder / TABLE
    with files.replacing(path) as file:
        file.write('\n'.join(parts).encode())
    return path


# By the name of an entry.
Rows = Mapping[str, tuple[Unit, list[dict[str, Any]]]]
# Of a step of a method, as the plan has them.
Seconds = Mapping[str, float]


def of_images(rows: Rows, seconds: Seconds) -> tuple[list[str], list[list[str]]]:
    """Header and rows where accuracy is what counts."""
    header = [*_HEADER, 'Test, %', '− SAM', 'Best, %', 'Best epoch', 'Fitted, %']
    header += ['NLL, last', 'NLL, best', 'ECE, %, last', 'ECE, %, best']
    header += [f'Test, %, {bits} bits' for bits in BITS]
    made = []
    for unit, lines, first in _made(rows, seconds):
        accuracy = [line['last']['test']['accuracy'] for line in lines]
        fitted = protocol.mean(lines, 'fitted', 'accuracy') or 0.0
        made.append(
            [
                *first,
                tables.percent(statistics.summary(accuracy)),
                _minus_sam(rows, unit, 'accuracy', 100, 1),
                protocol.percent(lines, 'best', 'test', 'accuracy'),
                f'{protocol.mean(lines, "best", "epoch"):.0f}',
                f'{100 * fitted:.1f}{"" if fitted >= FITTED else "†"}',
                *(
                    text(lines, when, 'test', quantity)
                    for text, quantity in (
                        (protocol.number, 'loss'),
                        (protocol.percent, 'calibration_error'),
                    )
                    for when in ('last', 'best')
                ),
                *(
                    protocol.percent(lines, 'rounded', str(b), 'test', 'accuracy')
                    for b in BITS
                ),
            ]
        )
    return header, made


def of_text(rows: Rows, seconds: Seconds) -> tuple[list[str], list[list[str]]]:
    """Header and rows where the loss counts, in bits per byte."""
    header = [*_HEADER, 'Validation', 'Test', '− SAM', 'Best epoch', 'Test, best']
    header += ['Fitted', 'ECE, %']
    header += [f'{split}, {b} bits' for b in BITS for split in ('Validation', 'Test')]
    made = []
    for unit, lines, first in _made(rows, seconds):
        made.append(
            [
                *first,
                _bits(lines, 'last', 'validation', 'loss'),
                _bits(lines, 'last', 'test', 'loss'),
                _minus_sam(rows, unit, 'loss', 1 / math.log(2), 3),
                f'{protocol.mean(lines, "best", "epoch"):.0f}',
                _bits(lines, 'best', 'test', 'loss'),
                _bits(lines, 'fitted', 'loss'),
                protocol.percent(lines, 'last', 'test', 'calibration_error'),
                *(
                    _bits(lines, 'rounded', str(b), split, 'loss')
                    for b in BITS
                    for split in ('validation', 'test')
                ),
            ]
        )
    return header, made


def _made(
    rows: Rows, seconds: Seconds
) -> list[tuple[Unit, list[dict[str, Any]], list[str]]]:
    """Those that are there, with the columns that all tables begin with."""
    base = seconds['sgd'] * rows['sgd'][0].epochs
    found = []
    for unit, lines in rows.values():
        if not lines:
            continue
        # Runs are made side by side, perhaps on several devices: their own times say
        # less than steps that were timed in turns.
        times = seconds[unit.method] * unit.epochs / base
        planned = len(unit.row.seeds)
        seeds = f'{len(lines)}{f" of {planned}" if len(lines) < planned else ""}'
        first = [_title(unit), seeds, str(unit.epochs), f'{times:.2f}']
        found.append((unit, lines, [*first, *_settings(unit, lines[0])]))
    return found


def _title(unit: Unit) -> str:
    equal = ', equal time' if unit.row.equal_time else ''
    return f'{METHODS[unit.method].title}{equal}'


def _settings(unit: Unit, line: Mapping[str, Any]) -> list[str]:
    """ρ and learning rate, a star where they are at an end of those tried."""
    cells = []
    for place, name in enumerate(('rho', 'rate')):
        tried = {pair[place] for pair in unit.pairs()}
        end = len(tried) > 1 and line[name] in (min(tried), max(tried))
        cells.append(f'{line[name]:g}{"*" if end else ""}' if line[name] else '–')
    return cells


def _minus_sam(
    rows: Rows, unit: Unit, quantity: str, factor: float, digits: int
) -> str:
    """The difference from SAM on the seeds that both have."""
    sam = rows['sam'][1]
    if unit.entry == 'sam' or not sam:
        return '–'
    values = {
        key: {line['seed']: line['last']['test'][quantity] for line in lines}
        for key, lines in (('own', rows[unit.entry][1]), ('sam', sam))
    }
    both = [seed for seed in values['own'] if seed in values['sam']]
    pairs = [(values['own'][seed], values['sam'][seed]) for seed in both]
    if not pairs or any(None in pair for pair in pairs):
        return '–'
    own, others = zip(*pairs, strict=True)
    found = statistics.paired([factor * x for x in own], [factor * x for x in others])
    text = f'{found["mean"]:+.{digits}f}'
    if found.get('low') is not None:
        text += f' [{found["low"]:+.{digits}f}, {found["high"]:+.{digits}f}]'
    return text.replace('-', '−')


def _bits(lines: list[dict[str, Any]], *path: str) -> str:
    value = protocol.mean(lines, *path)
    return '–' if value is None else f'{value / math.log(2):.3f}'
