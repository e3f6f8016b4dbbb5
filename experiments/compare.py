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
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from experiments.common import configuration, files, program, progress, shards, timing
from experiments.common.shards import Shard
from experiments.data import sources
from experiments.methods.titles import title
from experiments.report import provenance, statistics, tables, tuning
from experiments.report.comparison import SUMMARY, summary_of, write_report
from experiments.training import run_files
from experiments.training.experiment import Experiment, build
from experiments.training.loop import train

TIMING = 'timing.json'


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
    path = run_files.open_workdir(workdir)
    shard = shard or Shard()
    if not methods or not seeds:
        raise configuration.ConfigError(
            'config.compare needs at least one method and one seed, got methods'
            f' {list(methods)} and seeds {list(seeds)}.'
        )
    configuration.distinct('config.compare.methods', methods)
    configuration.distinct('config.compare.seeds', seeds)
    configuration.integer('config.compare.timing_rounds', timing_rounds, 1)
    configuration.integer('config.compare.timing_steps', timing_steps, 1)
    dataset = sources.load(config.data)
    chosen = chosen or {}
    settings = {
        method: configuration.with_values(
            config, {'method': method, **chosen.get(method, {})}
        )
        for method in methods
    }
    experiments = {
        method: build(setting, dataset) for method, setting in settings.items()
    }
    steps = sum(each.num_steps for each in experiments.values()) * len(seeds)
    with progress.bar(steps, config.name) as bar:
        runs = _train_all(path, settings, experiments, seeds, shard, bar)
        if not shard.whole:
            return {}
        bar.note('time per step')
        times = _timing(path, settings, experiments, timing_rounds, timing_steps)

    baseline = methods[0]
    summary = {
        'name': config.name,
        'baseline': baseline,
        'methods': {
            method: summary_of(method, runs, times, baseline) for method in methods
        },
        'timing': {
            'rounds': timing_rounds,
            'steps': timing_steps,
            'variables': times['variables'],
            'seconds_per_step': {
                name: statistics.quartiles(values)
                for name, values in times['seconds_per_step'].items()
            },
        },
        'chosen': {method: dict(values) for method, values in chosen.items()},
        'config': configuration.plain(config),
        'command': provenance.command(),
        **provenance.environment(),
    }
    summary = files.jsonable(summary)
    files.write_json(path / SUMMARY, summary)
    return summary


def _train_all(
    path: pathlib.Path,
    settings: Mapping[str, Any],
    experiments: Mapping[str, Experiment],
    seeds: Sequence[int],
    shard: Shard,
    bar: progress.Bar,
) -> dict[str, list[dict[str, Any]]]:
    """The results of a shard of methods × seeds, by method."""
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in experiments}
    # Seeds outside: a busy hour of the machine then hits all methods alike.
    trials = itertools.product(seeds, experiments.items())
    expected = 0
    for number, (seed, (method, experiment)) in enumerate(trials):
        if shard.holds(number):
            config = settings[method]
            name = title(method, config.methods[method])
            result = train(
                configuration.with_values(config, {'seed': seed}),
                path / method / f'seed{seed}',
                experiment=experiment,
                bar=_Titled(bar, f'{name}, seed {seed}'),
            )
            runs[method].append(result)
        # A run that was finished before, or is not made here, reports no steps.
        expected += experiment.num_steps
        bar.advance(expected - bar.done)
    return runs


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
            method: files.jsonable(configuration.of_run(config))
            for method, config in configs.items()
        },
    }
    file = path / TIMING
    if file.exists():
        try:
            saved = json.loads(file.read_text())
            if saved['settings'] == settings:
                return saved
        except (ValueError, KeyError, TypeError) as error:
            raise configuration.ConfigError(
                f'{file} holds no times of steps ({error!r}). Move it away, and they'
                ' are taken again.'
            ) from error
    timers = {}
    for method, experiment in experiments.items():
        planned = configs[method].dispatch == 'planned'
        programs = experiment.method.programs if planned else ()
        for sample in programs or (None,):
            name = {None: 'step', True: 'sampled', False: 'reuse'}[sample]
            chunk = _chunk(experiment, steps, sample)
            timers[f'{method}/{name}'] = functools.partial(timing.seconds_of, chunk)
    seconds = timing.interleaved(timers, rounds)
    # Rounded as in the file, so that a later call returns the same.
    times = files.jsonable(
        {
            'settings': settings,
            'variables': provenance.system_variables(),
            'seconds_per_step': {
                name: [value / steps for value in values]
                for name, values in seconds.items()
            },
        }
    )
    files.write_json(file, times)
    return times


def _chunk(
    experiment: Experiment, steps: int, sample: bool | None = None
) -> Callable[[], Any]:
    """Some steps of a training loop, as the trainer runs them.

    Args:
        experiment: what to run.
        steps: how many steps a call makes; the next call goes on from there.
        sample: for planned methods, whether all of them are sampled or none.

    Returns:
        A function that makes the steps and returns the state.
    """
    state = experiment.init(seed=0)
    batches = experiment.batches
    epoch = batches.epoch(seed=0, epoch=0)
    keywords = {} if sample is None else {'sample': sample}

    def chunk() -> Any:
        nonlocal state
        for index in range(steps):
            batch = batches.take(batches.dataset.train, epoch, index)
            state = experiment.step(state, batch, **keywords)
        return state

    return chunk


def main() -> None:
    """Runs what the flags say."""
    config, path = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
    configuration.check(config)
    shard = shards.parse(flags.FLAGS.shard)
    file = flags.FLAGS.tuning
    chosen = tuning.load_chosen(file, config.name) if file else None
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
    program.run(
        main,
        shards.define_flag,
        lambda: flags.DEFINE_string(
            'tuning', '', 'The tuning.json whose settings each method takes.'
        ),
        configured=True,
    )
