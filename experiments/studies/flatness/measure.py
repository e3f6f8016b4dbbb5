"""How flat the minima are that finished runs ended in, run after run."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.flatten_util import ravel_pytree

from experiments.common import configuration, files, progress
from experiments.common.configuration import ConfigError
from experiments.data.examples import Dataset, Split, take_batch
from experiments.report import provenance
from experiments.studies.flatness import curvature
from experiments.studies.flatness.curvature import Landscape
from experiments.training import checkpoints, run_files
from experiments.training.experiment import Experiment, build
from experiments.training.loss import loss_of

PyTree = Any

SUMMARY = 'flatness.json'
MODES = ('train', 'eval')
# What must be the same in runs whose losses are compared.
_TASK = ('data', 'label_noise', 'label_smoothing', 'batch_size')
# Methods whose ε is not ρ g/‖g‖, so that Lemma 1 says nothing about their ρ.
_OTHER_PERTURBATIONS = ('asam', 'esam')


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        mode: one of :data:`MODES`, see the top.
        examples: how many training examples the loss is a mean over; rounded down to
            whole mini-batches.
        rhos: the radii at which the loss rise is measured.
        eigenvalues: how many of the largest eigenvalues.
        samples: random vectors for the trace, see :func:`curvature.trace`.
        distance: how far the pictures reach along the leading eigenvector, in units
            of the parameters.
        relative_distance: how far they reach along a filter-normalised direction,
            where 1 is as far as the weights are long.
        points: of each picture.
        lemma_batches: mini-batches that Lemma 1 is looked at with, per checkpoint.
    """

    mode: str = 'train'
    examples: int = 1000
    rhos: tuple[float, ...] = (0.1, 0.3, 1.0)
    eigenvalues: int = 3
    samples: int = 16
    distance: float = 1.0
    relative_distance: float = 1.0
    points: int = 31
    lemma_batches: int = 4

    def __post_init__(self):
        configuration.pick('mode', dict.fromkeys(MODES), self.mode)
        for name in ('examples', 'eigenvalues', 'samples', 'points', 'lemma_batches'):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f'{name} must be an integer >= 1, got {value!r}.')
        radii = (*self.rhos, self.distance, self.relative_distance)
        if not all(0 < value < math.inf for value in radii):
            raise ConfigError(
                'rhos, distance and relative_distance must be finite and > 0, got'
                f' {radii}.'
            )


def find_runs(workdirs: Sequence[str | os.PathLike]) -> list[pathlib.Path]:
    """The workdirs of finished runs, these or those below them.

    Raises:
        ConfigError: if one of them holds none.
    """
    found = {}
    for workdir in map(pathlib.Path, workdirs):
        paths = sorted(file.parent for file in workdir.rglob(run_files.RESULT))
        if not paths:
            raise ConfigError(
                'workdir must be that of a finished run, or hold some; there is no'
                f' {run_files.RESULT} in or below {str(workdir)!r}.'
            )
        found |= dict.fromkeys(paths)
    return list(found)


