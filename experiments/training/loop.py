"""Trains: the loop of one run, and runs that differ in nothing but the seed."""

import contextlib
import functools
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.common import configuration, files, processes, progress
from experiments.data import examples
from experiments.report import provenance
from experiments.training import run_files
from experiments.training.checkpoints import Checkpoints
from experiments.training.experiment import Experiment, build
from experiments.training.run_log import RunLog
from experiments.training.state import COLUMNS, RunState


def train(
    config: Any,
    workdir: str | os.PathLike,
    *,
    experiment: Experiment | None = None,
    bar: progress.Bar | None = None,
    num_devices: int = 1,
) -> dict[str, Any]:
    """Runs a configuration, unless its result is there already.

    A run that was interrupted goes on from its last complete checkpoint, and ends
    as it would have without the interruption. With several processes all of them
    call this; the files are read and written by the first one.

    Args:
        config: the configuration, see :mod:`experiments.common.configuration`.
        workdir: where the files of the run are written, see
            :mod:`experiments.training.run_files`.
        experiment: the compiled programs of another run that differs in nothing
            but the seed; None makes new ones.
        bar: what the steps are reported to; None shows a bar of its own.
        num_devices: what a new :class:`Experiment` is made with; 0 for all devices.

    Returns:
        The content of ``result.json``.

    Raises:
        ConfigError: for settings that cannot be meant, a workdir that cannot be
            written, one that holds a run with other settings, or one in which another
            process is at work.
    """
    configuration.check(config)
    path = pathlib.Path(workdir)
    settings = configuration.of_run(config)
    result = processes.on_first(
        lambda: run_files.finished(run_files.open_workdir(path), settings)
    )
    if result is not None:
        return result
    with contextlib.ExitStack() as stack:
        claim = run_files.claimed(path, settings)
        processes.on_first(lambda: stack.enter_context(claim))
        if experiment is None:
            experiment = build(config, num_devices=num_devices)
        if bar is None:
            title = f'{config.name} {config.method} seed {config.seed}'
            bar = progress.Bar()
            if processes.is_first():
                shown = progress.bar(experiment.num_steps, title)
                bar = stack.enter_context(shown)
        measured = _run(experiment, config, path, bar)

        def write() -> dict[str, Any]:
            result = {
                'name': config.name,
                'method': config.method,
                'model': config.model,
                'seed': config.seed,
                **measured,
                'num_devices': experiment.batches.devices.count,
                'num_processes': jax.process_count(),
                'config': settings,
                'command': provenance.command(),
                **provenance.environment(),
            }
            files.write_json(path / run_files.RESULT, result)
            return files.jsonable(result)

        return processes.on_first(write)


def train_seeds(
    config: Any,
    seeds: Sequence[int],
    workdir: pathlib.Path,
    *,
    dataset: examples.Dataset,
    holds: Callable[[int], bool],
    bar: progress.Bar,
) -> list[dict[str, Any] | None]:
    """Runs a configuration with several seeds, those that are not finished yet.

    Args:
        config: the configuration; its seed does not matter.
        seeds: the seeds.
        workdir: where the runs are, ``seed0`` and so on below it.
        dataset: the data set of ``config.data``.
        holds: whether the run of the seed in this place is to be made here.
        bar: goes on by one for each seed.

    Returns:
        Results, one per seed; None where a run is neither finished nor made here.
    """
    # Compiled for the first run that has to be made.
    experiment = None
    found = []
    for place, seed in enumerate(seeds):
        run = configuration.with_values(config, {'seed': seed})
        path = workdir / f'seed{seed}'
        result = run_files.finished(path, configuration.of_run(run))
        if result is None and holds(place):
            experiment = experiment or build(config, dataset)
            result = train(run, path, experiment=experiment, bar=progress.Bar())
        found.append(result)
        bar.advance()
    return found


