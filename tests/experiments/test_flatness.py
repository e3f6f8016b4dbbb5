"""Curvature of losses, and the program that measures it in finished runs."""

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments.common import configuration, files, progress
from experiments.configs import digits
from experiments.studies.flatness import curvature, measure, report
from experiments.training import checkpoints, experiment, loss, run_files
from experiments.training.loop import train
from tests import problems
from tests.experiments.small import tiny_digits

SPECTRUM = np.array([-6.0, -0.5, 0.0, 0.25, 1.0, 2.0, 4.0, 5.0])


def matrix(spectrum: np.ndarray = SPECTRUM, seed: int = 0) -> tuple[Any, Any]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors in columns."""
    size = len(spectrum)
    normal = np.random.default_rng(seed).normal(size=(size, size))
    vectors, _ = np.linalg.qr(normal)
    return jnp.asarray(vectors * spectrum @ vectors.T), jnp.asarray(vectors)


def quadratic(like: Any) -> curvature.Landscape:
    """w' A w / 2, where a mini-batch is the matrix A."""
    return curvature.Landscape(lambda w, a: w @ a @ w / 2, like)


# --- Curvature ----------------------------------------------------------------


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
    ('which', 'values'), [('LA', [5.0, 4.0]), ('SA', [-6.0, -0.5]), ('LM', [-6.0, 5.0])]
)
def test_eigenpairs_are_those_at_the_asked_end_of_a_known_spectrum(which, values):
    a, vectors = matrix()
    found, directions = curvature.eigenpairs(
        lambda v: a @ v, jnp.ones(8), 2, which=which, tolerance=1e-10
    )
    np.testing.assert_allclose(found, values, rtol=1e-9)
    for value, direction in zip(values, directions, strict=True):
        own = vectors[:, list(SPECTRUM).index(value)]
        np.testing.assert_allclose(abs(direction @ own), 1, rtol=1e-9)


@pytest.mark.usefixtures('x64')
def test_curvature_of_an_mlp_is_that_of_its_dense_hessian():
    params = problems.mlp_params(dtype=jnp.float64, hidden=3)
    w, unravel = ravel_pytree(params)
    rng = np.random.default_rng(1)
    batches = [
        (jnp.asarray(rng.normal(size=(8, 6))), jnp.asarray(rng.integers(0, 3, 8)))
        for _ in range(2)
    ]
    whole = lambda w: sum(problems.mlp_loss(unravel(w), b) for b in batches) / 2
    loss, gradient = jax.jit(jax.value_and_grad(whole))(w)
    dense = np.asarray(jax.jit(jax.hessian(whole))(w))
    values = np.linalg.eigvalsh(dense)

    landscape = curvature.Landscape(problems.mlp_loss, params)
    product = landscape.hessian(w, batches)
    np.testing.assert_allclose(landscape.loss(w, batches), loss, rtol=1e-12)
    np.testing.assert_allclose(landscape.gradient(w, batches), gradient, atol=1e-12)
    np.testing.assert_allclose(product(w), dense @ w, atol=1e-12)
    largest, _ = curvature.eigenpairs(product, jnp.ones_like(w), 2, tolerance=1e-8)
    np.testing.assert_allclose(largest, values[:-3:-1], rtol=1e-6)

    # So many samples that nothing is left to chance, and few of them.
    exact, _ = curvature.trace(product, w, w.size, jax.random.key(0))
    np.testing.assert_allclose(exact, np.trace(dense), rtol=1e-9)
    estimate, error = curvature.trace(product, w, 15, jax.random.key(0))
    assert 0 < error < 0.1 * np.trace(dense)
    assert abs(estimate - np.trace(dense)) < 4 * error


@pytest.mark.usefixtures('x64')
def test_the_trace_of_a_matrix_of_low_rank_is_exact():
    a, _ = matrix(np.array([9.0, -3.0, 2.0] + 17 * [0.0]))
    trace, error = curvature.trace(lambda v: a @ v, a[0], 5, jax.random.key(0))
    np.testing.assert_allclose([trace, error], [8, 0], atol=1e-7)


