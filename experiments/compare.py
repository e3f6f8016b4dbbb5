r"""Compares methods over several seeds: a table, figures, one JSON.

    python -m experiments.compare --config=experiments/configs/digits.py \
        --workdir=demo

Runs that are finished already are not run again. With ``--tune`` the settings in
``config.tune`` are tried instead, each method's in the same way, and judged on
the validation examples with seeds of their own.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import configuration, data, plots, progress, results, timing
from experiments.experiment import Experiment
from experiments.methods import TITLES
from experiments.train import train

SUMMARY = 'compare.json'
TIMING = 'timing.json'
TUNING = 'tuning.json'
# What the summary repeats of the logs of the runs.
_CURVES = (
    'epoch',
    'loss',
    'sampled',
    'budget',
    'grad_norm',
    'psf_norm',
    'validation_accuracy',
    'test_accuracy',
)


def compare(
    config: Any,
    workdir: str | os.PathLike,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    timing_rounds: int,
    timing_steps: int,
) -> dict[str, Any]:
    """Runs methods × seeds and measures what a step of each costs.

    Args:
        config: the configuration of a run.
        workdir: where the runs and the comparison are written.
        methods: the methods; the first is what costs are relative to.
        seeds: the seeds of each method.
        timing_rounds: how often each kind of step is timed.
        timing_steps: how many steps are timed at once.

    Returns:
        The content of ``compare.json``.
    """
    path = results.open_workdir(workdir)
    if not methods or not seeds:
        raise configuration.ConfigError(
            'config.compare needs at least one method and one seed, got methods'
            f' {list(methods)} and seeds {list(seeds)}.'
        )
    dataset = data.load(config.data)
    experiments = {
        method: Experiment(
            configuration.with_values(config, {'method': method}), dataset
        )
        for method in methods
    }
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    steps = sum(each.num_steps for each in experiments.values()) * len(seeds)
    with progress.bar(steps, config.name) as bar:
        # Seeds outside: a busy hour of the machine then hits all methods alike.
        for number, seed in enumerate(seeds):
            for place, (method, experiment) in enumerate(experiments.items()):
                run = configuration.with_values(
                    config, {'method': method, 'seed': seed}
                )
                runs[method].append(
                    train(
                        run,
                        path / method / f'seed{seed}',
                        experiment=experiment,
                        bar=_Titled(bar, f'{TITLES[method]}, seed {seed}'),
                    )
                )
                done = number * len(experiments) + place + 1
                # A run that was finished before reports no steps.
                bar.advance(done * experiment.num_steps - bar.done)
        bar.note('time per step')
        times = _timing(path, config, experiments, timing_rounds, timing_steps)

    baseline = methods[0]
    summary = {
        'name': config.name,
        'baseline': baseline,
        'methods': {
            method: _summarize(method, runs[method], times, baseline, runs[baseline])
            for method in methods
        },
        'timing': times,
        'config': configuration.plain(config),
        'command': results.command(),
        **results.environment(),
    }
    summary = results.jsonable(summary)
    results.write_json(path / SUMMARY, summary)
    return summary


class _Titled(progress.Bar):
    """Passes reports on, with the name of the run in front."""

    def __init__(self, bar: progress.Bar, title: str):
        super().__init__()
        self._bar = bar
        self._title = title

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(steps)

    def note(self, text: str) -> None:
        self._bar.note(f'{self._title}: {text}')


def _timing(
    path: pathlib.Path,
    config: Any,
    experiments: dict[str, Experiment],
    rounds: int,
    steps: int,
) -> dict[str, Any]:
    """Seconds per step of each program of each method, round by round."""
    settings = {
        method: configuration.of_run(
            configuration.with_values(config, {'method': method})
        )
        for method in experiments
    }
    settings = {'rounds': rounds, 'steps': steps, 'runs': results.jsonable(settings)}
    file = path / TIMING
    if file.exists():
        saved = json.loads(file.read_text())
        if saved['settings'] == settings:
            return saved
    chunks = {}
    for method, experiment in experiments.items():
        programs = experiment.method.programs if config.dispatch == 'planned' else ()
        for sample in programs or (None,):
            name = {None: 'step', True: 'sampled', False: 'reuse'}[sample]
            chunks[f'{method}/{name}'] = timing.training_chunk(
                experiment, steps, sample
            )
    seconds = timing.interleaved(chunks, rounds)
    # Rounded as in the file, so that a later call returns the same.
    times = results.jsonable(
        {
            'settings': settings,
            'seconds_per_step': {
                name: [value / steps for value in values]
                for name, values in seconds.items()
            },
        }
    )
    results.write_json(file, times)
    return times


def relative_cost(
    method: str, sampling_rate: float, times: dict[str, Any], baseline: str
) -> dict[str, float]:
    """Time of a step relative to the baseline's: median and quartiles over rounds.

    Sampled and reuse steps are timed apart and weighted by how often the method
    took each, so the cost is that of the whole run.
    """
    seconds = {
        name: np.asarray(values) for name, values in times['seconds_per_step'].items()
    }
    own = {
        name.split('/')[1]: values
        for name, values in seconds.items()
        if name.split('/')[0] == method
    }
    if 'reuse' in own:
        cost = sampling_rate * own['sampled'] + (1 - sampling_rate) * own['reuse']
    else:
        (cost,) = own.values()
    reference = seconds[f'{baseline}/step']
    return results.quartiles(cost / reference)


def _summarize(
    method: str,
    runs: list[dict[str, Any]],
    times: dict[str, Any],
    baseline: str,
    baseline_runs: list[dict[str, Any]],
) -> dict[str, Any]:
    sampling_rate = float(np.mean([run['sampling_rate'] for run in runs]))
    ratios = [
        run['step_seconds'] / reference['step_seconds']
        for run, reference in zip(runs, baseline_runs, strict=True)
    ]
    return {
        'title': TITLES[method],
        'settings': runs[0]['config']['methods'][method],
        'test_accuracy': results.summary(run['test_accuracy'] for run in runs),
        'best_on': runs[0]['best'].get('on', 'validation'),
        'best_test_accuracy': results.summary(
            run['best']['test_accuracy'] for run in runs
        ),
        'relative_time': relative_cost(method, sampling_rate, times, baseline),
        # Of the training runs themselves: one after the other, so noisier.
        'relative_time_of_runs': results.quartiles(ratios),
        'sampling_rate': results.summary(run['sampling_rate'] for run in runs),
        'train_seconds': results.summary(run['train_seconds'] for run in runs),
        'compile_seconds': runs[0]['compile_seconds'],
        'seeds': [run['seed'] for run in runs],
        'logs': [
            [
                {key: entry[key] for key in _CURVES if key in entry}
                for entry in run['log']
            ]
            for run in runs
        ],
    }


# --- Tuning -------------------------------------------------------------------


def tune(
    config: Any,
    workdir: str | os.PathLike,
    *,
    seeds: Sequence[int],
    grid: Sequence[tuple[str, str, Sequence[Any], Mapping[str, Any]]],
) -> dict[str, Any]:
    """Tries settings of each method; the validation examples are the judge.

    Args:
        config: the configuration of a run.
        workdir: where the runs and ``tuning.json`` are written.
        seeds: the seeds of each setting, none of them one that is reported.
        grid: methods, each with one field of the configuration (by its dotted
            path), the values to try for it, and what else to change meanwhile.

    Returns:
        The content of ``tuning.json``.
    """
    path = results.open_workdir(workdir)
    shared = set(seeds) & set(config.compare.seeds)
    if shared:
        raise configuration.ConfigError(
            'config.tune.seeds must have none of config.compare.seeds, but both hold'
            f' {sorted(shared)}.'
        )
    dataset = data.load(config.data)
    if not dataset.validation.size:
        raise configuration.ConfigError(
            'config.data.validation must be at least 1 where settings are tuned, got 0.'
        )
    tried: dict[str, list[dict[str, Any]]] = {method: [] for method, *_ in grid}
    total = sum(len(values) for _, _, values, _ in grid) * len(seeds)
    with progress.bar(total, f'{config.name} tuning') as bar:
        for method, field, values, others in grid:
            for value in values:
                trial = {field: value, **dict(others)}
                setting = configuration.with_values(config, {'method': method, **trial})
                experiment = Experiment(setting, dataset)
                name = ','.join(f'{key}={value}' for key, value in trial.items())
                runs = []
                for seed in seeds:
                    runs.append(
                        train(
                            configuration.with_values(setting, {'seed': seed}),
                            path / method / name / f'seed{seed}',
                            experiment=experiment,
                            bar=progress.Bar(),
                        )
                    )
                    bar.advance()
                accuracy = results.summary(run['validation_accuracy'] for run in runs)
                rate = results.summary(run['sampling_rate'] for run in runs)
                # Low where wrong labels are learnt by heart.
                loss = results.summary(run['log'][-1]['loss'] for run in runs)
                tried[method].append(
                    {
                        'settings': trial,
                        'validation_accuracy': accuracy,
                        'sampling_rate': rate['mean'],
                        'training_loss': loss['mean'],
                    }
                )
                bar.note(f'{method} {name}: {_percent(accuracy)} %')
    accuracy_of = lambda row: row['validation_accuracy']['mean']
    summary = {
        'name': config.name,
        'chosen': {
            method: max(rows, key=accuracy_of)['settings']
            for method, rows in tried.items()
        },
        'tried': tried,
        'seeds': list(seeds),
        'config': configuration.plain(config),
        'command': results.command(),
        **results.environment(),
    }
    summary = results.jsonable(summary)
    results.write_json(path / TUNING, summary)
    return summary


# --- What a person reads ------------------------------------------------------


def rows_of(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of a comparison."""
    baseline = summary['methods'][summary['baseline']]['title']
    # Narrow enough for a terminal of 80 columns.
    on_test = any(row.get('best_on') == 'test' for row in summary['methods'].values())
    header = [
        'Method',
        'ρ',
        'Accuracy, %',
        'Best on test, %' if on_test else 'Best epoch*, %',
        f'Time ({baseline} = 1)',
        'Sampled',
    ]
    rows = []
    for method in summary['methods'].values():
        time = method['relative_time']
        rows.append(
            [
                method['title'],
                str(method['settings'].get('rho', '–')),
                _percent(method['test_accuracy']),
                _percent(method['best_test_accuracy']),
                f'{time["median"]:.2f} ({time["low"]:.2f}–{time["high"]:.2f})',
                f'{method["sampling_rate"]["mean"]:.2f}',
            ]
        )
    return header, rows


