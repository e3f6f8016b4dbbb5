"""What a comparison says: its summary, tables and figures."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.common import configuration
from experiments.methods.titles import title
from experiments.report import comparison_plots, statistics, tables

SUMMARY = 'compare.json'

# What figures show of the logs of the runs.
CURVES = ('test_accuracy', 'sampled', 'grad_norm', 'psf_norm', 'psf_norm_change')


def curves(logs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Mean and range over seeds of each of :data:`CURVES`, epoch by epoch.

    Args:
        logs: those of the runs, which were written at the same epochs.

    Returns:
        By quantity ``epoch``, ``mean``, ``low`` and ``high``, each [epochs].
    """
    found = {}
    for quantity in CURVES:
        kept = [[entry for entry in log if quantity in entry] for log in logs]
        # null, where it was not finite, becomes NaN.
        values = [[entry[quantity] for entry in log] for log in kept]
        found[quantity] = {
            'epoch': [entry['epoch'] for entry in kept[0]],
            **statistics.band(np.asarray(values, float)),
        }
    return found


def relative_cost(
    method: str, sampling_rate: float, times: dict[str, Any], baseline: str
) -> dict[str, float]:
    """Time of a step relative to the baseline's: median and quartiles over rounds.

    Sampled and reuse steps are timed apart and weighted by how often the method
    took each, so the cost is that of the whole run.
    """
    cost = _seconds_per_step(method, sampling_rate, times)
    return statistics.quartiles(cost / _seconds_per_step(baseline, 0.0, times))


def _images_per_second(
    method: str, sampling_rate: float, times: dict[str, Any], batch_size: int
) -> dict[str, float]:
    return statistics.quartiles(
        batch_size / _seconds_per_step(method, sampling_rate, times)
    )


def _seconds_per_step(
    method: str, sampling_rate: float, times: dict[str, Any]
) -> np.ndarray:
    """Of each round; sampled and reuse steps as often as the method took each."""
    own = {
        name.split('/')[1]: np.asarray(values)
        for name, values in times['seconds_per_step'].items()
        if name.split('/')[0] == method
    }
    if 'reuse' in own:
        return sampling_rate * own['sampled'] + (1 - sampling_rate) * own['reuse']
    (seconds,) = own.values()
    return seconds


def summary_of(
    method: str,
    runs_of: dict[str, list[dict[str, Any]]],
    times: dict[str, Any],
    baseline: str,
) -> dict[str, Any]:
    """What ``compare.json`` holds of a method."""
    runs = runs_of[method]
    sampling_rate = float(np.mean([run['sampling_rate'] for run in runs]))
    ratios = [
        run['step_seconds'] / reference['step_seconds']
        for run, reference in zip(runs, runs_of[baseline], strict=True)
    ]
    return {
        'title': title(method, runs[0]['config']['methods'][method]),
        'settings': runs[0]['config']['methods'][method],
        'test_accuracy': statistics.summary(run['test_accuracy'] for run in runs),
        'best_on': runs[0]['best']['on'],
        'best_test_accuracy': statistics.summary(
            run['best']['test_accuracy'] for run in runs
        ),
        'differences': {
            other: statistics.paired(
                [run['test_accuracy'] for run in runs],
                [run['test_accuracy'] for run in runs_of[other]],
            )
            for other in dict.fromkeys((baseline, 'sam'))
            if other in runs_of and other != method
        },
        'images_per_second': _images_per_second(
            method, sampling_rate, times, runs[0]['config']['batch_size']
        ),
        'relative_time': relative_cost(method, sampling_rate, times, baseline),
        # Of the training runs themselves: one after the other, so noisier.
        'relative_time_of_runs': statistics.quartiles(ratios),
        'sampling_rate': statistics.summary(run['sampling_rate'] for run in runs),
        'train_seconds': statistics.summary(run['train_seconds'] for run in runs),
        'compile_seconds': runs[0]['compile_seconds'],
        'seeds': [run['seed'] for run in runs],
        'curves': curves([run['log'] for run in runs]),
    }


def write_report(summary: dict[str, Any], path: pathlib.Path) -> list[pathlib.Path]:
    """Writes the table and the figures beside the JSON."""
    files = [path / 'table.md', path / 'accuracy_vs_cost.png', path / 'training.png']
    files[0].write_text(
        f'{tables.markdown(*tables.of_comparison(summary))}\n'
        f'{tables.markdown(*tables.of_differences(summary))}\n'
        f'{tables.FOOTNOTE}{tables.DIFFERENCES}\n'
    )
    comparison_plots.accuracy_against_cost(summary, files[1])
    comparison_plots.training_curves(summary, files[2])
    return files


def load(workdirs: Sequence[str]) -> list[dict[str, Any]]:
    """The summaries of comparisons.

    Args:
        workdirs: what ``--workdir`` of :mod:`experiments.compare` was, or the file
            that it wrote.

    Returns:
        What :func:`experiments.compare.compare` returned.

    Raises:
        ConfigError: where there is no such file, or none of a comparison.
    """
    summaries = []
    for workdir in workdirs:
        path = pathlib.Path(workdir)
        path = path / SUMMARY if path.is_dir() else path
        try:
            summary = json.loads(path.read_text())
            if any('curves' not in row for row in summary['methods'].values()):
                raise KeyError('curves')
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise configuration.ConfigError(
                f'comparison must be a workdir of experiments.compare, got {workdir!r}:'
                f' {error!r}.'
            ) from error
        summaries.append(summary)
    return summaries
