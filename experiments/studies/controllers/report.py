r"""Tables and figures of all tasks that candidates were compared on.

    python -m experiments.studies.controllers.report \
        --workdir=experiments/studies/controllers/results

reads every JSON file of :mod:`.measure` there, and those of further seeds in ``fresh``.
Written are ``table.md``, ``summary.md`` (for the documents), ``controllers.png``
(differences from SAM) and ``rho.png`` (accuracy against ρ).
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from absl import flags

from experiments.common import configuration, program
from experiments.report import plots, provenance, tables
from experiments.training import run_files

FILES = ('table.md', 'controllers.png', 'rho.png', 'summary.md')
# Further seeds stand here, below the others.
FRESH = 'fresh'
KINDS = {'own': 'own ρ', 'as_sam': "SAM's ρ"}
EXPLANATION = (
    'Others: differences from SAM on the same seeds, in points of test accuracy, with'
    ' 95 % intervals (t). Own ρ: the one that was best on validation examples, chosen'
    " with other seeds; SAM's ρ: all settings are those chosen for SAM."
)
# What the figures show; the table has all.
_SHOWN = ('sgd', 'vsam', 'every_third', 'steady_vsam')
_SHORT = ('sgd', 'vsam', 'steady_vsam')
_DEPTH = 30
_CURVES = ('sam', 'vsam', 'every_third', 'steady_vsam')
_STYLES = {**plots.STYLES, 'every_third': ('#009E73', '^')}


def load(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The reports of all tasks, short runs first.

    Raises:
        ConfigError: if there is none.
    """
    found = [json.loads(file.read_text()) for file in sorted(workdir.glob('*.json'))]
    found = [report for report in found if 'tuning_seeds' in report]
    if not found:
        raise configuration.ConfigError(
            f'workdir must hold files of experiments.studies.controllers.measure,'
            f' {workdir} has none.'
        )
    return sorted(found, key=lambda report: (report['num_steps'], report['name']))


def task(report: Mapping[str, Any]) -> str:
    """What a task is called in tables and figures."""
    settings = report['config']
    noise = f'{100 * settings["label_noise"]:.0f} % wrong'
    noise = noise if settings['label_noise'] else 'right labels'
    name = settings['data']['name'].split('_')[0]
    model = settings['model'].replace('_', ' ')
    return f'{name}, {model}, {report["num_steps"]:,} steps, {noise}'