@pytest.mark.usefixtures('x64')
def test_the_loss_rise_of_a_quadratic_is_the_formula_of_each_mini_batch():
    w = jnp.linspace(-1, 1, 8)
    batches = [matrix()[0], matrix(seed=1)[0]]
    rhos = (0.01, 2.0)
    wanted = []
    for rho in rhos:
        rises = []
        for a in batches:
            g = a @ w
            direction = g / jnp.linalg.norm(g)
            curved = rho**2 / 2 * direction @ a @ direction
            rises.append(rho * jnp.linalg.norm(g) + curved)
        wanted.append(np.mean(rises))
    rise = curvature.loss_rise(quadratic(w), w, batches, rhos)
    np.testing.assert_allclose(rise, wanted, rtol=1e-9)


@pytest.mark.usefixtures('x64')
def test_the_loss_along_a_line_is_that_at_its_points():
    a, vectors = matrix()
    w = jnp.zeros(8)
    losses = curvature.along(quadratic(w), w, [a, a], vectors[:, -1], (-1.0, 0.0, 2.0))
    np.testing.assert_allclose(losses, [2.5, 0, 10], atol=1e-12)


def test_a_filter_normalised_direction_is_as_long_as_each_filter():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32)
    params = {'kernel': kernel.at[..., 2].set(0), 'bias': jnp.ones(4)}
    direction = curvature.filter_normalised(params, jax.random.key(0))
    length = lambda x: np.sqrt(np.sum(np.square(x), axis=(0, 1, 2)))
    np.testing.assert_allclose(
        length(direction['kernel']), length(params['kernel']), rtol=1e-5
    )
    assert np.std(direction['kernel'] / params['kernel'].at[..., 2].set(1)) > 0.1
    np.testing.assert_array_equal(direction['bias'], np.zeros(4))


@pytest.mark.usefixtures('x64')
def test_in_units_of_filters_the_scale_of_a_filter_does_not_count():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)))

    def loss(params: Any, x: Any) -> Any:
        # Normalised as by BatchNorm: each output has the same variance.
        out = x @ params['kernel']
        return jnp.mean((out / jnp.std(out, axis=0)) ** 4)

    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)))
    plain, per_filter = [], []
    for factor in (1.0, 10.0):
        params = {'kernel': kernel * jnp.array([factor, 1.0])}
        w, _ = ravel_pytree(params)
        product = curvature.Landscape(loss, params).hessian(w, [x])
        scale, _ = ravel_pytree(curvature.filter_norms(params))
        top = lambda product: curvature.eigenpairs(product, jnp.arange(1.0, 7.0), 1)[0]
        plain.append(top(product))
        per_filter.append(top(curvature.in_units(scale, product)))
    np.testing.assert_allclose(*per_filter, rtol=1e-6)
    assert abs(plain[1] / plain[0] - 1) > 0.1


# --- Lemma 1 ------------------------------------------------------------------


@pytest.mark.usefixtures('x64')
def test_lemma_1_is_an_equality_where_the_gradient_is_the_leading_eigenvector():
    a, vectors = matrix(np.arange(1.0, 9.0))
    w = 3 * vectors[:, -1]
    sides = measure.lemma(quadratic(w), w, a, rho=0.7)
    for side in ('psf_norm', 'first_order', 'bound'):
        np.testing.assert_allclose(sides[side], 0.7 * 8, rtol=1e-6)


@pytest.mark.usefixtures('x64')
def test_lemma_1_is_a_bound_elsewhere_and_one_of_magnitude():
    a, vectors = matrix()
    w = vectors @ jnp.ones(8)
    sides = measure.lemma(quadratic(w), w, a, rho=0.7)
    g = a @ w
    np.testing.assert_allclose(
        sides['psf_norm'], 0.7 * jnp.linalg.norm(a @ g) / jnp.linalg.norm(g)
    )
    np.testing.assert_allclose(sides['first_order'], sides['psf_norm'])
    np.testing.assert_allclose(sides['bound'], 0.7 * 6, rtol=1e-6)
    assert sides['psf_norm'] < 0.99 * sides['bound']


# --- The program --------------------------------------------------------------


SETTINGS = measure.Settings(
    mode='eval', examples=90, rhos=(0.1, 0.5), samples=3, points=5, lemma_batches=2
)


