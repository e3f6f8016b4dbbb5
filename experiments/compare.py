r"""Compares methods over several seeds: a table, figures, one JSON.

    python -m experiments.compare --config=experiments/configs/digits.py \
        --workdir=demo

Runs that are finished already are not run again. Each method should have settings
that suit it: ``python -m experiments.tune`` finds them, ``--tuning=tuning.json`` takes
those that it found. ``--shard=0/2`` makes every
second run alone and no report: start one process for each core or accelerator, then
the whole once more, which finds all runs finished.
"""

import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import (
    configuration,
    data,
    plots,
    progress,
    results,
    shards,
    tables,
    timing,
    tune,
)
from experiments.experiment import Experiment
from experiments.methods import title
from experiments.shards import Shard
from experiments.train import train

SUMMARY = 'compare.json'
TIMING = 'timing.json'
# What the summary repeats of the logs of the runs.
_CURVES = (
    'epoch',
    'loss',
    'sampled',
    'budget',
    'grad_norm',
    'psf_norm',
    'psf_norm_change',
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
    chosen: Mapping[str, Mapping[str, Any]] | None = None,
    shard: Shard | None = None,
) -> dict[str, Any]:
    """Runs methods × seeds and measures what a step of each costs.

    Args:
        config: the configuration of a run.
        workdir: where the runs and the comparison are written.
        methods: the methods; the first is what costs are relative to.
        seeds: the seeds of each method.
        timing_rounds: how often each kind of step is timed.
        timing_steps: how many steps are timed at once.
        chosen: by method, settings that are its own: dotted paths in the
            configuration and values, as in ``tuning.json``.
        shard: which runs are made; a part makes no report.

    Returns:
        The content of ``compare.json``; nothing of a part.
    """
    path = results.open_workdir(workdir)
    shard = shard or Shard()
    if not methods or not seeds:
        raise configuration.ConfigError(
            'config.compare needs at least one method and one seed, got methods'
            f' {list(methods)} and seeds {list(seeds)}.'
        )
    dataset = data.load(config.data)
    chosen = chosen or {}
    settings = {
        method: configuration.with_values(
            config, {'method': method, **chosen.get(method, {})}
        )
        for method in methods
    }
    titles = {method: title(method, config.methods[method]) for method in methods}
    experiments = {
        method: Experiment(setting, dataset) for method, setting in settings.items()
    }
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    steps = sum(each.num_steps for each in experiments.values()) * len(seeds)
    with progress.bar(steps, config.name) as bar:
        # Seeds outside: a busy hour of the machine then hits all methods alike.
        for number, seed in enumerate(seeds):
            for place, (method, experiment) in enumerate(experiments.items()):
                done = number * len(experiments) + place
                # A run that was finished before reports no steps.
                bar.advance(done * experiment.num_steps - bar.done)
                if not shard.holds(done):
                    continue
                run = configuration.with_values(settings[method], {'seed': seed})
                runs[method].append(
                    train(
                        run,
                        path / method / f'seed{seed}',
                        experiment=experiment,
                        bar=_Titled(bar, f'{titles[method]}, seed {seed}'),
                    )
                )
        bar.advance(steps - bar.done)
        if not shard.whole:
            return {}
        bar.note('time per step')
        times = _timing(path, settings, experiments, timing_rounds, timing_steps)

    baseline = methods[0]
    summary = {
        'name': config.name,
        'baseline': baseline,
        'methods': {
            method: _summarize(method, runs, times, baseline) for method in methods
        },
        'timing': times,
        'chosen': {method: dict(values) for method, values in chosen.items()},
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
    configs: dict[str, Any],
    experiments: dict[str, Experiment],
    rounds: int,
    steps: int,
) -> dict[str, Any]:
    """Seconds per step of each program of each method, round by round."""
    settings = {
        'rounds': rounds,
        'steps': steps,
        'runs': {
            method: results.jsonable(configuration.of_run(config))
            for method, config in configs.items()
        },
    }
    file = path / TIMING
    if file.exists():
        saved = json.loads(file.read_text())
        if saved['settings'] == settings:
            return saved
    timers = {}
    for method, experiment in experiments.items():
        planned = configs[method].dispatch == 'planned'
        programs = experiment.method.programs if planned else ()
        for sample in programs or (None,):
            name = {None: 'step', True: 'sampled', False: 'reuse'}[sample]
            chunk = timing.training_chunk(experiment, steps, sample)
            timers[f'{method}/{name}'] = functools.partial(timing.seconds_of, chunk)
    seconds = timing.interleaved(timers, rounds)
    # Rounded as in the file, so that a later call returns the same.
    times = results.jsonable(
        {
            'settings': settings,
            'variables': results.system_variables(),
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
    cost = _seconds_per_step(method, sampling_rate, times)
    return results.quartiles(cost / _seconds_per_step(baseline, 0.0, times))


def _images_per_second(
    method: str, sampling_rate: float, times: dict[str, Any], batch_size: int
) -> dict[str, float]:
    return results.quartiles(
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


def _summarize(
    method: str,
    runs_of: dict[str, list[dict[str, Any]]],
    times: dict[str, Any],
    baseline: str,
) -> dict[str, Any]:
    runs = runs_of[method]
    sampling_rate = float(np.mean([run['sampling_rate'] for run in runs]))
    ratios = [
        run['step_seconds'] / reference['step_seconds']
        for run, reference in zip(runs, runs_of[baseline], strict=True)
    ]
    return {
        'title': title(method, runs[0]['config']['methods'][method]),
        'settings': runs[0]['config']['methods'][method],
        'test_accuracy': results.summary(run['test_accuracy'] for run in runs),
        'best_on': runs[0]['best'].get('on', 'validation'),
        'best_test_accuracy': results.summary(
            run['best']['test_accuracy'] for run in runs
        ),
        'differences': {
            other: results.paired(
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


def write_report(summary: dict[str, Any], path: pathlib.Path) -> list[pathlib.Path]:
    """Writes the table and the figures beside the JSON."""
    files = [path / 'table.md', path / 'accuracy_vs_cost.png', path / 'training.png']
    files[0].write_text(
        f'{tables.markdown(*tables.of_comparison(summary))}\n'
        f'{tables.markdown(*tables.of_differences(summary))}\n'
        f'{tables.FOOTNOTE}{tables.DIFFERENCES}\n'
    )
    plots.accuracy_against_cost(summary, files[1])
    plots.training_curves(summary, files[2])
    return files


def main(arguments: Sequence[str]) -> None:
    """Runs what the flags say."""
    config, path = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
    with configuration.usage(arguments):
        configuration.check(config)
        shard = shards.parse(flags.FLAGS.shard)
        file = flags.FLAGS.tuning
        chosen = tune.load_chosen(file, config.name) if file else None
        summary = configuration.call(
            compare,
            'config.compare',
            config.compare,
            config=config,
            workdir=path,
            chosen=chosen,
            shard=shard,
        )
    if not summary:
        return
    files = write_report(summary, path)
    seeds = len(config.compare.seeds)
    tables.show(
        f'{config.name}: mean ± sd of {seeds} seeds', *tables.of_comparison(summary)
    )
    tables.show('Paired differences', *tables.of_differences(summary))
    print(tables.FOOTNOTE + tables.DIFFERENCES)
    print('written to ' + ', '.join(str(file) for file in [path / SUMMARY, *files]))


if __name__ == '__main__':
    configuration.run(
        main,
        shards.define_flag,
        lambda: flags.DEFINE_string(
            'tuning', '', 'The tuning.json whose settings each method takes.'
        ),
    )