def measure(
    workdirs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    settings: Settings | None = None,
    places: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Measures finished runs of one task, and writes the numbers.

    Args:
        workdirs: those of the runs, or directories that hold them.
        output: where ``flatness.json`` is written; runs that it holds already, with
            the same settings, are not measured again.
        settings: what is measured.
        places: where the data is on this machine: what ``config.data`` takes besides
            the settings of a run, such as ``data_dir`` and ``cache_dir``.

    Returns:
        The content of ``flatness.json``.

    Raises:
        ConfigError: for workdirs without a finished run or its checkpoint, runs of
            different tasks, or a run that has diverged.
    """
    settings = settings or Settings()
    paths = find_runs(workdirs)
    runs = [run_files.result_of(path) for path in paths]
    _check_task(paths, runs)
    for path in paths:
        # Before anything is measured.
        checkpoints.steps(path)
    file = run_files.open_workdir(output) / SUMMARY
    known = _known(file, settings)
    summary: dict[str, Any] = {}
    measured: list[dict[str, Any]] = []
    with progress.bar(len(paths), 'flatness') as bar:
        meter = _Meter(settings, places or {})
        for path, run in zip(paths, runs, strict=True):
            bar.note(str(path))
            entry = known.get(str(path))
            if entry is None or entry['config'] != run['config']:
                entry = meter.measure(path, run)
            measured.append(files.jsonable(entry))
            # After each run, so that a measurement may be interrupted.
            summary = {
                'name': run['name'],
                'settings': dataclasses.asdict(settings),
                'runs': measured,
                'command': provenance.command(),
                **provenance.environment(),
            }
            files.write_json(file, summary)
            bar.advance()
    return files.jsonable(summary)


def _check_task(paths: list[pathlib.Path], runs: list[dict[str, Any]]) -> None:
    configs = [run['config'] for run in runs]
    tasks = [{key: config[key] for key in _TASK} for config in configs]
    for path, task in zip(paths, tasks, strict=True):
        differs = configuration.differences(tasks[0], task)
        if differs:
            raise ConfigError(
                f'runs must be of one task, but {paths[0]} (there) and {path} (here)'
                ' differ:\n  ' + '\n  '.join(differs)
            )


def _known(file: pathlib.Path, settings: Settings) -> dict[str, dict[str, Any]]:
    """The runs that a file holds, if they were measured with these settings."""
    if not file.exists():
        return {}
    try:
        summary = json.loads(file.read_text())
        if summary['settings'] != files.jsonable(dataclasses.asdict(settings)):
            return {}
        return {entry['workdir']: entry for entry in summary['runs']}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'{file} holds no measurement of flatness ({error!r}). Move it away.'
        ) from error


class _Run(NamedTuple):
    """A finished run, made measurable.

    Attributes:
        path: its workdir.
        config: its configuration, but for the dtype of the network.
        experiment: the network and the mini-batches.
        train: the training examples with the labels of the run.
        like: the variables of the network, as ``jax.ShapeDtypeStruct`` objects.
        steps: those that there are checkpoints of.
    """

    path: pathlib.Path
    config: Any
    experiment: Experiment
    train: Split
    like: PyTree
    steps: list[int]

    def at(self, step: int) -> tuple[PyTree, PyTree]:
        """``params`` and ``batch_stats`` of a checkpoint."""
        variables = checkpoints.variables(self.path, self.like, step)
        variables = jax.tree.map(jnp.asarray, variables)
        return variables['params'], variables.get('batch_stats', {})


class _Meter:
    """Measures runs of one task; data and compiled programs are shared by them."""

    def __init__(self, settings: Settings, places: Mapping[str, str]):
        self._settings = settings
        self._places = places
        self._dataset: Dataset | None = None
        self._landscapes: dict[tuple[nn.Module, str], Landscape] = {}

    def measure(self, path: pathlib.Path, result: dict[str, Any]) -> dict[str, Any]:
        """What is known of one run."""
        run = self._load(path, result)
        # On GPUs the default rounds what is multiplied to 10 bits.
        with jax.default_matmul_precision('highest'):
            return {
                'workdir': str(path),
                'method': run.config.method,
                'seed': run.config.seed,
                'step': run.steps[-1],
                'test_accuracy': result['test_accuracy'],
                'config': result['config'],
                **self._minimum(run),
                'lemma': self._lemma(run),
            }

    def _load(self, path: pathlib.Path, result: dict[str, Any]) -> _Run:
        config: Any = ml_collections.ConfigDict(result['config'])
        config = configuration.with_values(
            config,
            {
                # Rounded to bfloat16 a loss has no second derivative.
                f'models.{config.model}.dtype': 'float32',
                **{f'data.{name}': place for name, place in self._places.items()},
            },
        )
        experiment = build(config, self._dataset)
        self._dataset = experiment.batches.dataset
        noisy = self._dataset.with_label_noise(config.label_noise, config.seed)
        like = jax.eval_shape(
            functools.partial(experiment.model.init, train=True),
            jax.random.key(0),
            jnp.zeros((1, *self._dataset.image_shape), jnp.float32),
        )
        steps = checkpoints.steps(path)
        if steps[-1] != result['steps']:
            raise ConfigError(
                f'{path} ended at step {result["steps"]}, but its last checkpoint is of'
                f' step {steps[-1]}.'
            )
        return _Run(path, config, experiment, noisy.train, like, steps)

    def _landscape(self, run: _Run, mode: str) -> Landscape:
        model = run.experiment.model
        if (model, mode) not in self._landscapes:
            loss_fn = loss_of(model, run.config.label_smoothing, train=mode == 'train')

            def loss(params: PyTree, batch: tuple[PyTree, PyTree]) -> jax.Array:
                batch_stats, examples = batch
                return loss_fn(params, batch_stats, examples, None)[0]

            like = jax.tree.map(jnp.empty_like, run.like['params'])
            self._landscapes[model, mode] = Landscape(loss, like)
        return self._landscapes[model, mode]

    def _minimum(self, run: _Run) -> dict[str, Any]:
        """Curvature and pictures at the end of a run."""
        settings = self._settings
        params, batch_stats = run.at(run.steps[-1])
        w, _ = ravel_pytree(params)
        examples = _fixed_batches(run, settings.examples)
        batches = [(batch_stats, batch) for batch in examples]
        landscape = self._landscape(run, settings.mode)
        loss = float(landscape.loss(w, batches))
        gradient = landscape.gradient(w, batches)
        if not math.isfinite(loss) or not bool(jnp.isfinite(gradient).all()):
            raise ConfigError(f'{run.path} ended where the loss is not finite: {loss}.')
        hessian = landscape.hessian(w, batches)
        keys = jax.random.split(jax.random.key(0), 3)
        start = jax.random.normal(keys[0], w.shape, w.dtype)
        largest, vectors = curvature.eigenpairs(
            hessian, start, min(settings.eigenvalues, w.size - 1)
        )
        # One of many alike; its size is all that matters.
        (smallest,), _ = curvature.eigenpairs(
            hessian, start, 1, which='SA', tolerance=0.1
        )
        scale, _ = ravel_pytree(curvature.filter_norms(params))
        (relative,), _ = curvature.eigenpairs(
            curvature.in_units(scale, hessian), scale * start, 1
        )
        trace, trace_error = curvature.trace(hessian, w, settings.samples, keys[1])
        leading = jnp.asarray(vectors[0])
        # Which way it points is a matter of chance.
        leading *= jnp.where(leading @ gradient < 0, -1, 1)
        random, _ = ravel_pytree(curvature.filter_normalised(params, keys[2]))
        along = functools.partial(curvature.along, landscape, w, batches)
        points = settings.points
        return {
            'loss': loss,
            'examples': sum(len(batch['label']) for batch in examples),
            'weight_norm': float(jnp.linalg.norm(w)),
            'gradient_norm': float(jnp.linalg.norm(gradient)),
            'eigenvalues': largest,
            'smallest_eigenvalue': smallest,
            'relative_eigenvalue': relative,
            'trace': trace,
            'trace_error': trace_error,
            'loss_rise': curvature.loss_rise(landscape, w, batches, settings.rhos),
            'leading': along(leading, distances(settings.distance, points)),
            'random': along(random, distances(settings.relative_distance, points)),
        }

    def _lemma(self, run: _Run) -> list[dict[str, Any]]:
        """Lemma 1 at the checkpoints of a run, by mini-batch.

        The mini-batches are those that the run takes next, in training mode.
        """
        rho = run.config.methods[run.config.method].get('rho')
        if rho is None or run.config.method in _OTHER_PERTURBATIONS:
            return []
        landscape = self._landscape(run, 'train')
        batches = run.experiment.batches
        steps_per_epoch = batches.steps_per_epoch
        rows = []
        for step in run.steps:
            params, batch_stats = run.at(step)
            w, _ = ravel_pytree(params)
            epoch = run.experiment.batches.epoch(
                run.config.seed, step // steps_per_epoch
            )
            row: dict[str, Any] = {'step': step}
            for index in range(min(self._settings.lemma_batches, steps_per_epoch)):
                batch = _unbound(batches.take(run.train, epoch, index))
                sides = lemma(landscape, w, (batch_stats, batch), rho)
                for name, value in sides.items():
                    row[name] = [*row.get(name, ()), value]
            rows.append(row)
        return rows


def lemma(
    landscape: Landscape, w: jax.Array, batch: Any, rho: float
) -> dict[str, float]:
    """The two sides of Lemma 1 for one mini-batch, and what is between them.

    Args:
        landscape: the loss.
        w: [n], where it is looked at.
        batch: the mini-batch.
        rho: ρ.

    Returns:
        ``psf_norm`` ‖s‖ of s = g_SAM − g; ``first_order`` ρ ‖H g‖/‖g‖, what s is to
        first order in ρ; ``bound`` ρ ‖H‖ with the largest magnitude of an eigenvalue,
        which is ρ λ_max where H is positive definite. The second is never above the
        third; the first may be, where ρ is not small.
    """
    g, ascent = curvature.ascend(landscape, w, [batch], rho)
    hessian = landscape.hessian(w, [batch])
    psf = landscape.gradient(ascent, [batch]) - g
    first_order = rho * jnp.linalg.norm(hessian(g)) / jnp.linalg.norm(g)
    start = jax.random.normal(jax.random.key(0), w.shape, w.dtype)
    (leading,), _ = curvature.eigenpairs(hessian, start, 1, which='LM', tolerance=1e-2)
    return {
        'psf_norm': float(jnp.linalg.norm(psf)),
        'first_order': float(first_order),
        'bound': rho * abs(float(leading)),
    }


def distances(reach: float, points: int) -> np.ndarray:
    """Where the pictures have their points: from −reach to reach."""
    return np.linspace(-reach, reach, points)


def _fixed_batches(run: _Run, examples: int) -> list[PyTree]:
    """The first training examples, the same for all runs, in whole mini-batches."""
    batches = run.experiment.batches
    size, dataset = batches.batch_size, batches.dataset
    number = max(min(examples, run.train.size) // size, 1)
    order = jnp.arange(number * size, dtype=jnp.int32).reshape(number, size)
    take = functools.partial(take_batch, run.train, dataset.mean, dataset.std)
    return [_unbound(take(order, np.int32(index))) for index in range(number)]


def _unbound(batch: PyTree) -> PyTree:
    """The same arrays, on the default device but not bound to it.

    What is computed from arrays that are bound to a device is bound as well, and a
    program is compiled again for each way in which its arguments are.
    """
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), batch)
