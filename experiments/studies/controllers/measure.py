r"""Compares ways to spend a third of SAM's second gradients with SAM itself.

    python -m experiments.tune --workdir=runs/controllers/mlp_600/tuning \
        --config=experiments/studies/controllers/config.py:mlp_600
    python -m experiments.studies.controllers.measure \
        --workdir=runs/controllers/mlp_600 \
        --config=experiments/studies/controllers/config.py:mlp_600 \
        --tuning=runs/controllers/mlp_600/tuning/tuning.json

Each candidate is run twice: with the settings that tuning chose for it, and with those
that it chose for SAM. Differences from SAM are paired by seed. ``--shard=0/2`` makes
every second run alone and no report.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments.common import configuration, files, program, progress, shards
from experiments.common.shards import Shard
from experiments.data import sources
from experiments.methods.titles import title
from experiments.report import provenance, statistics, tables, tuning
from experiments.training import run_files
from experiments.training.loop import train_seeds

SUMMARY = 'controllers.json'
_SAM = 'methods.sam.'


def measure(
    config: Any,
    workdir: str | os.PathLike,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    tuning: Mapping[str, Any],
    shard: Shard | None = None,
) -> dict[str, Any]:
    """Runs candidates with their own settings and with SAM's.

    Args:
        config: the configuration of a run.
        workdir: where the runs and the report are written.
        methods: the candidates; SAM, which they are compared with, among them.
        seeds: the seeds of each.
        tuning: the content of a ``tuning.json`` of these methods.
        shard: which runs are made; a part makes no report.

    Returns:
        The content of ``controllers.json``; nothing of a part.

    Raises:
        ConfigError: if a method was not tuned.
    """
    path = run_files.open_workdir(workdir)
    shard = shard or Shard()
    chosen = tuning['chosen']
    for method in ('sam', *methods):
        if method not in methods or method not in chosen:
            raise configuration.ConfigError(
                'config.compare.methods must hold sam and none but what was tuned'
                f' ({", ".join(chosen)}), got {", ".join(methods)}.'
            )
    dataset = sources.load(config.data)
    runs: dict[str, dict[str, list[Any]]] = {}
    number = 0
    with progress.bar(2 * len(methods) * len(seeds), config.name) as bar:
        for method in methods:
            runs[method] = {}
            kinds = _kinds(method, chosen)
            for kind, settings in kinds.items():
                # Where both settings are the same, so are the runs.
                suffix = _PLACES[kind] if settings != kinds['own'] else ''
                run = configuration.with_values(config, {'method': method, **settings})
                runs[method][kind] = train_seeds(
                    run,
                    seeds,
                    path / (method + suffix),
                    dataset=dataset,
                    holds=lambda place, first=number: shard.holds(first + place),
                    bar=bar,
                )
                number += len(seeds)
                bar.note(f'{method}, {kind}')
    if not shard.whole:
        return {}
    sam = [run['test_accuracy'] for run in runs['sam']['own']]
    summary = {
        'name': config.name,
        'num_steps': runs['sam']['own'][0]['steps'],
        'seeds': list(seeds),
        'methods': {
            method: {
                'title': title(method, config.methods[method]),
                'settings': configuration.plain(config)['methods'][method],
                'tried': tuning['tried'][method],
                **{
                    kind: _summarize(kinds[kind], sam, chosen[method], kind)
                    for kind in kinds
                },
            }
            for method, kinds in runs.items()
        },
        'tuning_seeds': tuning['seeds'],
        'config': configuration.plain(config),
        'commands': [tuning['command'], provenance.command()],
        **provenance.environment(),
    }
    summary = files.jsonable(summary)
    files.write_json(path / SUMMARY, summary)
    return summary


# Where the runs of each kind are; the first is where `compare` has them too.
_PLACES = {'own': '', 'as_sam': '_as_sam'}


def _kinds(method: str, chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of a method: its own and SAM's, where it has a ρ."""
    kinds = {'own': dict(chosen[method])}
    if method != 'sam' and f'methods.{method}.rho' in chosen[method]:
        kinds['as_sam'] = {
            key.replace(_SAM, f'methods.{method}.'): value
            for key, value in chosen['sam'].items()
        }
    return kinds


def _summarize(
    runs: Sequence[Mapping[str, Any]],
    sam: Sequence[float],
    chosen: Mapping[str, Any],
    kind: str,
) -> dict[str, Any]:
    accuracies = [run['test_accuracy'] for run in runs]
    return {
        **({'chosen': dict(chosen)} if kind == 'own' else {}),
        'test_accuracy': statistics.summary(accuracies),
        'minus_sam': statistics.paired(accuracies, sam),
        'sampling_rate': statistics.summary(run['sampling_rate'] for run in runs),
    }


def rows_of(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of one task."""
    header = ['', 'ρ', 'Test, %', '− SAM', 'Worst seed', 'Sampled']
    header += ["Test, % (SAM's ρ)", "− SAM (SAM's ρ)"]
    rows = []
    for method in summary['methods'].values():
        own, other = method['own'], method.get('as_sam')
        accuracy = own['test_accuracy']
        rhos = [str(v) for key, v in own['chosen'].items() if key.endswith('.rho')]
        rows.append(
            [
                method['title'],
                *(rhos or ['–']),
                tables.percent(accuracy),
                tables.points(own['minus_sam']),
                f'{100 * min(accuracy["values"]):.1f}',
                f'{own["sampling_rate"]["mean"]:.2f}',
                tables.percent(other['test_accuracy']) if other else '–',
                tables.points(other['minus_sam']) if other else '–',
            ]
        )
    return header, rows


def main() -> None:
    """Runs what the flags say."""
    config, path = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
    configuration.check(config)
    shard = shards.parse(flags.FLAGS.shard)
    # Checks that it is one, of these runs.
    tuning.load_chosen(flags.FLAGS.tuning, config.name)
    summary = measure(
        config,
        path,
        methods=config.compare.methods,
        seeds=config.compare.seeds,
        tuning=json.loads(pathlib.Path(flags.FLAGS.tuning).read_text()),
        shard=shard,
    )
    if summary:
        tables.show(f'{config.name}, {len(summary["seeds"])} seeds', *rows_of(summary))
        print(f'written to {path / SUMMARY}')


def _define_tuning() -> None:
    flags.DEFINE_string('tuning', None, 'The tuning.json of the candidates.')
    flags.mark_flag_as_required('tuning')


if __name__ == '__main__':
    program.run(main, shards.define_flag, _define_tuning, configured=True)
