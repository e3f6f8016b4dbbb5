r"""Tries the settings in ``config.tune``, each method's in the same way.

    python -m experiments.tune --config=experiments/configs/digits.py --workdir=runs

Judged on the validation examples, with seeds that are reported nowhere. Runs that are
finished already are not run again; ``--shard=0/2`` makes every second run alone.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments import configuration, data, progress, results, shards, tables
from experiments.experiment import Experiment
from experiments.methods import TITLES
from experiments.shards import Shard
from experiments.train import train

TUNING = 'tuning.json'


def tune(
    config: Any,
    workdir: str | os.PathLike,
    *,
    seeds: Sequence[int],
    grid: Sequence[tuple[str, str, Sequence[Any], Mapping[str, Any]]],
    shard: Shard | None = None,
) -> dict[str, Any]:
    """Tries settings of each method; the validation examples are the judge.

    Args:
        config: the configuration of a run.
        workdir: where the runs and ``tuning.json`` are written.
        seeds: the seeds of each setting, none of them one that is reported.
        grid: methods, each with one field of the configuration (by its dotted
            path), the values to try for it, and what else to change meanwhile.
        shard: which runs are made; a part makes no report.

    Returns:
        The content of ``tuning.json``; nothing of a part.

    Raises:
        ConfigError: without validation examples, or for seeds that are reported.
    """
    path = results.open_workdir(workdir)
    shard = shard or Shard()
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
    trials = [
        (method, {field: value, **dict(others)})
        for method, field, values, others in grid
        for value in values
    ]
    tried: dict[str, list[dict[str, Any]]] = {method: [] for method, _ in trials}
    with progress.bar(len(trials) * len(seeds), f'{config.name} tuning') as bar:
        for number, (method, trial) in enumerate(trials):
            setting = configuration.with_values(config, {'method': method, **trial})
            name = ','.join(f'{key}={value}' for key, value in trial.items())
            mine = [
                seed
                for place, seed in enumerate(seeds, number * len(seeds))
                if shard.holds(place)
            ]
            experiment = Experiment(setting, dataset) if mine else None
            runs = [
                train(
                    configuration.with_values(setting, {'seed': seed}),
                    path / method / name / f'seed{seed}',
                    experiment=experiment,
                    bar=progress.Bar(),
                )
                for seed in mine
            ]
            bar.advance(len(seeds))
            if shard.whole:
                tried[method].append({'settings': trial, **_judged(runs)})
                accuracy = tried[method][-1]['validation_accuracy']
                bar.note(f'{method} {name}: {tables.percent(accuracy)} %')
    if not shard.whole:
        return {}
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


def _judged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rate = results.summary(run['sampling_rate'] for run in runs)
    # Low where wrong labels are learnt by heart.
    loss = results.summary(run['log'][-1]['loss'] for run in runs)
    return {
        'validation_accuracy': results.summary(
            run['validation_accuracy'] for run in runs
        ),
        'sampling_rate': rate['mean'],
        'training_loss': loss['mean'],
    }


def load_chosen(file: str | os.PathLike, name: str) -> dict[str, dict[str, Any]]:
    """What tuning chose for each method.

    Args:
        file: a ``tuning.json``.
        name: ``config.name`` of the runs that the settings are for.

    Returns:
        By method, dotted paths in the configuration and their values.

    Raises:
        ConfigError: if the file is none, or of another configuration.
    """
    try:
        tuning = json.loads(pathlib.Path(file).read_text())
        tuned, chosen = tuning['name'], tuning['chosen']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise configuration.ConfigError(
            f'tuning must be a file of experiments.tune, got {str(file)!r}: {error!r}.'
        ) from error
    if tuned != name:
        raise configuration.ConfigError(
            f'tuning must be of {name!r}, but {file} is of {tuned!r}.'
        )
    return chosen


def rows_of(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of what was tried."""
    rows = [
        [
            TITLES[method],
            # The last part of a path is what tells settings apart.
            ', '.join(
                f'{key.rsplit(".", 1)[-1]} {value}'
                for key, value in trial['settings'].items()
            ),
            tables.percent(trial['validation_accuracy']),
            f'{trial["sampling_rate"]:.2f}',
            'chosen' if trial['settings'] == summary['chosen'][method] else '',
        ]
        for method, trials in summary['tried'].items()
        for trial in trials
    ]
    return ['Method', 'Settings', 'Validation, %', 'Sampled', ''], rows


def main(arguments: Sequence[str]) -> None:
    """Runs what the flags say."""
    config, path = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
    with configuration.usage(arguments):
        configuration.check(config)
        shard = shards.parse(flags.FLAGS.shard)
        summary = configuration.call(
            tune, 'config.tune', config.tune, config=config, workdir=path, shard=shard
        )
    if summary:
        tables.show(f'{len(summary["seeds"])} seeds each', *rows_of(summary))
        print(f'written to {path / TUNING}')


if __name__ == '__main__':
    configuration.run(main, shards.define_flag)