def _run(
    experiment: Experiment, config: Any, path: pathlib.Path, bar: progress.Bar
) -> dict[str, Any]:
    batches, step_of = experiment.batches, experiment.step
    dataset = batches.dataset.with_label_noise(config.label_noise, config.seed)
    batch_of = functools.partial(batches.take, dataset.train)
    state = experiment.init(config.seed)
    step_of.compile(state, batch_of(batches.epoch(config.seed, 0), 0))
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(path, config))
        state = checkpoints.restore(state)
        step = interval_start = int(state.step)
        bar.advance(step)
        records = RunLog(path, step) if processes.is_first() else None
        if records is not None:
            stack.enter_context(records)

        start = time.perf_counter()
        for epoch in range(step // batches.steps_per_epoch, config.epochs):
            order = batches.epoch(config.seed, epoch)
            for index in range(batches.steps_per_epoch):
                state = step_of(state, batch_of(order, index))
                bar.advance()
            step += batches.steps_per_epoch
            evaluates = _is_due(config.eval_every, epoch, config.epochs)
            saves = _is_due(config.checkpoint_every, epoch, config.epochs)
            if not (evaluates or saves or _is_due(config.log_every, epoch)):
                continue
            # The only place where the host waits for the device, but for plans.
            numbers = _read_record(state, interval_start, step)
            seconds = time.perf_counter() - start
            images = (step - interval_start) * experiment.batches.batch_size
            entry = {
                'step': step,
                'epoch': epoch + 1,
                'seconds': seconds,
                'images_per_second': images / seconds,
                **{name: float(np.mean(values)) for name, values in numbers.items()},
                'psf_norm_change': change_of_norm(
                    numbers['psf_norm'], numbers['sampled']
                ),
            }
            if evaluates:
                entry |= experiment.evaluate(state)
                bar.note(_describe(entry))
            if records is not None:
                records.append(entry, numbers)
            if saves:
                checkpoints.save(step, state)
            interval_start, start = step, time.perf_counter()
    counts = experiment.counts(state)
    return _measured(experiment, state, counts, records.entries) if records else {}


def _is_due(every: int, epoch: int, epochs: int | None = None) -> bool:
    """Whether this epoch is one of ``every``, or the last one; 0 means never."""
    return every > 0 and ((epoch + 1) % every == 0 or epoch + 1 == epochs)


def _read_record(state: RunState, start: int, end: int) -> dict[str, np.ndarray]:
    """The columns of the steps from ``start`` to ``end``; waits for the last one."""
    record = jax.device_get(state.record)
    rows = record[np.arange(start, end) % len(record)]
    return dict(zip(COLUMNS, rows.T, strict=True))


def change_of_norm(norms: np.ndarray, sampled: np.ndarray) -> float:
    """Mean of |nᵢ − nᵢ₋₁| / nᵢ₋₁ over the samples of an interval.

    Args:
        norms: [steps], the PSF norm of the latest sample.
        sampled: [steps], 1 where there was one; NaN where a method takes none.

    Returns:
        The mean; NaN for fewer than two samples.
    """
    taken = norms[(sampled > 0) & np.isfinite(norms) & (norms > 0)]
    if len(taken) < 2:
        return float('nan')
    return float(np.mean(np.abs(np.diff(taken)) / taken[:-1]))


def _describe(entry: dict[str, Any]) -> str:
    judge = _judge(entry)
    text = (
        f'epoch {entry["epoch"]} loss {entry["loss"]:.3f} {judge}'
        f' {entry[f"{judge}_accuracy"]:.1%}'
    )
    if np.isfinite(entry['sampled']):
        text += f' sampled {entry["sampled"]:.0%}'
    return text


def _judge(entry: dict[str, Any]) -> str:
    """Which examples say what is best: validation, where there are any."""
    return 'validation' if 'validation_accuracy' in entry else 'test'


def _measured(
    experiment: Experiment,
    state: RunState,
    counts: dict[str, int],
    log: list[dict[str, Any]],
) -> dict[str, Any]:
    evaluations = [entry for entry in log if 'test_accuracy' in entry]
    last = evaluations[-1]
    judge = _judge(last)
    best = max(evaluations, key=lambda entry: entry[f'{judge}_accuracy'])
    seconds = sum(entry['seconds'] for entry in log)
    steps = last['step']
    return {
        'steps': steps,
        'epochs': last['epoch'],
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        # Of the last step; and of the evaluation that was best on these examples.
        'test_accuracy': last['test_accuracy'],
        'validation_accuracy': last.get('validation_accuracy'),
        'best': {
            'on': judge,
            'epoch': best['epoch'],
            'test_accuracy': best['test_accuracy'],
            'validation_accuracy': best.get('validation_accuracy'),
        },
        'sampling_rate': counts['num_samples'] / steps,
        **counts,
        'train_seconds': seconds,
        'step_seconds': seconds / steps,
        'images_per_second': steps * experiment.batches.batch_size / seconds,
        'compile_seconds': experiment.step.compile_seconds,
        'peak_memory_bytes': provenance.peak_memory(),
        'log': log,
    }