def _percent(accuracy: dict[str, Any]) -> str:
    sd = accuracy['sd']
    spread = '' if sd is None else f' ± {100 * sd:.1f}'
    return f'{100 * accuracy["mean"]:.1f}{spread}'


FOOTNOTE = (
    'Accuracy on test examples after the last epoch; * at the epoch that was best on'
    ' the validation examples, as with early stopping. Time of a training step:'
    ' median and quartiles of interleaved rounds. Sampled: the share of steps with a'
    ' second gradient.'
)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """The table of a comparison as Markdown."""
    lines = [header, ['---'] * len(header), *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal."""
    table = Table(title=title, title_justify='left')
    for name in header:
        table.add_column(name, justify='left' if name == header[0] else 'right')
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_report(summary: dict[str, Any], path: pathlib.Path) -> list[pathlib.Path]:
    """Writes the table and the figures beside the JSON."""
    files = [path / 'table.md', path / 'accuracy_vs_cost.png', path / 'training.png']
    files[0].write_text(f'{markdown(*rows_of(summary))}\n{FOOTNOTE}\n')
    plots.accuracy_against_cost(summary, files[1])
    plots.training_curves(summary, files[2])
    return files


def main(arguments: Sequence[str]) -> None:
    """Runs what the flags say."""
    config, path = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
    with configuration.usage(arguments):
        configuration.check(config)
        if flags.FLAGS.tune:
            tuning = configuration.call(
                tune, 'config.tune', config.tune, config=config, workdir=path
            )
            rows = [
                [
                    TITLES[method],
                    # The last part of a path is what tells settings apart.
                    ', '.join(
                        f'{key.rsplit(".", 1)[1]} {value}'
                        for key, value in trial['settings'].items()
                    ),
                    _percent(trial['validation_accuracy']),
                    f'{trial["sampling_rate"]:.2f}',
                    'chosen' if trial['settings'] == tuning['chosen'][method] else '',
                ]
                for method, trials in tuning['tried'].items()
                for trial in trials
            ]
            header = ['Method', 'Settings', 'Validation, %', 'Sampled']
            header.append('')
            print_table(f'{len(tuning["seeds"])} seeds each', header, rows)
            print(f'written to {path / TUNING}')
            return
        summary = configuration.call(
            compare, 'config.compare', config.compare, config=config, workdir=path
        )
    files = write_report(summary, path)
    seeds = len(config.compare.seeds)
    print_table(f'{config.name}: mean ± sd of {seeds} seeds', *rows_of(summary))
    print(FOOTNOTE)
    print('written to ' + ', '.join(str(file) for file in [path / SUMMARY, *files]))


if __name__ == '__main__':
    configuration.run(
        main,
        lambda: flags.DEFINE_bool('tune', False, 'Try what config.tune names instead.'),
    )
