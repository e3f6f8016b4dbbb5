"""Tables and the figure of a benchmark, made from its JSON alone.

    python -m experiments.benchmark.report experiments/results/benchmark/cpu.json

writes ``cpu.md`` and ``cpu.png`` beside it.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib import ticker

from experiments.benchmark import variants
from experiments.report import plots, tables

Content = Mapping[str, Any]

# Colours and markers of the curves.
_STYLES = {
    variants.OPTAX_SAM: plots.STYLES['sam'],
    variants.SAMPLED: plots.STYLES['vsam'],
    variants.REUSE: plots.STYLES['asam'],
    variants.TRACED_SAMPLED: plots.STYLES['looksam'],
    variants.TRACED_REUSE: plots.STYLES['esam'],
}
_AXES = {
    'parameters': 'Parameters',
    'batch_size': 'Batch size',
    'window': 'Window K',
}
# What a panel says of those that it holds fixed.
_HELD = {
    'parameters': '{:,} parameters',
    'batch_size': 'batch {}',
    'window': 'K = {}',
}


def _number(value: float | None, form: str) -> str:
    return '–' if value is None else format(value, form)


def of_problem(problem: Content) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of one problem.

    A column stands in it if something of it was measured.
    """
    columns: dict[str, Callable[[Content], str]] = {
        'times_base': lambda row: tables.quartiles(row['times_base']),
        'times_optax_sam': lambda row: tables.quartiles(row.get('times_optax_sam')),
        'examples_per_second': lambda row: _number(
            row.get('examples_per_second'), ',.0f'
        ),
        'share_of_peak': lambda row: _number(row.get('share_of_peak'), '.0%'),
        'compile_seconds': lambda row: _number(row['compile_seconds'], '.1f'),
        'rounds': lambda row: str(row['rounds']),
    }
    titles = {
        'times_base': f'× {problem["base"]}',
        'times_optax_sam': '× optax.contrib.sam',
        'examples_per_second': 'Examples/s',
        'share_of_peak': 'Of the peak',
        'compile_seconds': 'Compilation, s',
        'rounds': 'Rounds',
    }
    steps = problem['steps']
    shown = [
        name
        for name in columns
        if any(row.get(name) is not None for row in steps.values())
    ]
    header = ['Step', *(titles[name] for name in shown)]
    rows = [
        [title, *(columns[name](row) for name in shown)] for title, row in steps.items()
    ]
    return header, rows


def on_screen(problem: Content) -> tuple[list[str], list[list[str]]]:
    """Like :func:`of_problem`, for 80 columns."""
    header = ['Step', f'× {problem["base"]}', 'ms', 'Examples/s']
    rows = [
        [
            title,
            f'{row["times_base"]["median"]:.2f}',
            f'{row["step_milliseconds"]:.1f}',
            f'{row["examples_per_second"]:,.0f}',
        ]
        for title, row in problem['steps'].items()
    ]
    return header, rows


def _column(problem: Content) -> str:
    """A short title of a network."""
    return problem['title'].split(',')[0]