@pytest.fixture(scope='module')
def config() -> ml_collections.ConfigDict:
    """A run of nine steps that keeps two checkpoints."""
    return tiny_digits(
        method='sam', epochs=3, eval_every=3, checkpoint_every=1, checkpoint_keep=2
    )


@pytest.fixture(scope='module')
def runs(config, tmp_path_factory) -> pathlib.Path:
    """A directory with finished runs: two with SAM, one with SGD."""
    path = tmp_path_factory.mktemp('runs')
    for method, seeds in (('sam', (0, 1)), ('sgd', (0,))):
        own = configuration.with_values(config, {'method': method})
        programs = experiment.build(own)
        for seed in seeds:
            train(
                configuration.with_values(own, {'seed': seed}),
                path / method / f'seed{seed}',
                experiment=programs,
                bar=progress.Bar(),
            )
    return path


@pytest.fixture(scope='module')
def measured(runs, tmp_path_factory) -> tuple[dict[str, Any], pathlib.Path]:
    """What is measured of these runs, and where it was written."""
    path = tmp_path_factory.mktemp('flatness')
    return measure.measure([runs], path, SETTINGS), path


def test_a_run_keeps_as_many_checkpoints_as_it_is_told_to(runs):
    assert checkpoints.steps(runs / 'sam' / 'seed0') == [6, 9]


def test_a_run_keeps_at_least_one_checkpoint(config):
    with pytest.raises(configuration.ConfigError, match='checkpoint_keep must be'):
        configuration.check(configuration.with_values(config, {'checkpoint_keep': 0}))


@pytest.fixture(scope='module')
def ended(config, runs) -> tuple[experiment.Experiment, Any, Any]:
    """The second run with SAM: its programs, its examples, the weights at its end."""
    own = experiment.build(configuration.with_values(config, {'seed': 1}))
    noisy = own.batches.dataset.with_label_noise(config.label_noise, 1).train
    like = jax.eval_shape(lambda: own.init(1))
    variables = checkpoints.variables(
        runs / 'sam' / 'seed1', {'params': like.params, 'batch_stats': like.batch_stats}
    )
    return own, noisy, variables


@pytest.mark.slow
def test_the_loss_is_that_of_the_first_examples_with_their_wrong_labels(
    ended, measured
):
    own, noisy, variables = ended
    entry = measured[0]['runs'][1]
    images = (noisy.images[:80] - own.batches.dataset.mean) / own.batches.dataset.std
    logits = own.model.apply(variables, images, train=False)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    loss = -np.mean(log_p[np.arange(80), noisy.labels[:80]])
    np.testing.assert_allclose(entry['loss'], loss, rtol=1e-4)
    # Whole mini-batches of 40, of the 90 that were asked for.
    assert entry['examples'] == 80
    assert entry['step'] == 9


def test_lemma_1_is_of_the_mini_batches_that_come_next_in_training_mode(
    ended, measured
):
    own, noisy, variables = ended
    rho = digits.get_config().methods.sam.rho
    batch = own.batches.take(noisy, own.batches.epoch(seed=1, epoch=3), 1)
    loss_fn = loss.loss_of(own.model, 0.0)
    gradient = jax.jit(
        jax.grad(lambda p: loss_fn(p, variables['batch_stats'], batch, None)[0])
    )
    flat = lambda p: np.asarray(ravel_pytree(p)[0])
    w, unravel = ravel_pytree(variables['params'])
    g = flat(gradient(variables['params']))
    psf = flat(gradient(unravel(w + rho * g / np.linalg.norm(g)))) - g
    row = measured[0]['runs'][1]['lemma'][-1]
    np.testing.assert_allclose(row['psf_norm'][1], np.linalg.norm(psf), rtol=1e-3)


def test_a_measurement_holds_every_run_and_is_not_made_twice(
    runs, measured, monkeypatch
):
    summary, path = measured
    assert [(run['method'], run['seed']) for run in summary['runs']] == [
        ('sam', 0),
        ('sam', 1),
        ('sgd', 0),
    ]
    assert summary == json.loads((path / measure.SUMMARY).read_text())
    for run in summary['runs']:
        first, *_, last = run['eigenvalues']
        assert first >= last >= run['smallest_eigenvalue']
        # The pictures have where the run ended in their middle.
        for name in ('leading', 'random'):
            assert len(run[name]) == 5
            np.testing.assert_allclose(run[name][2], run['loss'], rtol=1e-5)
        assert 0 < run['loss_rise'][0] < run['loss_rise'][1]
    monkeypatch.setattr(measure, 'build', None)
    again = measure.measure([runs], path, SETTINGS)
    assert again['runs'] == summary['runs']


