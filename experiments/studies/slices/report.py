"""The result file, the table that is made from it, and the check with the trainer."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.common import files
from experiments.report import tables
from experiments.report.statistics import paired, summary
from experiments.studies.slices import methods, tasks

TRAINER = pathlib.Path(__file__).parents[1] / 'controllers' / 'results'


def read(path: pathlib.Path) -> dict[str, Any]:
    """The content of the result file; units of none if there is none."""
    if not path.exists():
        return {'units': {}}
    return json.loads(path.read_text())


def write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes the result file, a line for each unit, and ``table.md`` beside it."""
    content = {**content, 'units': _with_statistics(content['units'])}
    lines = []
    for key, value in content.items():
        if key in ('units', 'check'):
            rows = [f'  {json.dumps(k)}: {json.dumps(v)}' for k, v in value.items()]
            text = '{\n' + ',\n'.join(rows) + '\n }'
        else:
            text = json.dumps(value)
        lines.append(f' {json.dumps(key)}: {text}')
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in (
        (path, '{\n' + ',\n'.join(lines) + '\n}\n'),
        (path.with_name('table.md'), table(content)),
    ):
        with files.replacing(target) as file:
            file.write(text.encode())


def _with_statistics(units: Mapping[str, Any]) -> dict[str, Any]:
    """The units, and what follows from their accuracies."""
    found = {}
    for key, unit in units.items():
        task, name = key.split('/')
        sam, sgd = (units.get(f'{task}/{other}') for other in ('sam', 'sgd'))
        statistics = {}
        for place in ('own', 'sam_pair', 'scaled_pair'):
            if place not in unit:
                continue
            row = summary(unit[place])
            row.pop('values')
            for other, theirs in (('sam', sam), ('sgd', sgd)):
                if theirs is not None and other != name:
                    row[f'minus_{other}'] = paired(unit[place], theirs['own'])
            statistics[place] = _rounded(row)
        edges = methods.at_edge(tasks.TASKS[task], name, unit['chosen'])
        unit = {k: v for k, v in unit.items() if k != 'radius_at_edge'}
        found[key] = {**unit, 'at_edge': list(edges), 'statistics': statistics}
    return found


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    return round(x, 5) if isinstance(x, float) else x


def table(content: Mapping[str, Any]) -> str:
    """The table of a result file, as Markdown."""
    units, parts = content['units'], []
    for task_name, task in tasks.TASKS.items():
        rows = [
            _row(methods.METHODS[name], units[key], units.get(f'{task_name}/sam'))
            for name in methods.METHODS
            if (key := f'{task_name}/{name}') in units
        ]
        if not rows:
            continue
        header = [
            'Method',
            'Examples',
            'ρ',
            'ρ / SAM’s',
            'Rate',
            'Accuracy, %',
            '− SAM',
            '− SGD',
            'At SAM’s pair, − SAM',
            'At SAM’s ρ / √p, − SAM',
        ]
        parts.append(f'### {task.title}\n\n{tables.markdown(header, rows)}')
    seeds = content.get('seeds', {})
    numbers = '; '.join(f'{task}: {len(found)}' for task, found in seeds.items())
    note = (
        'Mean ± sd of accuracy on test examples after the last step. Differences are'
        ' those of runs of the same seed, in points, with 95 % intervals (t). Examples:'
        ' how many gradients are taken of in a step, a mini-batch being 1; – where runs'
        ' differ. ρ and the learning rate (Rate) are the pair with the best mean'
        ' accuracy on validation examples, with other seeds; * at an end of those'
        ' tried. ρ / √p: the PSF of 1/p of the examples, at SAM’s learning rate.'
        f' Seeds that are reported: {numbers}.'
    )
    parts.append(note + '\n')
    if 'check' in content:
        rows = [
            [
                name,
                tables.percent(check['here']),
                tables.percent(check['trainer']),
                tables.points(check['difference']),
            ]
            for name, check in content['check'].items()
        ]
        header = ['Check', 'Here, %', 'Trainer, %', 'Difference']
        parts.append(tables.markdown(header, rows))
    return '\n'.join(parts)


def _row(
    method: methods.Method, unit: Mapping[str, Any], sam: Mapping[str, Any] | None
) -> list[str]:
    rho, rate = unit['chosen']
    statistics = unit['statistics']
    own, at_sam = statistics['own'], statistics.get('sam_pair', {})
    has_radius = bool(rho)
    radius_end, rate_end = ('*' if x else '' for x in unit['at_edge'])
    ratio = f'{rho / sam["chosen"][0]:.2f}' if has_radius and sam else '–'
    examples = method.gradients
    return [
        method.title,
        '–' if examples is None else f'{examples:.2f}',
        f'{rho:g}{radius_end}' if has_radius else '–',
        ratio,
        f'{rate:g}{rate_end}',
        tables.percent(own),
        tables.points(own.get('minus_sam')),
        tables.points(own.get('minus_sgd')),
        tables.points(at_sam.get('minus_sam')),
        tables.points(statistics.get('scaled_pair', {}).get('minus_sam')),
    ]


def trainer_results(name: str, task: str = 'mlp_600') -> dict[str, Any]:
    """What the trainer gave: seeds, the chosen pair and accuracies on test examples.

    Args:
        name: ``'sgd'`` or ``'sam'``.
        task: a task of the controllers study.

    Returns:
        ``seeds``, ``pair`` and ``values``.
    """
    content = json.loads((TRAINER / f'{task}.json').read_text())
    found = content['methods'][name]['own']
    ((field, value),) = found['chosen'].items()
    rate = content['config']['optimizer']['learning_rate']
    pair = (0.0, value) if field.endswith('learning_rate') else (value, rate)
    values = found['test_accuracy']['values']
    return {'seeds': content['seeds'], 'pair': pair, 'values': values}