def overview(contents: Sequence[Content]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one table of all networks.

    Args:
        contents: benchmarks; of two with the same network the later one counts.

    Returns:
        A column per network: costs as multiples of the base optimizer of the same
        library, then examples per second with the base optimizers.
    """
    columns: dict[str, dict[str, str]] = {}
    rates: dict[str, dict[str, str]] = {}
    for content in contents:
        for problem in content['problems'].values():
            costs = columns.setdefault(_column(problem), {})
            speeds = rates.setdefault(_column(problem), {})
            for title, row in problem['steps'].items():
                library, is_base, _ = title.rpartition(problem['base'])
                name = f'{library}base optimizer' if is_base else title
                costs[name] = tables.quartiles(row['times_base'])
                rate = row.get('examples_per_second')
                if is_base and rate is not None:
                    speeds[f'{name}, examples/s'] = _number(rate, ',.0f')
    rows = []
    for part in (columns, rates):
        names = dict.fromkeys(name for column in part.values() for name in column)
        rows += [[name, *(c.get(name, '–') for c in part.values())] for name in names]
    return ['Step', *columns], rows


def of_pages(small: Content, huge: Content) -> tuple[list[str], list[list[str]]]:
    """Header and rows of two benchmarks side by side.

    Args:
        small: with pages of the usual size.
        huge: with huge pages.

    Returns:
        A row per network: examples per second with the base optimizer, and costs.
    """
    header = [
        'Network',
        'Base optimizer, examples/s',
        'with huge pages',
        'vSAM sampled × optax.contrib.sam',
        'with huge pages',
        'vSAM traced reuse × base optimizer',
        'with huge pages',
    ]
    rows = []
    for name, problem in small['problems'].items():
        pair = (problem, huge['problems'][name])
        rate = [x['steps'][x['base']]['examples_per_second'] for x in pair]
        sampled = [x['steps'][variants.SAMPLED]['times_optax_sam'] for x in pair]
        reuse = [x['steps'][variants.TRACED_REUSE]['times_base'] for x in pair]
        rows.append(
            [
                _column(problem),
                *(_number(x, ',.0f') for x in rate),
                *(tables.quartiles(x) for x in (*sampled, *reuse)),
            ]
        )
    return header, rows


def of_sweep(name: str, points: list[Content]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a sweep: costs as multiples of the base optimizer."""
    titles = list(dict.fromkeys(title for point in points for title in point['steps']))
    # The first one is the base optimizer, with itself as 1.
    base, *others = titles
    header = [_AXES[name], f'{base}, ms', *others]
    rows = [
        [
            f'{point[name]:,}',
            f'{point["steps"][base]["step_milliseconds"]:.2f}',
            *(
                tables.quartiles(point['steps'][title]['times_base'])
                for title in others
            ),
        ]
        for point in points
    ]
    return header, rows


def of_runs(runs: Mapping[str, Content]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the whole runs."""
    header = [
        'Network',
        'Run',
        'Sampled',
        'Windows',
        '× SGD or AdamW',
        '× what the parts cost',
        '× its own steps',
        'Temporaries, MB',
    ]
    rows = [
        [
            problem['title'],
            name,
            f'{run["sampling_rate"]:.2f}',
            str(run['windows']),
            tables.quartiles(run['times_base']),
            tables.quartiles(run['times_expected']),
            tables.quartiles(run['times_steps']),
            _megabytes(run.get('temporaries')),
        ]
        for problem in runs.values()
        for name, run in problem['runs'].items()
    ]
    if all(row[-1] == '–' for row in rows):  # Files from before they were looked at.
        header, rows = header[:-1], [row[:-1] for row in rows]
    return header, rows


def _megabytes(temporaries: Mapping[str, Any] | None) -> str:
    """Of the sampled and of the reuse program; older files do not have them."""
    sizes = (temporaries or {}).values()
    return ' / '.join('–' if x is None else f'{x / 1e6:.0f}' for x in sizes) or '–'


def markdown(content: Content) -> str:
    """All tables of a benchmark."""
    parts = []
    for problem in content.get('problems', {}).values():
        parts.append(f'{problem["title"]}:\n\n{tables.markdown(*of_problem(problem))}')
    for name, points in content.get('sweeps', {}).items():
        swept = _AXES[name][0].lower() + _AXES[name][1:]
        parts.append(
            f'Cost of a step of an MLP, as a multiple of SGD, against {swept}:\n\n'
            f'{tables.markdown(*of_sweep(name, points))}'
        )
    if content.get('whole_runs'):
        parts.append(
            'Whole planned runs; the parts cost (1 + p (T_sampled / T_base − 1)) T_base'
            f' a step:\n\n{tables.markdown(*of_runs(content["whole_runs"]))}'
        )
    return '\n'.join(parts)


def figure(content: Content, path: pathlib.Path) -> None:
    """Cost of a step against what was swept, one panel each.

    Args:
        content: of a benchmark with ``sweeps``.
        path: the PNG to write.
    """
    sweeps = content['sweeps']
    with matplotlib.rc_context(plots.SETTINGS):
        drawn, axes = plots.new_figure(4.4 * len(sweeps), 4.2, columns=len(sweeps))
        panels = axes if len(sweeps) > 1 else [axes]
        for panel, (name, points) in zip(panels, sweeps.items(), strict=True):
            for title, (color, marker) in _STYLES.items():
                there = [point for point in points if title in point['steps']]
                if not there:
                    continue
                x = [point[name] for point in there]
                costs = [point['steps'][title]['times_base'] for point in there]
                panel.plot(
                    x,
                    [cost['median'] for cost in costs],
                    color=color,
                    marker=marker,
                    label=title,
                )
                panel.fill_between(
                    x,
                    [cost['low'] for cost in costs],
                    [cost['high'] for cost in costs],
                    color=color,
                    alpha=0.15,
                    lw=0,
                )
            panel.axhline(1, color='#555555', lw=1)
            panel.set_xscale('log')
            panel.set_xlabel(_AXES[name])
            if name != 'parameters':
                swept = [point[name] for point in points]
                panel.set_xticks(swept, [f'{x:,}' for x in swept])
                panel.set_xticks([], minor=True)
            held = [
                said.format(points[0][other])
                for other, said in _HELD.items()
                if other != name
            ]
            panel.set_title(', '.join(held), loc='left', fontsize=10)
            panel.yaxis.set_major_formatter(ticker.FormatStrFormatter('%.1f×'))
        first = panels[0]
        for panel in panels:
            # One scale, so that they can be compared.
            panel.set_ylim(0, max(each.dataLim.y1 for each in panels) * 1.05)
        first.set_ylabel('time per step, as a multiple of SGD')
        drawn.suptitle('MLP: cost of a step (median, quartiles)', x=0.01, ha='left')
        first.legend(fontsize=8)
        plots.save(drawn, path)


def write(content: Content, path: pathlib.Path) -> list[pathlib.Path]:
    """Writes tables and figure beside the JSON file ``path``; returns their paths."""
    written = [path.with_suffix('.md')]
    written[0].write_text(markdown(content))
    if content.get('sweeps'):
        written.append(path.with_suffix('.png'))
        figure(content, written[-1])
    return written


def main() -> None:
    """Makes the report of a finished benchmark anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('json', type=pathlib.Path, help='what the benchmark wrote')
    path = parser.parse_args().json
    for file in write(json.loads(path.read_text()), path):
        print(f'written to {file}')


if __name__ == '__main__':
    main()
