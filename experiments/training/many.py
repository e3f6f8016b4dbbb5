"""Many runs, each of which ends as a line of one file."""

import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from experiments.common import configuration, files, progress
from experiments.common.ledger import Job, Ledger
from experiments.data import sources
from experiments.data.examples import Dataset
from experiments.report import provenance
from experiments.training.experiment import Experiment, build

# What makes a run: `experiments.training.loop.train`.
Train = Callable[..., dict[str, Any]]
# What else a line says of a run: of the job, its experiment, workdir and result.
More = Callable[[Job, Experiment, pathlib.Path, Mapping[str, Any]], Mapping[str, Any]]


class Maker:
    """Makes runs one after the other.

    Runs that differ in nothing but seed, learning rate and ρ have the same programs,
    which are compiled for the first of them and kept until one has other data.

    Args:
        ledger: where the lines go.
        workdir: where runs are made.
        train: :func:`experiments.training.loop.train`.
        keep: whether the files of finished runs stay in the workdir.
        more: ``more(job, experiment, path, result)`` is what a line says besides what
            all lines say; None for nothing. The files of the run are in ``path``.
    """

    def __init__(
        self,
        ledger: Ledger,
        workdir: pathlib.Path,
        train: Train,
        keep: bool = False,
        more: More | None = None,
    ):
        self._ledger = ledger
        self._workdir = workdir
        self._train = train
        self._keep = keep
        self._more = more
        self._data: tuple[str, Dataset] | None = None
        self._programs: dict[str, Experiment] = {}

    def work(
        self,
        jobs: Callable[[], Iterable[Job]],
        *,
        total: float,
        title: str,
    ) -> None:
        """Makes all jobs, and those that are known once these are made, and so on.

        Args:
            jobs: the jobs that can be made as the ledger stands.
            total: expected seconds of those that are left, for the time left.
            title: of the progress bar.

        Raises:
            ConfigError: if the ledger has one of the runs with other settings.
        """
        with progress.bar(max(round(total), 1), title) as bar:
            while todo := [job for job in jobs() if not self._is_made(job)]:
                for job in todo:
                    bar.note(job.key)
                    self.make(job)
                    bar.advance(max(round(job.seconds), 1))
                self._ledger.reload()

    def _is_made(self, job: Job) -> bool:
        if job.key not in self._ledger:
            return False
        if self._ledger[job.key]['settings'] != digest(job.config):
            raise configuration.ConfigError(
                f'the results hold {job.key} with other settings: take another file, or'
                ' leave that line out to make the run again.'
            )
        return True

    def make(self, job: Job) -> dict[str, Any]:
        """Makes a run, whatever the ledger holds, and writes its line.

        Returns:
            The content of ``result.json``.
        """
        begun = time.perf_counter()
        experiment = self._experiment(job.config)
        path = self._workdir / job.key
        result = self._train(
            job.config, path, experiment=experiment, bar=progress.Bar()
        )
        wall = time.perf_counter() - begun
        line = {**line_of(result, job.tests, wall), 'settings': digest(job.config)}
        if self._more is not None:
            line |= self._more(job, experiment, path, result)
        self._ledger.add(job.key, {**job.notes, **line})
        if not self._keep:
            shutil.rmtree(path)
        return result

    def _experiment(self, config: Any) -> Experiment:
        settings = configuration.of_run(config)
        data = json.dumps(settings['data'])
        if self._data is None or self._data[0] != data:
            # Programs of another task, which are not run again.
            self._programs = {}
            jax.clear_caches()
            self._data = (data, sources.load(config.data))
        programs = json.dumps(_of_programs(settings))
        if programs not in self._programs:
            self._programs[programs] = build(config, self._data[1], shared=True)
        return self._programs[programs].with_config(config)


def digest(config: Any) -> str:
    """Eight characters that tell the settings of a run from others."""
    text = json.dumps(files.jsonable(configuration.of_run(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _of_programs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What programs depend on: all but the seed, the learning rate and ρ."""
    (method,) = settings['methods'].values()
    without_rate = lambda optimizer: {**optimizer, 'learning_rate': None}
    method = {**method, 'optimizer': without_rate(method.get('optimizer', {}))}
    if 'rho' in method:
        method['rho'] = None
    return {
        **settings,
        'seed': None,
        'optimizer': without_rate(settings['optimizer']),
        'methods': method,
    }


def line_of(result: Mapping[str, Any], tests: bool, wall: float) -> dict[str, Any]:
    """What a line says of a run.

    Args:
        result: the content of ``result.json``.
        tests: whether it has results on the test examples.
        wall: seconds from start to end, with what was compiled for it.

    Returns:
        ``on``, the device and the version of jax; ``validation`` and, if asked for,
        ``test``: accuracy and loss after the last step; ``training``: those of the last
        logging interval; ``seconds`` of the steps, of compiling (``compile``) and of
        all (``wall``); ``steps``, and the share of them that were sampled.
    """
    last = result['log'][-1]
    splits = ('validation', 'test') if tests else ('validation',)
    return {
        **{
            split: {
                quantity: last.get(f'{split}_{quantity}')
                for quantity in ('accuracy', 'loss')
            }
            for split in splits
        },
        'training': {name: last.get(name) for name in ('accuracy', 'loss')},
        'steps': result['steps'],
        'parameters': result['parameters'],
        'sampled': result['sampling_rate'],
        'on': provenance.on(result),
        'seconds': result['train_seconds'],
        'compile': sum(result['compile_seconds'].values()),
        'wall': wall,
    }
