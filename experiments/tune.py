r"""Tries the settings in ``config.tune``, each method's in the same way.

    python -m experiments.tune --config=experiments/configs/digits.py --workdir=runs

Judged on the validation examples, with seeds that are reported nowhere. Runs that are
finished already are not run again; ``--shard=0/2`` makes every second run alone (and
starts with the finalists when it is started once all others are finished).
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments.common import configuration, files, program, progress, shards
from experiments.common.shards import Shard
from experiments.data import examples, sources
from experiments.report import provenance, statistics, tables
from experiments.report.tuning import TUNING, rows_of
from experiments.training import run_files
from experiments.training.loop import train_seeds


def tune(
    config: Any,
    workdir: str | os.PathLike,
    *,
    seeds: Sequence[int],
    grid: Sequence[tuple[str, str, Sequence[Any], Mapping[str, Any]]],
    finalists: int = 0,
    final_seeds: Sequence[int] = (),
    shard: Shard | None = None,
) -> dict[str, Any]:
    """Tries settings of each method; the validation examples are the judge.

    Args:
        config: the configuration of a run.
        workdir: where the runs and ``tuning.json`` are written.
        seeds: the seeds of each setting, none of them one that is reported.
        grid: methods, each with one field of the configuration (by its dotted
            path), the values to try for it, and what else to change meanwhile.
        finalists: how many settings of each method, those that were best, are tried
            with ``final_seeds`` too; all seeds together then choose among them. 0
            for none.
        final_seeds: these seeds.
        shard: which runs are made; a part makes no report.

    Returns:
        The content of ``tuning.json``; nothing of a part.

    Raises:
        ConfigError: without validation examples, values or seeds, for seeds that are
            reported or there twice, and for methods that there are not.
    """
    path = run_files.open_workdir(workdir)
    shard = shard or Shard()
    shared = {*seeds, *final_seeds} & set(config.compare.seeds)
    if shared:
        raise configuration.ConfigError(
            'config.tune.seeds must have none of config.compare.seeds, but both hold'
            f' {sorted(shared)}.'
        )
    # A run that counts twice is no second seed.
    configuration.distinct('config.tune.seeds and final_seeds', [*seeds, *final_seeds])
    configuration.integer('config.tune.finalists', finalists, 0)
    for method, *_ in grid:
        configuration.pick('config.tune.grid', config.methods, method)
    dataset = sources.load(config.data)
    if not dataset.validation.size:
        raise configuration.ConfigError(
            'config.data.validation must be at least 1 where settings are tuned, got 0.'
        )
    trials = [
        _Trial(method, {field: value, **dict(others)})
        for method, field, values, others in grid
        for value in values
    ]
    if not trials or not seeds:
        raise configuration.ConfigError(
            'config.tune needs at least one value in its grid and one seed, got'
            f' {len(trials)} values and seeds {list(seeds)}.'
        )
    run = functools.partial(
        _try, config=config, dataset=dataset, path=path, shard=shard
    )
    if not run(trials, seeds, title=f'{config.name} tuning'):
        return {}
    best = _best_of_each(trials, max(finalists, 1))
    if finalists:
        rivals = [trial for ranked in best.values() for trial in ranked]
        if not run(rivals, final_seeds, title=f'{config.name} finals'):
            return {}
    if not shard.whole:
        return {}
    tried: dict[str, list[dict[str, Any]]] = {method: [] for method in best}
    for trial in trials:
        tried[trial.method].append(trial.judged())
    summary = {
        'name': config.name,
        'chosen': {
            method: max(rivals, key=_Trial.accuracy).settings
            for method, rivals in best.items()
        },
        'tried': tried,
        'seeds': list(seeds),
        'final_seeds': list(final_seeds),
        'config': configuration.plain(config),
        'command': provenance.command(),
        **provenance.environment(),
    }
    summary = files.jsonable(summary)
    files.write_json(path / TUNING, summary)
    return summary


@dataclasses.dataclass
class _Trial:
    """Settings of a method and the runs that were made with them."""

    method: str
    settings: dict[str, Any]
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def accuracy(self) -> float:
        return float(np.mean([run['validation_accuracy'] for run in self.runs]))

    def judged(self) -> dict[str, Any]:
        rate = statistics.summary(run['sampling_rate'] for run in self.runs)
        # Low where wrong labels are learnt by heart; null where it was not finite.
        losses = [run['log'][-1]['loss'] for run in self.runs]
        loss = statistics.summary(math.nan if x is None else x for x in losses)
        return {
            'settings': self.settings,
            'validation_accuracy': statistics.summary(
                run['validation_accuracy'] for run in self.runs
            ),
            'sampling_rate': rate['mean'],
            'training_loss': loss['mean'],
        }


def _best_of_each(trials: Sequence[_Trial], count: int) -> dict[str, list[_Trial]]:
    """The ``count`` trials of each method that did best, the best one first."""
    rivals: dict[str, list[_Trial]] = {}
    for trial in trials:
        rivals.setdefault(trial.method, []).append(trial)
    return {
        method: sorted(those, key=_Trial.accuracy, reverse=True)[:count]
        for method, those in rivals.items()
    }


def _try(
    trials: Sequence[_Trial],
    seeds: Sequence[int],
    *,
    title: str,
    config: Any,
    dataset: examples.Dataset,
    path: pathlib.Path,
    shard: Shard,
) -> bool:
    """Runs a shard of trials × seeds; whether all of them are finished now."""
    complete = True
    with progress.bar(len(trials) * len(seeds), title) as bar:
        for number, trial in enumerate(trials):
            setting = configuration.with_values(
                config, {'method': trial.method, **trial.settings}
            )
            name = ','.join(f'{key}={value}' for key, value in trial.settings.items())
            first = number * len(seeds)
            runs = train_seeds(
                setting,
                seeds,
                path / trial.method / name,
                dataset=dataset,
                holds=lambda place, first=first: shard.holds(first + place),
                bar=bar,
            )
            trial.runs += [run for run in runs if run is not None]
            complete = complete and None not in runs
            if trial.runs:
                bar.note(f'{trial.method} {name}: {100 * trial.accuracy():.1f} %')
    return complete


def main() -> None:
    """Runs what the flags say."""
    config, path = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
    configuration.check(config)
    shard = shards.parse(flags.FLAGS.shard)
    summary = configuration.call(
        tune, 'config.tune', config.tune, config=config, workdir=path, shard=shard
    )
    if summary:
        tables.show(f'{config.name}: on validation examples', *rows_of(summary))
        print(f'written to {path / TUNING}')


if __name__ == '__main__':
    program.run(main, shards.define_flag, configured=True)