def test_lemma_1_is_looked_at_where_there_is_a_rho_at_every_checkpoint(measured):
    *sam, sgd = measured[0]['runs']
    assert sgd['lemma'] == []
    for run in sam:
        assert [row['step'] for row in run['lemma']] == [6, 9]
        for row in run['lemma']:
            assert len(row['psf_norm']) == 2
            first_order, bound = (
                np.asarray(row['first_order']),
                np.asarray(row['bound']),
            )
            assert np.all(first_order <= 1.02 * bound)
            assert np.all(first_order > 0)


def test_the_report_has_a_column_per_method_and_ratios_of_the_same_seeds(
    measured, tmp_path
):
    summary, _ = measured
    header, rows = report.table(summary)
    assert header == ['', 'SGD', 'SAM', 'SGD / SAM']
    (row,) = [row for row in rows if row[0] == 'λ max, per filter']
    sam, _, sgd = (run['relative_eigenvalue'] for run in summary['runs'])
    assert row[1] == f'{sgd:.3g}'
    assert ' ± ' in row[2]
    # Seed 1 has no partner, and one pair has no interval.
    assert row[3] == f'{sgd / sam:.3g}'
    files = report.write(summary, tmp_path)
    assert [file.name for file in files] == [
        'table.md',
        'flatness.png',
        'lemma1.png',
        'lemma1.md',
    ]
    assert all(file.stat().st_size > 0 for file in files)


def test_runs_of_one_method_with_other_settings_have_their_own_title(measured):
    summary, _ = measured
    first, second, third = summary['runs']
    other = json.loads(json.dumps(second))
    other['config']['methods']['sam']['rho'] = 0.1
    titles = report.groups({**summary, 'runs': [first, other, third]})
    assert list(titles) == ['SGD', 'SAM, rho 1.0', 'SAM, rho 0.1']


def test_where_the_data_is_comes_from_who_measures(runs, tmp_path):
    path = runs / 'sgd' / 'seed0'
    # The digits are nowhere else: that the setting arrives is what can be seen.
    with pytest.raises(configuration.ConfigError, match="holds 'data_dir'"):
        measure.measure([path], tmp_path, SETTINGS, {'data_dir': '/somewhere'})


def test_what_cannot_be_measured_is_refused(config, runs, tmp_path):
    def refused(message: str, *workdirs: pathlib.Path) -> None:
        with pytest.raises(configuration.ConfigError, match=message):
            measure.measure(workdirs, tmp_path / 'out', SETTINGS)

    refused("no result.json in or below '.*nowhere'", tmp_path / 'nowhere')

    run = tmp_path / 'run'
    shutil.copytree(runs / 'sgd' / 'seed0', run)
    result = json.loads((run / run_files.RESULT).read_text())
    write = lambda **values: files.write_json(
        run / run_files.RESULT, {**result, **values}
    )
    write(config=None)
    refused('result.json is no result of a run', run)
    write(config={**result['config'], 'label_noise': 0.1})
    refused('of one task.*\n.*label_noise is 0.4 there and 0.1 here', runs, run)
    write(steps=12)
    refused('ended at step 12, but its last checkpoint is of step 9', run)
    write()
    shutil.rmtree(run / checkpoints.CHECKPOINTS)
    refused('holds no checkpoint; run it with config.checkpoint_every > 0', run)
    assert not (run / checkpoints.CHECKPOINTS).exists()


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'mode': 'test'}, "mode must be one of train, eval; got 'test'"),
        ({'samples': 0}, 'samples must be an integer >= 1, got 0'),
        ({'rhos': (0.1, -1.0)}, 'rhos, .* must be finite and > 0'),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values, message):
    with pytest.raises(configuration.ConfigError, match=message):
        measure.Settings(**values)
