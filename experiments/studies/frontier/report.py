"""The table and the figure, from the result files, and what the rule decides."""

import json
import math
import pathlib
import statistics as means
from collections.abc import Mapping
from typing import Any

import matplotlib

from experiments.common import files
from experiments.common.ledger import Ledger
from experiments.methods.compared import METHODS
from experiments.report import plots, provenance, statistics, tables
from experiments.studies.frontier import decision, protocol
from experiments.studies.frontier.protocol import Unit
from experiments.studies.frontier.tasks import TASKS
from experiments.training import plans

COSTS = 'cost.json'
FILES = ('table.md', 'decision.json', 'frontier.png', 'gains.md')
# What SGD and SAM are: they are compared with, not decided about.
REFERENCE = 'reference'
_LN2 = math.log(2)


def write(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the table, the decision and the figure.

    Args:
        folder: where ``plan.json``, ``runs.jsonl`` and ``cost.json`` are; without the
            last one nothing is decided.

    Returns:
        The files.

    Raises:
        ConfigError: if there is no plan.
    """
    known = plans.read(folder)['tasks']
    ledger = Ledger(folder / 'runs.jsonl')
    accuracies = {
        name: {
            method: protocol.accuracies(ledger, Unit(name, TASKS[name], method))
            for method in task['methods']
        }
        for name, task in known.items()
    }
    path = folder / COSTS
    measured = json.loads(path.read_text()) if path.exists() else {}
    costs = measured.get('networks', {})
    times = relative(costs, 'times_sgd')
    found = decision.decide(accuracies, times)
    found['references'] = {
        name: {**decision.judge(accuracies, name), 'cost': times.get(name)}
        | {'status': REFERENCE, 'reasons': []}
        for name in ('sgd', 'sam')
    }
    memory = relative(costs, 'memory_times_sgd')
    # Their best learning rate is close to what does not train: single runs fail.
    without_vits = {
        name: row
        for name, row in accuracies.items()
        if TASKS[name].config().model != 'vit'
    }
    for name, row in by_cost(found).items():
        row['memory'] = memory.get(name)
        row['without_vits'] = decision.judge(without_vits, name).get('minus_sam')
    paths = [folder / name for name in FILES]
    content = {**found, **provenance.environment(), 'command': provenance.command()}
    files.write_json(paths[1], content)
    with files.replacing(paths[0]) as file:
        file.write(_text(found, accuracies, costs, ledger).encode())
    draw(found, paths[2])
    with files.replacing(paths[3]) as file:
        file.write(_gains(found, measured).encode())
    return paths


def relative(costs: Mapping[str, Any], what: str) -> dict[str, float]:
    """By method the geometric mean over networks of a multiple of SGD's.

    Args:
        costs: the networks of ``cost.json``.
        what: ``'times_sgd'`` or ``'memory_times_sgd'``.

    Returns:
        The methods that were measured on all networks.
    """
    rows = [network['methods'] for network in costs.values()]
    names = set.intersection(*map(set, rows)) if rows else set()
    return {
        name: means.geometric_mean(row[name][what] for row in rows)
        for name in METHODS
        if name in names
    }


def rows_of(
    found: Mapping[str, Any], costs: Mapping[str, Any]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what is decided: a method per row, the cheapest first."""
    header = ['Method', 'Time × SGD', 'Memory × SGD', '− SAM', 'Without ViTs']
    header += ['Of SAM’s gain, %', 'Worst task', 'Tasks', 'Decision']
    rows = []
    for name, row in by_cost(found).items():
        times = [n['methods'][name]['times_sgd'] for n in costs.values() if row['cost']]
        worst = row.get('worst')
        # Conditions by their numbers: the rule stands at the end of the page.
        why = row['broken'] if row['status'] == decision.FAILS else row['reasons']
        reasons = f': {", ".join(map(str, why))}' if why else ''
        rows.append(
            [
                METHODS[name].title,
                f'{row["cost"]:.2f} ({min(times):.2f}–{max(times):.2f})'
                if row['cost']
                else '–',
                _ratio(row['memory']),
                tables.points(row.get('minus_sam')),
                tables.points(row.get('without_vits')),
                f'{100 * row["kept"]:.0f}' if row.get('kept') is not None else '–',
                f'{TASKS[worst["task"]].title}: {tables.points(worst)}'
                if worst
                else '–',
                _tasks(row),
                f'{row["status"]}{reasons}',
            ]
        )
    return header, rows


def _gains(found: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """The table in the few columns and rows that a newcomer needs."""
    header = ['Method', 'Time × SGD', 'Memory × SGD', '− SAM, points']
    header += ['Of SAM’s gain, %', 'Tasks']
    rows = [
        [
            METHODS[name].title,
            _ratio(row['cost']),
            _ratio(row['memory']),
            '–' if name == 'sam' else tables.points(row['minus_sam']),
            '–' if row['kept'] is None else f'{100 * row["kept"]:.0f}',
            _tasks(row),
        ]
        for name, row in by_cost(found).items()
        # Others miss so much of what SAM gains that they are no alternative.
        if 'minus_sam' in row
        and (name == 'sgd' or row['kept'] is None or row['kept'] >= decision.KEPT)
    ]
    where = f' Time and memory on {provenance.on(measured)}.' if measured else ''
    return (
        f'{tables.markdown(header, rows)}\nMeans over tasks, with 95 % intervals.'
        f' Methods that keep less than {100 * decision.KEPT:.0f} % of what SAM gains'
        f' are left out.{where}\n'
    )


def by_cost(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a decision says of SGD, SAM and the methods, the cheapest first."""
    rows = {**found['references'], **found['methods']}
    order = sorted(rows, key=lambda name: rows[name]['cost'] or math.inf)
    return {name: rows[name] for name in order}


def _ratio(value: float | None) -> str:
    return '–' if value is None else f'{value:.2f}'


def _tasks(row: Mapping[str, Any]) -> str:
    lacking = row['tasks'] < row['planned']
    return f'{row["tasks"]} of {row["planned"]}' if lacking else str(row['tasks'])


def rows_of_tasks(
    accuracies: decision.Accuracies, ledger: Ledger
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of all tasks: a method per row, a task per column."""
    rows = []
    for name, method in METHODS.items():
        cells = []
        for task, row in accuracies.items():
            values, sam = row.get(name), row['sam']
            if values is None:
                cells.append('')
            elif name == 'sam' or sam is None:
                cells.append(tables.percent(statistics.summary(values)))
            else:
                cells.append(tables.points(statistics.paired(values, sam)))
            if values is not None:
                cells[-1] += _chosen(ledger, Unit(task, TASKS[task], name))
        rows.append([method.title, *cells])
    header = ['', *(TASKS[name].title for name in accuracies)]
    return header, rows


def rows_of_gains(
    accuracies: decision.Accuracies, ledger: Ledger
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what SAM gains over SGD: a task per row."""
    header = ['Task', 'Wrong labels, %', 'SGD', 'SAM', 'SAM − SGD', 'In bits']
    rows = []
    for name, row in accuracies.items():
        task = TASKS[name]
        sgd, sam = row['sgd'], row['sam']
        if sgd is None or sam is None:
            continue
        of_sam, of_sgd = (_losses(ledger, Unit(name, task, m)) for m in ('sam', 'sgd'))
        bits = statistics.paired(of_sam, of_sgd) if of_sam and of_sgd else None
        rows.append(
            [
                task.title,
                f'{100 * task.config().label_noise:.0f}',
                tables.percent(statistics.summary(sgd)),
                tables.percent(statistics.summary(sam)),
                tables.points(statistics.paired(sam, sgd)),
                tables.bits(bits),
            ]
        )
    return header, rows


def _chosen(ledger: Ledger, unit: Unit) -> str:
    """ρ and learning rate, a star where they are at an end of those tried."""
    sam = protocol.sam_pair(ledger, unit.name, unit.task)
    pair = protocol.chosen(ledger, unit, sam)
    if pair is None:
        return ''
    texts = []
    for symbol, place in (('ρ', 0), ('rate', 1)):
        tried = {other[place] for other in unit.pairs(sam)}
        end = len(tried) > 1 and pair[place] in (min(tried), max(tried))
        # Others than SGD and SAM have SAM's rate, and SGD has no ρ.
        if len(tried) > 1 or unit.method == 'sam':
            texts.append(f'{symbol} {pair[place]:g}{"*" if end else ""}')
    text = f' ({", ".join(texts)})'
    losses = _losses(ledger, unit)
    if losses is not None:
        text += f', {means.fmean(losses) / _LN2:.3f} bits'
    return text


def _losses(ledger: Ledger, unit: Unit) -> list[float] | None:
    """Test losses of the reported runs on text; None if one is not there or finite."""
    lines = protocol.reported(ledger, unit) or []
    losses = [line['test']['loss'] for line in lines if unit.task.judge == 'loss']
    return losses if losses and None not in losses else None


def _text(
    found: Mapping[str, Any],
    accuracies: decision.Accuracies,
    costs: Mapping[str, Any],
    ledger: Ledger,
) -> str:
    best = found['recommended']
    said = found['verdict'] + (f': {METHODS[best].title}' if best else '')
    if found['open']:
        said += f', because of {", ".join(METHODS[n].title for n in found["open"])}'
    return (
        f'{tables.markdown(*rows_of(found, costs))}\n**Decision: {said}.**\n\n'
        'Time: of whole runs, as a multiple of SGD’s, geometric mean (range) over'
        f' {len(costs)} networks. Memory: the peak of the largest program. − SAM:'
        ' points of test accuracy, mean over tasks with its 95 % interval by a'
        ' hierarchical bootstrap. Decision: with the numbers of the conditions of the'
        ' rule at the end that a method does not meet.\n\n'
        f'{tables.markdown(*rows_of_gains(accuracies, ledger))}\n'
        'What SAM gains over SGD (AdamW on ViTs and text), in points of test accuracy'
        ' and on text in bits per byte as well, where less is better; both with their'
        ' own best settings.\n\n'
        f'{tables.markdown(*rows_of_tasks(accuracies, ledger))}\n'
        'SAM: accuracy on test examples after the last step, mean ± sd over seeds. The'
        ' others: difference from SAM on the same seeds, in points, with 95 % intervals'
        ' (t). In parentheses ρ and the learning rate, chosen on validation examples'
        ' with other seeds; * at an end of those tried. The others have SAM’s learning'
        ' rate. Of text: the accuracy of the next byte, and the test loss in bits per'
        f' byte, by which its settings are chosen.{_devices(ledger)}\n\n{decision.TEXT}'
    )


def _devices(ledger: Ledger) -> str:
    """What the runs were made on, by task where they say it."""
    found = ''
    for name, task in TASKS.items():
        lines = [line for line in ledger if line['task'] == name]
        if any('on' in line for line in lines):
            found += f' Runs of {task.title}: {provenance.made_on(lines)}'
    return f'{found} Older lines do not say what they were made on: CPUs.'


def draw(found: Mapping[str, Any], path: pathlib.Path) -> None:
    """Accuracy − SAM against time × SGD: a point per method, with its interval."""
    with matplotlib.rc_context(plots.SETTINGS):
        figure, axes = plots.new_figure(7.6, 4.6)
        labels = []
        # Not where it fails, or was not run on all tasks.
        filled = (decision.PASSES, REFERENCE)
        shown = {
            name: row
            for name, row in by_cost(found).items()
            if row['cost'] and 'minus_sam' in row
        }
        for number, (name, row) in enumerate(shown.items(), 1):
            direction = METHODS[name].direction
            color, marker = plots.STYLES.get(direction, plots.OTHER)
            mean, low, high = (
                100 * row['minus_sam'][k] for k in ('mean', 'low', 'high')
            )
            axes.errorbar(
                row['cost'],
                mean,
                yerr=[[mean - low], [high - mean]],
                color=color,
                marker=marker,
                markersize=7,
                markerfacecolor=color if row['status'] in filled else 'white',
                linewidth=1.2,
            )
            labels.append((f'{number}', (row['cost'], mean), color))
            # Below SAM's point, where nothing is as dear and as bad.
            axes.text(
                0.6,
                0.66 - 0.046 * number,
                f'{number}  {METHODS[name].title}',
                transform=axes.transAxes,
                color=color,
                fontsize=8.5,
            )
        axes.axhline(0, color=plots.INK, linewidth=0.8)
        axes.axhline(
            100 * decision.LOWEST, color=plots.INK, linewidth=0.8, linestyle=':'
        )
        axes.set_xlabel('time × SGD')
        axes.set_ylabel('points of accuracy − SAM')
        plots.label_beside(figure, axes, labels, fontsize=9)
        plots.save(figure, path)