def names(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """All candidates, SGD and SAM first, in the order of the longest list."""
    longest = sorted(reports, key=lambda report: -len(report['methods']))
    return list(dict.fromkeys(name for report in longest for name in report['methods']))


def rows_of(
    reports: Sequence[Mapping[str, Any]], kind: str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a candidate per row, a task per column.

    Args:
        reports: from :func:`load`.
        kind: one of :data:`KINDS`.

    Returns:
        SAM's row has its accuracy in per cent, the others the difference from it in
        points with its 95 % interval, and the sampling rate.
    """
    rows = []
    for name in names(reports):
        cells, rates, titles = [], [], []
        for report in reports:
            method = report['methods'].get(name, {})
            found = method.get('own' if name == 'sam' else kind)
            if found is None:
                cells.append('')
                continue
            titles.append(method['title'])
            rates.append(found['sampling_rate']['mean'])
            accuracy = tables.percent(found['test_accuracy'])
            cells.append(
                accuracy if name == 'sam' else tables.points(found['minus_sam'])
            )
        if rates:
            ends = dict.fromkeys(f'{end:.2f}' for end in (min(rates), max(rates)))
            rate = '–'.join(ends)
            rows.append([titles[0], rate, *cells])
    return ['', 'Sampled', *map(task, reports)], rows


def short_rows(
    reports: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what matters most: a task per row.

    Args:
        reports: from :func:`load`.

    Returns:
        SAM's accuracy in per cent, and differences from it in points.
    """
    columns = [
        (name, kind)
        for name in _SHORT
        for kind in KINDS
        if any(kind in report['methods'].get(name, {}) for report in reports)
    ]
    titles = {
        name: method['title']
        for report in reports
        for name, method in report['methods'].items()
    }
    header = ['Task', 'Seeds', 'SAM, %']
    header += [
        titles[name] if name == 'sgd' else f'{titles[name]}, {KINDS[kind]}'
        for name, kind in columns
    ]
    rows = []
    for report in reports:
        methods = report['methods']
        accuracy = tables.percent(methods['sam']['own']['test_accuracy'])
        row = [task(report), str(len(report['seeds'])), accuracy]
        for name, kind in columns:
            found = methods.get(name, {}).get(kind)
            row.append(tables.points(found and found['minus_sam']))
        rows.append(row)
    return header, rows


def differences(reports: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Differences from SAM with their intervals, a panel for each kind of ρ."""
    with matplotlib.rc_context(plots.SETTINGS):
        figure, panels = plots.new_figure(9.6, 0.55 * len(reports) + 1.6, columns=2)
        for axes, (kind, said) in zip(panels, KINDS.items(), strict=True):
            shown = [name for name in _SHOWN if kind == 'own' or name != 'sgd']
            for place, name in enumerate(shown):
                color, marker = _STYLES.get(name, plots.OTHER)
                for row, report in enumerate(reports):
                    method = report['methods'].get(name)
                    if method is None or kind not in method:
                        continue
                    difference = method[kind]['minus_sam']
                    mean, low, high = (
                        100 * difference[key] for key in ('mean', 'low', 'high')
                    )
                    axes.errorbar(
                        mean,
                        -row + 0.27 - 0.18 * place,
                        xerr=[[mean - low], [high - mean]],
                        color=color,
                        marker=marker,
                        markersize=5,
                        linewidth=1.2,
                        label=method['title'] if row == 0 else None,
                    )
            axes.axvline(0, color='#333333', linewidth=0.8)
            # SGD may be 30 points below; what matters is close to SAM.
            axes.set_xscale('symlog', linthresh=2, linscale=1)
            ticks = [-20, -5, -2, -1, 0, 1, 2, 5]
            axes.set_xticks(ticks, [f'{tick}'.replace('-', '−') for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.set_yticks(-np.arange(len(reports)))
            axes.grid(axis='y', visible=False)
            axes.set_title(f'at {said}', loc='left')
            axes.set_xlabel('points − SAM (logarithmic beyond ±2)')
        panels[0].set_yticklabels([task(report) for report in reports])
        panels[1].set_yticklabels([])
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=len(labels))
        plots.save(figure, path)


def against_rho(reports: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Validation accuracy over ρ, a panel per task; SGD's best is a line.

    Panels end so many points below the best, where training has failed anyway.
    """
    with matplotlib.rc_context(plots.SETTINGS):
        columns = min(len(reports), 3)
        rows = -(-len(reports) // columns)
        figure, panels = plots.new_figure(
            3.4 * columns, 2.7 * rows + 0.4, rows=rows, columns=columns
        )
        panels = np.atleast_1d(panels).ravel()
        for axes in panels[len(reports) :]:
            axes.remove()
        for axes, report in zip(panels, reports, strict=False):
            radii: set[float] = set()
            for name in _CURVES:
                method = report['methods'].get(name)
                if method is None:
                    continue
                color, marker = _STYLES.get(name, plots.OTHER)
                rhos, means, values = curve(name, method['tried'])
                radii.update(rhos)
                axes.plot(
                    rhos,
                    means,
                    color=color,
                    marker=marker,
                    markersize=5,
                    label=method['title'],
                )
                for rho, seeds in zip(rhos, values, strict=True):
                    axes.plot([rho] * len(seeds), seeds, '.', color=color, alpha=0.35)
            sgd = report['methods'].get('sgd')
            if sgd:
                best = max(
                    trial['validation_accuracy']['mean'] for trial in sgd['tried']
                )
                color, _ = plots.STYLES['sgd']
                axes.axhline(100 * best, color=color, linestyle='--', label='SGD, best')
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, high - _DEPTH), high)
            axes.set_xscale('log')
            ticks = sorted(radii)
            axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.set_title(task(report), loc='left', fontsize=9)
        for axes in panels[max(len(reports) - columns, 0) : len(reports)]:
            axes.set_xlabel('ρ')
        for axes in panels[::columns]:
            if axes.figure is not None:
                axes.set_ylabel('validation, %')
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=len(labels))
        plots.save(figure, path)


def curve(
    name: str, tried: Sequence[Mapping[str, Any]]
) -> tuple[list[float], list[float], list[list[float]]]:
    """ρ, and means and values of the accuracy in per cent, at the best other settings.

    Where a learning rate was tuned too, each ρ has the one that was best for it.
    """
    best: dict[float, list[float]] = {}
    for trial in tried:
        rho = trial['settings'][f'methods.{name}.rho']
        values = [100 * value for value in trial['validation_accuracy']['values']]
        if rho not in best or np.mean(values) > np.mean(best[rho]):
            best[rho] = values
    rhos = sorted(best)
    return (
        rhos,
        [float(np.mean(best[rho])) for rho in rhos],
        [best[rho] for rho in rhos],
    )


def summary(
    reports: Sequence[Mapping[str, Any]], fresh: Sequence[Mapping[str, Any]] = ()
) -> str:
    """What matters most, in Markdown; links are those from the root.

    Args:
        reports: from :func:`load`.
        fresh: the same of further seeds, which nothing was chosen with.
    """
    versions = sorted({report['versions']['jax'] for report in reports})
    text = (
        tables.markdown(*short_rows(reports))
        + f'\n{EXPLANATION} {provenance.device_of(reports[0])}, jax'
        f' {", ".join(versions)}.'
        ' [All candidates and the commands](docs/evidence/tables.md#controllers).'
    )
    if not fresh:
        return text + '\n'
    return (
        f'{text} The same with further seeds, which nothing was chosen with:\n\n'
        + tables.markdown(*short_rows(fresh))
    )


def write(
    reports: Sequence[Mapping[str, Any]],
    path: pathlib.Path,
    fresh: Sequence[Mapping[str, Any]] = (),
) -> list[pathlib.Path]:
    """Writes the tables and the figures."""
    files = [path / name for name in FILES]
    text = ''.join(
        f'### At {said}\n\n{tables.markdown(*rows_of(reports, kind))}\n'
        for kind, said in KINDS.items()
    )
    commands = [command for report in reports for command in report['commands']]
    files[0].write_text(
        f"{text}SAM's row: accuracy on test examples. {EXPLANATION}\n\nCommands:\n\n"
        + ''.join(f'- `{command}`\n' for command in commands)
    )
    differences(reports, files[1])
    against_rho(reports, files[2])
    files[3].write_text(summary(reports, fresh))
    return files


def main() -> None:
    """Runs what the flags say."""
    path = run_files.open_workdir(flags.FLAGS.workdir)
    reports = load(path)
    fresh = load(path / FRESH) if (path / FRESH).is_dir() else []
    files = write(reports, path, fresh)
    print('written to ' + ', '.join(map(str, files)))


def define_flags() -> None:
    """Defines the flags; called by the program, not on import."""
    flags.DEFINE_string('workdir', None, 'Where the reports are.', required=True)


if __name__ == '__main__':
    program.run(main, define_flags)
