"""The training programs: data, methods, the trainer, comparisons and figures."""

import copy
import json
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

import vsam_jax
from experiments import compare, figures, tune
from experiments.common import configuration, files, progress, shards
from experiments.configs import cifar10, cifar100, cifar100_small, digits
from experiments.data import augmentation, examples, sources
from experiments.methods import registry
from experiments.models import zoo
from experiments.report import comparison, statistics, tables, tuning
from experiments.training import experiment, loss, run_files, run_log
from experiments.training.loop import change_of_norm, train
from experiments.training.state import COLUMNS
from tests import processes
from tests.experiments.small import TASK, changed, tiny_digits


@pytest.fixture(scope='module')
def config() -> ml_collections.ConfigDict:
    """A run of twelve steps."""
    return tiny_digits(
        epochs=4,
        methods__vsam__window=4,
        methods__vsam__segments=2,
        methods__vsam__warmup_steps=3,
        methods__sgd={},
        optimizer__learning_rate=0.05,
    )


@pytest.fixture(scope='module')
def programs(config) -> experiment.Experiment:
    """The compiled programs of ``config``, for any seed."""
    return experiment.build(config)


@pytest.fixture(scope='module')
def traced(config, programs) -> experiment.Experiment:
    """The same with one program that holds both kinds of steps."""
    dataset = programs.batches.dataset
    return experiment.build(changed(config, dispatch='traced'), dataset)


# --- Data ---------------------------------------------------------------------


def test_exactly_the_asked_share_of_labels_is_wrong_and_follows_from_the_seed():
    labels = np.arange(1000) % 10
    noisy = examples.flip_labels(labels, 0.4, 10, seed=3)
    assert np.sum(noisy != labels) == 400
    assert set(np.unique(noisy)) <= set(range(10))
    np.testing.assert_array_equal(noisy, examples.flip_labels(labels, 0.4, 10, seed=3))
    assert np.any(noisy != examples.flip_labels(labels, 0.4, 10, seed=4))
    np.testing.assert_array_equal(labels, examples.flip_labels(labels, 0.0, 10, seed=3))


def test_label_noise_leaves_images_and_held_back_examples_alone():
    clean = sources.digits(100, 50, 60)
    noisy = clean.with_label_noise(0.5, seed=0)
    assert int(jnp.sum(noisy.train.labels != clean.train.labels)) == 50
    assert noisy.train.images is clean.train.images
    assert noisy.validation is clean.validation
    assert noisy.test is clean.test


def test_splits_of_the_digits_share_no_example():
    every = sources.digits()
    parts = {
        name: {image.tobytes() for image in np.asarray(split.images)}
        for name, split in (
            ('train', every.train),
            ('validation', every.validation),
            ('test', every.test),
        )
    }
    sizes = (every.train.size, every.validation.size, every.test.size)
    assert sizes == (1000, 297, 500)
    # No two of scikit-learn's digits are equal, so bytes name an example.
    assert [len(part) for part in parts.values()] == list(sizes)
    assert len(set.union(*parts.values())) == sum(sizes)
    assert every.train.images.dtype == jnp.uint8


def test_an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch():
    order = lambda seed, epoch: np.asarray(
        examples.epoch_order(
            jax.random.key(seed), epoch, num_examples=60, batch_size=20
        )
    )
    first = order(0, 5)
    assert first.shape == (3, 20)
    assert sorted(first.ravel()) == list(range(60))
    np.testing.assert_array_equal(first, order(0, 5))
    assert np.any(first != order(0, 6))
    assert np.any(first != order(1, 5))


def test_an_epoch_that_does_not_divide_repeats_no_example():
    order = examples.epoch_order(jax.random.key(0), 0, num_examples=50, batch_size=20)
    assert order.shape == (2, 20)
    assert len(np.unique(order)) == 40


def test_a_batch_holds_the_named_examples_normalised():
    dataset = sources.digits(100, 20, 20)
    order = jnp.arange(100).reshape(2, 50)
    batch = examples.take_batch(dataset.train, dataset.mean, dataset.std, order, 1)
    np.testing.assert_array_equal(batch['index'], np.arange(50, 100))
    np.testing.assert_array_equal(batch['label'], dataset.train.labels[50:])
    everything = augmentation.normalize(dataset.train.images, dataset.mean, dataset.std)
    np.testing.assert_allclose(batch['image'], everything[50:])
    assert abs(float(everything.mean())) < 1e-4
    assert abs(float(everything.std()) - 1) < 1e-4


# --- Methods ------------------------------------------------------------------


METHODS: Any = digits.get_config().methods
FIRST_IN_CHAIN = [name for name in METHODS if name not in ('esam', 'saf', 'msam')]


@pytest.mark.parametrize('name', FIRST_IN_CHAIN)
def test_every_method_of_the_configuration_is_made_with_its_settings(config, name):
    method = registry.create(name, config.methods[name], config.optimizer, TASK)
    loss = lambda w: jnp.sum(w**4)
    params = jnp.array([1.0, 2.0])

    @jax.jit
    def first_update(params):
        state, grads = method.tx.init(params), jax.grad(loss)(params)
        gradient = 'psf_grad_fn' if name == 'lean_sam' else 'grad_fn'
        told = {gradient: jax.grad(loss)}
        return method.tx.update(grads, state, params, **told)

    updates, state = first_update(params)
    assert bool(method.programs) == (name not in ('sgd', 'aesam'))
    optimizer = {**config.optimizer, **config.methods[name].get('optimizer', {})}
    if name == 'sgd':
        decayed = jax.grad(loss)(params) + optimizer['weight_decay'] * params
        np.testing.assert_allclose(
            updates, -optimizer['learning_rate'] * decayed, rtol=1e-6
        )
    else:
        numbers = vsam_jax.metrics(state)
        assert int(numbers['num_samples']) == 1
        # AsyncSAM's first step is not perturbed.
        assert (float(numbers['psf_norm']) > 0) == (name != 'asyncsam')


def test_statistics_may_be_taken_over_the_last_tensors_alone(config, programs):
    tx = experiment.build(
        changed(config, methods__vsam__stats_tensors=2), programs.batches.dataset
    ).method.tx
    params = jax.tree.map(jnp.ones_like, programs.init(0).params)
    first_update = jax.jit(lambda w: tx.update(w, tx.init(w), w, grad_fn=lambda w: w))
    norm = vsam_jax.metrics(first_update(params)[1])['grad_norm']
    # Of the classifier: 8 units, 10 classes.
    np.testing.assert_allclose(norm, np.sqrt(8 * 10 + 10), rtol=1e-6)


@pytest.mark.parametrize(
    ('name', 'rate'), [('esam', 1.0), ('saf', 0.0), ('msam', 0.0), ('lean_sam', 1 / 3)]
)
def test_methods_without_a_plan_say_whether_they_take_second_gradients(
    config, name, rate, tmp_path
):
    result = train(changed(config, method=name), tmp_path, bar=progress.Bar())
    assert result['sampling_rate'] == pytest.approx(rate)
    assert result['log'][-1]['loss'] > 0


def test_a_method_that_decides_from_the_gradient_is_traced_and_counted(
    config, tmp_path
):
    result = train(changed(config, method='aesam'), tmp_path, bar=progress.Bar())
    assert 0 < result['sampling_rate'] <= 1
    assert result['num_samples'] == round(12 * result['sampling_rate'])


def test_momentum_sam_is_evaluated_without_its_perturbation(config):
    built = experiment.build(changed(config, method='msam', methods__msam__rho=9.0))
    state = built.init(0)
    offset = jax.tree.map(lambda w: 9.0 * jnp.ones_like(w), state.params)
    moved = state.replace(
        params=jax.tree.map(jnp.add, state.params, offset),
        opt_state=optax.tree.set(state.opt_state, offset=offset),
    )
    assert built.evaluate(moved) == pytest.approx(built.evaluate(state), abs=1e-4)


def test_a_method_may_have_a_learning_rate_of_its_own(config):
    settings = {'optimizer': {'learning_rate': 0.5}}
    own = registry.create(
        'sgd', settings, {**config.optimizer, 'weight_decay': 0.0}, TASK
    )
    updates, _ = own.tx.update(jnp.ones(2), own.tx.init(jnp.ones(2)), jnp.ones(2))
    np.testing.assert_allclose(updates, -0.5)


def test_the_learning_rate_ends_at_zero():
    tx = registry.base_optimizer(3, {'learning_rate': 1.0, 'momentum': 0.0})
    state = tx.init(jnp.ones(()))
    sizes = []
    for _ in range(4):
        updates, state = tx.update(jnp.ones(()), state, jnp.ones(()))
        sizes.append(-float(jnp.asarray(updates)))
    np.testing.assert_allclose(sizes, [1.0, 0.75, 0.25, 0.0], atol=1e-6)


def test_smoothed_labels_spread_the_share_over_the_other_classes():
    smooth = loss.smooth_labels(jnp.array([1]), 5, 0.1)
    np.testing.assert_allclose(smooth, [[0.025, 0.9, 0.025, 0.025, 0.025]], rtol=1e-6)


def test_the_loss_is_the_cross_entropy_with_smoothed_labels(config, programs):
    runs = experiment.build(
        changed(config, label_smoothing=0.1, dispatch='traced'),
        programs.batches.dataset,
    )
    state = runs.init(0)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    batches = runs.batches
    batch = batches.take(batches.dataset.train, batches.epoch(0, 0), 0)
    logits, _ = runs.model.apply(
        variables, batch['image'], train=True, mutable=['batch_stats']
    )
    targets = np.full(logits.shape, 0.1 / 9)
    targets[np.arange(len(targets)), batch['label']] = 0.9
    expected = -np.mean(np.sum(targets * jax.nn.log_softmax(logits), axis=-1))
    new = runs.step(state, batch)
    loss = new.record[0, COLUMNS.index('loss')]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# --- The trainer --------------------------------------------------------------


def test_a_result_holds_settings_accuracies_times_and_what_ran(
    config, programs, tmp_path
):
    result = train(config, tmp_path, experiment=programs, bar=progress.Bar())
    assert result == json.loads((tmp_path / run_files.RESULT).read_text())
    assert result['config'] == files.jsonable(configuration.of_run(config))
    assert result['seed'] == 0
    assert result['steps'] == 12
    assert 0 <= result['test_accuracy'] <= 1
    assert result['best']['validation_accuracy'] >= result['validation_accuracy']
    assert result['images_per_second'] > 0
    assert set(result['compile_seconds']) == {'sampled', 'reuse'}
    assert {'python', 'jax', 'jaxlib', 'optax', 'flax'} <= set(result['versions'])
    assert result['device']['platform'] == jax.devices()[0].platform
    assert result['command'].startswith('python')
    # Epochs 2 and 4 are logged, with the mean of the steps in between; every step
    # stands in the trace.
    log = run_log.read_lines(tmp_path / run_log.LOG)
    trace = run_log.read_lines(tmp_path / run_log.TRACE)
    assert log == result['log']
    assert [entry['step'] for entry in log] == [6, 12]
    accuracies = [
        (step, pytest.approx(value))
        for step, name, value in scalars_of(tmp_path / run_log.TENSORBOARD)
        if name == 'test_accuracy'
    ]
    assert accuracies == [(entry['step'], entry['test_accuracy']) for entry in log]
    sampled = [value for entry in trace for value in entry['sampled']]
    assert len(sampled) == 12
    assert sum(sampled) == result['num_samples']
    assert result['sampling_rate'] == pytest.approx(result['num_samples'] / 12)
    assert sum(sampled[:3]) == 3
    assert sum(sampled[3:7]) == 1  # A budget of 1 in the first window.
    assert log[0]['loss'] == pytest.approx(np.mean(trace[0]['loss']), rel=1e-6)
    assert not list(tmp_path.glob('.*'))


def test_without_validation_examples_the_best_is_that_on_test(config, tmp_path):
    config = changed(config, data__validation=0, method='sgd', eval_every=1)
    result = train(config, tmp_path, bar=progress.Bar())
    accuracies = [entry['test_accuracy'] for entry in result['log'][1::2]]
    assert result['best']['on'] == 'test'
    assert result['best']['test_accuracy'] >= max(accuracies)
    assert result['validation_accuracy'] is None
    assert not any('validation_accuracy' in entry for entry in result['log'])
    with pytest.raises(configuration.ConfigError, match='validation must be at least'):
        tune.tune(config, tmp_path, seeds=(100,), grid=())


def test_training_learns(config, tmp_path):
    config = changed(
        config,
        method='sgd',
        optimizer__learning_rate=0.1,
        models__mlp__width=32,
        epochs=20,
        label_noise=0.0,
    )
    result = train(config, tmp_path, bar=progress.Bar())
    assert result['log'][-1]['accuracy'] == 1
    assert result['test_accuracy'] > 0.6
    assert result['sampling_rate'] == 0


def test_planned_and_traced_agree(config, programs, traced, tmp_path):
    losses = {}
    for dispatch, made in (('planned', programs), ('traced', traced)):
        path, run = tmp_path / dispatch, changed(config, dispatch=dispatch)
        train(run, path, experiment=made, bar=progress.Bar())
        trace = run_log.read_lines(path / run_log.TRACE)
        losses[dispatch] = [x for entry in trace for x in entry['loss']]
        losses[dispatch, 'plan'] = [x for entry in trace for x in entry['sampled']]
    # What the compiler fuses, and so how it rounds, differs with a conditional.
    np.testing.assert_allclose(losses['planned'], losses['traced'], rtol=1e-4)
    assert losses['planned', 'plan'] == losses['traced', 'plan']


def test_a_seed_chooses_parameters_and_order(programs):
    orders = [programs.batches.epoch(seed, epoch=0).order for seed in (0, 1, 0)]
    assert np.any(orders[0] != orders[1])
    np.testing.assert_array_equal(orders[0], orders[2])
    kernels = [programs.init(seed).params['Dense_0']['kernel'] for seed in (0, 1, 0)]
    assert np.any(kernels[0] != kernels[1])
    np.testing.assert_array_equal(kernels[0], kernels[2])


def test_planned_programs_hold_no_conditional_and_traced_ones_do(programs, traced):
    state = programs.init(seed=0)
    batches = programs.batches
    batch = batches.take(batches.dataset.train, batches.epoch(0, 0), 0)
    # stablehlo.case is what lax.cond becomes.
    for sample in (True, False):
        text = programs.step.function.program(sample).lower(state, batch).as_text()
        assert 'stablehlo.case' not in text
    assert 'stablehlo.case' in traced.step.function.lower(state, batch).as_text()


def test_seeds_share_compiled_programs_and_differ_in_results(
    config, programs, tmp_path
):
    results_of_seeds = [
        train(
            changed(config, seed=seed),
            tmp_path / f'{seed}',
            experiment=programs,
            bar=progress.Bar(),
        )
        for seed in (0, 1)
    ]
    losses = [result['log'][-1]['loss'] for result in results_of_seeds]
    assert losses[0] != losses[1]
    for sample in (True, False):
        assert programs.step.function.program(sample)._cache_size() == 1


def test_a_seed_gives_the_same_run_again(config, programs, tmp_path):
    runs = [
        train(config, tmp_path / name, experiment=programs, bar=progress.Bar())
        for name in 'ab'
    ]
    assert without_times(runs[0]['log']) == without_times(runs[1]['log'])


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = {'seconds', 'images_per_second'}
    return [
        {key: value for key, value in entry.items() if key not in times}
        for entry in log
    ]


class _Interrupt(progress.Bar):
    """A bar that stops the run, as a signal would, after step 11 of 12."""

    def advance(self, steps: int = 1) -> None:
        super().advance(steps)
        if self.done == 11:
            raise KeyboardInterrupt


@pytest.mark.parametrize('method', ['vsam', 'esam', 'saf'])
def test_an_interrupted_run_ends_as_if_it_had_not_been(config, method, tmp_path):
    # The checkpoint is from step 6, in the middle of a window of vSAM; SAF compares
    # with logits from before it.
    config = changed(
        config,
        method=method,
        checkpoint_every=2,
        eval_every=4,
        augmentation__padding=1,
        augmentation__cutout=3,
        methods__saf__lag=1,
        methods__saf__start=1,
    )
    programs = experiment.build(config)
    go = lambda name, bar: train(config, tmp_path / name, experiment=programs, bar=bar)
    whole = go('whole', progress.Bar())
    with pytest.raises(KeyboardInterrupt):
        go('cut', _Interrupt())
    assert not (tmp_path / 'cut' / run_files.RESULT).exists()
    resumed = go('cut', bar := progress.Bar())
    assert without_times(resumed['log']) == without_times(whole['log'])
    assert resumed['num_samples'] == whole['num_samples']
    assert bar.done == 12
    traces = [
        run_log.read_lines(tmp_path / name / run_log.TRACE) for name in ('whole', 'cut')
    ]
    assert traces[0] == traces[1]

    # The checkpoint of the finished run is no start for one with other settings.
    (tmp_path / 'cut' / run_files.RESULT).unlink()
    with pytest.raises(configuration.ConfigError, match='label_noise'):
        train(
            changed(config, label_noise=0.1),
            tmp_path / 'cut',
            experiment=programs,
            bar=progress.Bar(),
        )


def test_augmentation_follows_from_seed_and_epoch_and_changes_training(
    config, programs
):
    augmented = experiment.build(
        changed(config, augmentation__padding=2), programs.batches.dataset
    )
    split = programs.batches.dataset.train

    def images(runs: experiment.Experiment, seed: int, epoch: int, index: int):
        # The same examples, so that it is the changes that differ.
        order = programs.batches.epoch(0, 0).order
        drawn = runs.batches.epoch(seed, epoch)
        same = drawn._replace(order=order[:1].repeat(3, 0))
        batch = runs.batches.take(split, same, index)
        return np.asarray(batch['image'])

    first = images(augmented, 0, 0, 0)
    np.testing.assert_array_equal(first, images(augmented, 0, 0, 0))
    for other in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        assert np.any(first != images(augmented, *other))
    plain = images(programs, 0, 0, 0)
    assert np.any(first != plain)
    np.testing.assert_array_equal(plain, images(programs, 1, 1, 1))


def test_a_finished_run_is_not_run_again(config, programs, tmp_path):
    result = train(config, tmp_path, experiment=programs, bar=progress.Bar())
    bar = progress.Bar()
    # Settings of methods that the run does not use may change.
    assert train(changed(config, methods__sam__rho=9.0), tmp_path, bar=bar) == result
    assert bar.done == 0
    with pytest.raises(
        configuration.ConfigError, match=r'(?s)config.epochs is 4 there and 5 here'
    ):
        train(changed(config, epochs=5), tmp_path, bar=bar)


def test_a_run_whose_settings_have_many_digits_is_found_finished(config, tmp_path):
    run = changed(config, epochs=1, method='sgd', optimizer__learning_rate=1 / 30)
    result = train(run, tmp_path, bar=progress.Bar())
    assert train(run, tmp_path, bar=progress.Bar()) == result


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'epoch': 3}, r"'epoch', which is not among its fields:.*epochs"),
        ({'optimizer.lr': 0.1}, r"config.optimizer holds 'lr'.*learning_rate"),
        ({'methods.vsam.radius': 1.0}, r"config.methods.vsam holds 'radius'.*rho"),
        ({'models.mlp.blocks': 1}, r"config.models.mlp holds 'blocks'.*width"),
        ({'data.noise': 0.1}, r"config.data holds 'noise'.*split_seed"),
        ({'data.name': 'letters'}, r'one of digits, synthetic, .*; got .letters'),
        ({'method': 'adam'}, r"config.method must be one of .*sgd.*got 'adam'"),
        ({'dispatch': 'eager'}, r'config.dispatch must be one of planned, traced'),
        ({'epochs': 0}, r'config.epochs must be an integer >= 1, got 0'),
        ({'batch_size': 999}, r'config: batch_size must be at most 120'),
        ({'label_noise': 1.5}, r'config.label_noise must be a share'),
        ({'methods.vsam.rho': -1.0}, r'config.methods.vsam: rho must be'),
        ({'augmentation.padding': -1}, r'config.augmentation: padding must be an int'),
        ({'augmentation.crop': 4}, r"config.augmentation holds 'crop'.*padding"),
        ({'methods.vsam.stats_tensors': 99}, r'stats_tensors: n must be .* got 99'),
        ({'method': 'esam', 'methods.esam.beta': 2.0}, 'config.methods.esam: beta'),
        ({'method': 'saf', 'methods.saf.lag': 0}, 'config.methods.saf: lag must be'),
        ({'data.train': 1790}, r'config.data: .*at most 1797'),
        (
            {'method': 'lean_sam', 'batch_size': 30},
            r'batch_size must be a multiple of 4, since .*lean_sam has .* 1/4, got 30',
        ),
        ({'optimizer.learning_rate': float('nan')}, 'learning_rate must be a finite'),
        ({'optimizer.learning_rate': -0.1}, 'config.optimizer: learning_rate must be'),
        (
            {'optimizer.momentum': 1.0},
            r'optimizer: momentum must be in \[0, 1\)',
        ),
        ({'models.mlp.width': 0}, r'config.models.mlp.width must be an integer >= 1'),
        ({'models.mlp.dtype': 'int32'}, 'config.models.mlp: dtype must be a floating'),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named(config, tmp_path, change, message):
    with pytest.raises(configuration.ConfigError, match=message):
        train(configuration.with_values(config, change), tmp_path, bar=progress.Bar())


def test_a_workdir_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(configuration.ConfigError, match=r'workdir must be .*file/run'):
        train(config, tmp_path / 'file' / 'run', bar=progress.Bar())


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'x.json'
    files.write_json(path, {'a': float('nan'), 'b': (np.float32(0.5), 1)})
    assert json.loads(path.read_text()) == {'a': None, 'b': [0.5, 1]}
    with pytest.raises(TypeError):
        files.write_json(path, {'a': 1, 'b': object()})
    assert json.loads(path.read_text()) == {'a': None, 'b': [0.5, 1]}
    assert [file.name for file in tmp_path.iterdir()] == ['x.json']


def test_json_is_read_by_people_and_holds_lists_of_numbers_on_a_line(tmp_path):
    path = tmp_path / 'x.json'
    content = {'ε': list(range(99)), 'rows': [{'a': 'b' * 99}, {'a': [[]]}], 'n': {}}
    files.write_json(path, content)
    assert json.loads(path.read_text()) == content
    first, numbers, *rest = path.read_text().splitlines()
    assert (first, numbers) == ('{', f' "ε": {content["ε"]},')
    assert len(rest) == 6


def test_curves_are_means_and_ranges_where_every_seed_has_a_number():
    log = lambda *accuracies: [
        {'epoch': 2 * i, 'test_accuracy': x, **dict.fromkeys(comparison.CURVES[1:])}
        for i, x in enumerate(accuracies)
    ]
    curve = comparison.curves([log(1.0, 2.0, None), log(3.0, 4.0, 5.0)])
    found = files.jsonable(curve['test_accuracy'])
    assert found == {
        'epoch': [0, 2, 4],
        'mean': [2.0, 3.0, None],
        'low': [1.0, 2.0, None],
        'high': [3.0, 4.0, None],
    }
    assert files.jsonable(curve['sampled'])['mean'] == [None] * 3


def test_a_line_that_was_cut_short_and_later_steps_are_dropped(tmp_path):
    path = tmp_path / 'log.jsonl'
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    lines = run_log.Lines(path, keep=2)
    lines.append({'step': 5})
    assert [entry['step'] for entry in run_log.read_lines(path)] == [1, 2, 5]
    assert lines.entries == run_log.read_lines(path)


def scalars_of(path: pathlib.Path) -> list[tuple[int, str, float]]:
    """Step, name and value of the events of a directory."""
    event_pb2 = pytest.importorskip('tensorboardX.proto.event_pb2')
    (file,) = path.iterdir()
    content, scalars = file.read_bytes(), []
    while content:
        # Length, its checksum, the event, its checksum.
        end = 12 + int.from_bytes(content[:8], 'little')
        event = event_pb2.Event.FromString(content[12:end])
        scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        content = content[end + 4 :]
    return scalars


def test_tensorboard_shows_the_log_and_nothing_else(tmp_path):
    log = [
        {'step': 3, 'loss': 0.5, 'budget': None},
        {'step': 6, 'loss': 0.25, 'budget': float('nan')},
        {'step': 9, 'loss': 0.125, 'budget': 2.0},
    ]
    with run_log.Events(tmp_path / 'x') as events:
        events.append({'step': 6, 'loss': 9.0})
    # As if the first run had been interrupted, with a checkpoint of step 3.
    with run_log.Events(tmp_path / 'x', log[:1]) as events:
        for entry in log[1:]:
            events.append(entry)
    assert scalars_of(tmp_path / 'x') == [
        (3, 'loss', 0.5),
        (6, 'loss', 0.25),
        (9, 'loss', 0.125),
        (9, 'budget', 2.0),
    ]


def test_no_events_are_written_without_tensorboardx(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log.importlib.util, 'find_spec', lambda _: None)
    with run_log.Events(tmp_path / 'x') as events:
        events.append({'step': 1, 'loss': 0.5})
    assert not (tmp_path / 'x').exists()


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    settings = {
        'model': 'mlp',
        'epochs': 40,
        'checkpoint_every': 2,
        'augmentation.padding': 1,
        'methods.vsam.warmup_steps': 5,
    }
    flags = [f'--config.{name}={value}' for name, value in settings.items()]

    def start(name: str) -> subprocess.Popen:
        program = [sys.executable, '-m', 'experiments.train']
        return subprocess.Popen(
            [
                *program,
                '--config=experiments/configs/digits.py',
                f'--workdir={tmp_path / name}',
                *flags,
            ],
            cwd=processes.ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def lines(name: str) -> list[dict[str, Any]]:
        return run_log.read_lines(tmp_path / name / run_log.LOG)

    assert start('whole').wait(timeout=300) == 0
    killed = []
    # Killed at once after a line of the log, so often while saving as well.
    for target in (2, 5, 9):
        process = start('cut')
        while process.poll() is None and len(lines('cut')) < target:
            time.sleep(0.001)
        process.kill()
        killed.append(process.wait())
        assert not (tmp_path / 'cut' / run_files.RESULT).exists()
    assert killed == [-signal.SIGKILL] * 3
    process = start('cut')
    assert process.wait(timeout=300) == 0
    traces = [
        run_log.read_lines(tmp_path / name / run_log.TRACE) for name in ('whole', 'cut')
    ]
    assert traces[0] == traces[1]
    assert without_times(lines('whole')) == without_times(lines('cut'))


# --- Comparisons --------------------------------------------------------------


@pytest.fixture(scope='module')
def compared(config, tmp_path_factory) -> tuple[dict[str, Any], pathlib.Path]:
    path = tmp_path_factory.mktemp('comparison')
    summary = compare.compare(
        config,
        path,
        methods=('sgd', 'vsam'),
        seeds=(0, 1),
        timing_rounds=2,
        timing_steps=2,
    )
    return summary, path


def test_a_comparison_runs_methods_and_seeds_and_says_what_came_out(compared):
    summary, path = compared
    assert summary == json.loads((path / comparison.SUMMARY).read_text())
    for method in ('sgd', 'vsam'):
        row = summary['methods'][method]
        singles = [
            json.loads((path / method / f'seed{seed}' / run_files.RESULT).read_text())
            for seed in (0, 1)
        ]
        values = [single['test_accuracy'] for single in singles]
        assert row['test_accuracy']['values'] == values
        assert row['test_accuracy']['mean'] == pytest.approx(np.mean(values))
        assert row['seeds'] == [0, 1]
    assert summary['methods']['sgd']['relative_time']['median'] == 1
    assert summary['methods']['sgd']['sampling_rate']['mean'] == 0
    names = {'sgd/step', 'vsam/sampled', 'vsam/reuse'}
    assert set(summary['timing']['seconds_per_step']) == names


def test_finished_runs_of_a_comparison_are_not_run_again(config, compared):
    summary, path = compared
    before = {file: file.stat().st_mtime_ns for file in path.glob('*/*/result.json')}
    assert len(before) == 4
    again = compare.compare(
        config,
        path,
        methods=('sgd', 'vsam'),
        seeds=(0, 1),
        timing_rounds=2,
        timing_steps=2,
    )
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert again == summary


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'seeds': (1, 1)},
            r'compare.seeds must hold nothing twice, got \[1, 1',
        ),
        ({'methods': ('sgd', 'sgd')}, 'config.compare.methods must hold nothing twice'),
        ({'timing_rounds': 0}, 'config.compare.timing_rounds must be an integer >= 1'),
        ({'timing_steps': 0}, 'config.compare.timing_steps must be an integer >= 1'),
    ],
)
def test_a_comparison_that_would_count_a_run_twice_or_time_nothing_is_not_begun(
    config, tmp_path, change, message
):
    plan = {'methods': ('sgd',), 'seeds': (1,), 'timing_rounds': 1, 'timing_steps': 1}
    with pytest.raises(configuration.ConfigError, match=message):
        compare.compare(config, tmp_path, **{**plan, **change})


def test_shards_make_each_run_once_and_a_whole_finds_them_finished(config, tmp_path):
    settings = {
        'methods': ('sgd', 'sam'),
        'seeds': (0, 1, 2),
        'timing_rounds': 1,
        'timing_steps': 1,
    }
    short = changed(config, epochs=2)
    for index, runs in ((0, 3), (1, 6)):
        shard = shards.Shard(index, 2)
        assert not compare.compare(short, tmp_path, shard=shard, **settings)
        made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob('result.json')}
        assert len(made) == runs
    assert compare.compare(short, tmp_path, **settings)
    assert {file: file.stat().st_mtime_ns for file in made} == made


def test_methods_take_what_tuning_chose_for_them(config, tmp_path):
    file = tmp_path / 'tuning.json'
    chosen = {'sgd': {'optimizer.learning_rate': 0.02}, 'sam': {'methods.sam.rho': 0.3}}
    file.write_text(json.dumps({'name': config.name, 'chosen': chosen}))
    assert tuning.load_chosen(file, config.name) == chosen
    with pytest.raises(configuration.ConfigError, match="must be of 'x', but"):
        tuning.load_chosen(file, 'x')
    with pytest.raises(configuration.ConfigError, match='a file of experiments'):
        tuning.load_chosen(tmp_path / 'none.json', config.name)
    summary = compare.compare(
        changed(config, epochs=2),
        tmp_path,
        methods=('sgd', 'sam'),
        seeds=(0,),
        timing_rounds=1,
        timing_steps=1,
        chosen=chosen,
    )
    assert summary['methods']['sam']['settings']['rho'] == 0.3
    runs = {
        method: json.loads((tmp_path / method / 'seed0' / 'result.json').read_text())
        for method in chosen
    }
    rates = [run['config']['optimizer']['learning_rate'] for run in runs.values()]
    assert rates == [0.02, config.optimizer.learning_rate]


@pytest.mark.parametrize('text', ['2/2', '1', '-1/2', 'a/b', '0/0'])
def test_a_shard_that_is_none_says_what_is_allowed(text):
    with pytest.raises(configuration.ConfigError, match=f"index/count .*got '{text}'"):
        shards.parse(text)
    assert shards.parse('') == shards.Shard(0, 1)
    assert shards.parse('1/3') == shards.Shard(1, 3)


def test_differences_are_those_of_runs_of_the_same_seed():
    # By hand: differences 1, 2, 3 have mean 2, deviation 1, and t(2; 0.975) = 4.302653.
    found = statistics.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    half = 4.302653 / np.sqrt(3)
    assert found == pytest.approx({'mean': 2, 'low': 2 - half, 'high': 2 + half})
    single = statistics.paired([2.0], [1.0])
    assert single == {'mean': 1.0, 'low': None, 'high': None}
    assert tables.points({'mean': -0.012, 'low': -0.02, 'high': 0.004}) == (
        '−1.2 [−2.0, +0.4]'
    )


def test_the_change_of_the_psf_norm_is_that_between_samples():
    norms = np.asarray([1.0, 1.0, 1.5, 1.5, 0.75, np.nan])
    sampled = np.asarray([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    # 1 → 1.5 → 0.75: changes of one half each.
    assert change_of_norm(norms, sampled) == pytest.approx(0.5)
    # SGD has no plan; one sample has none before it.
    assert np.isnan(change_of_norm(norms, np.full(6, np.nan)))
    assert np.isnan(change_of_norm(norms[:2], sampled[:2]))


def test_figures_join_comparisons_of_several_networks(compared, tmp_path):
    summary, path = compared
    loaded = comparison.load([str(path), str(path / comparison.SUMMARY)])
    assert loaded == [summary, summary]
    for file in figures.write(loaded, tmp_path):
        assert file.read_bytes().startswith(b'\x89PNG')
    coarse = copy.deepcopy(summary)
    coarse['config']['quantization']['bits'] = 2
    (file,) = figures.write([summary, coarse], tmp_path)
    assert file.name == 'bits.png'
    assert file.read_bytes().startswith(b'\x89PNG')
    with pytest.raises(configuration.ConfigError, match='a workdir of experiments'):
        comparison.load([str(tmp_path)])


def test_costs_weigh_sampled_and_reuse_steps_within_a_round():
    times = {
        'seconds_per_step': {
            'sgd/step': [1.0, 2.0, 4.0],
            'sam/sampled': [2.0, 4.0, 8.0],
            'vsam/sampled': [2.0, 4.0, 8.0],
            'vsam/reuse': [1.0, 2.0, 4.0],
        }
    }
    cost = lambda method, rate: comparison.relative_cost(method, rate, times, 'sgd')
    assert cost('sgd', 0.0) == {'median': 1, 'low': 1, 'high': 1}
    assert cost('sam', 1.0) == {'median': 2, 'low': 2, 'high': 2}
    assert cost('vsam', 0.25) == {'median': 1.25, 'low': 1.25, 'high': 1.25}


def test_the_report_is_a_table_and_two_figures(compared, tmp_path):
    summary, _ = compared
    files = comparison.write_report(summary, tmp_path)
    assert [file.suffix for file in files] == ['.md', '.png', '.png']
    lines = files[0].read_text().splitlines()
    assert len([line for line in lines if line.startswith('|')]) == 4 + 3
    accuracy = summary['methods']['vsam']['test_accuracy']
    assert f'{100 * accuracy["mean"]:.1f} ± {100 * accuracy["sd"]:.1f}' in lines[3]
    assert lines[3].startswith('| vSAM |')
    for file in files[1:]:
        assert file.read_bytes().startswith(b'\x89PNG')


def test_tuning_judges_on_the_validation_examples_alone(config, tmp_path):
    tuning = tune.tune(
        changed(config, epochs=2),
        tmp_path,
        seeds=(100, 101),
        grid=(('sgd', 'optimizer.learning_rate', (1e-4, 0.05), {'label_noise': 0.0}),),
    )
    trials = tuning['tried']['sgd']
    assert [trial['settings'] for trial in trials] == [
        {'optimizer.learning_rate': value, 'label_noise': 0.0} for value in (1e-4, 0.05)
    ]
    means = [trial['validation_accuracy']['mean'] for trial in trials]
    assert tuning['chosen'] == {'sgd': trials[int(np.argmax(means))]['settings']}
    for trial, value in zip(trials, (1e-4, 0.05), strict=True):
        runs = tmp_path / 'sgd' / f'optimizer.learning_rate={value},label_noise=0.0'
        accuracies = [
            json.loads((runs / f'seed{seed}' / run_files.RESULT).read_text())
            for seed in (100, 101)
        ]
        assert trial['validation_accuracy']['values'] == [
            accuracy['validation_accuracy'] for accuracy in accuracies
        ]
    assert 'test_accuracy' not in json.dumps(trials)


def test_the_best_settings_are_tried_with_further_seeds(config, tmp_path):
    settings = {
        'seeds': (100,),
        'grid': (('sgd', 'optimizer.learning_rate', (1e-4, 0.02, 0.05), {}),),
        'finalists': 2,
        'final_seeds': (101,),
    }
    short = changed(config, epochs=2)
    # A shard makes its runs of the first round, and knows of no finalists before the
    # other one has made its own.
    for index, runs in ((0, 2), (1, 4), (0, 5)):
        shard = shards.Shard(index, 2)
        assert not tune.tune(short, tmp_path, shard=shard, **settings)
        assert len(list(tmp_path.rglob('result.json'))) == runs
    tuning = tune.tune(short, tmp_path, **settings)
    trials = tuning['tried']['sgd']
    values = [trial['validation_accuracy']['values'] for trial in trials]
    # Those two that were best with the first seed, and no other.
    best = sorted(range(3), key=lambda place: values[place][0], reverse=True)[:2]
    assert [len(value) for value in values] == [1 + (n in best) for n in range(3)]
    winner = max(best, key=lambda place: np.mean(values[place]))
    assert tuning['chosen'] == {'sgd': trials[winner]['settings']}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'seeds': ()}, r'at least one value in its grid and one seed, got 1 .* \[\]'),
        ({'seeds': (100, 100)}, 'config.tune.seeds and final_seeds must hold nothing'),
        ({'final_seeds': (100,), 'finalists': 1}, 'must hold nothing twice'),
        ({'finalists': -1}, 'config.tune.finalists must be an integer >= 0, got -1'),
        ({'grid': ()}, 'at least one value in its grid and one seed, got 0 values'),
        ({'grid': (('adam', 'epochs', (1,), {}),)}, "grid must be one of.*got 'adam'"),
    ],
)
def test_tuning_that_could_not_choose_is_not_begun(config, tmp_path, change, message):
    plan = {'seeds': (100,), 'grid': (('sgd', 'epochs', (1,), {}),)}
    with pytest.raises(configuration.ConfigError, match=message):
        tune.tune(config, tmp_path, **{**plan, **change})


def test_settings_with_which_training_diverges_are_judged_like_others():
    run = {'validation_accuracy': 0.1, 'sampling_rate': 1.0, 'log': [{'loss': None}]}
    assert np.isnan(tune._Trial('sam', {}, [run]).judged()['training_loss'])


def test_seeds_that_are_reported_are_not_tuned_on(config, tmp_path):
    reported = config.compare.seeds[0]
    with pytest.raises(configuration.ConfigError, match=rf'both hold \[{reported}\]'):
        tune.tune(config, tmp_path, seeds=(reported, 100), grid=())


def test_the_digits_configuration_is_complete_and_its_seeds_are_apart():
    config: Any = digits.get_config()
    configuration.check(config)
    assert not set(config.tune.seeds) & set(config.compare.seeds)
    assert len(config.compare.seeds) >= 5
    for method in config.methods:
        registry.create(method, config.methods[method], config.optimizer, TASK)


@pytest.mark.parametrize(
    ('config', 'num_classes'),
    [(cifar10.get_config(), 10), (cifar100.get_config(), 100)],
    ids=['cifar10', 'cifar100'],
)
def test_the_configurations_of_cifar_are_the_published_recipe(config, num_classes):
    configuration.check(config)
    assert not set(config.tune.seeds) & set(config.compare.seeds)
    for name in config.models:
        zoo.create(name, config.models[name], num_classes)
    for name in config.methods:
        registry.create(name, config.methods[name], config.optimizer, TASK)
    assert set(config.compare.methods) <= set(config.methods)
    assert config.data.name == config.name
    assert config.data.statistics in sources.NORMALIZATIONS
    # 200 epochs of ⌊50,000 / 128⌋ steps; warm-up of three of them.
    assert (config.epochs, config.batch_size) == (200, 128)
    assert config.methods.vsam.warmup_steps == 3 * (50_000 // config.batch_size)
    assert config.optimizer.learning_rate == 0.05
    assert config.optimizer.weight_decay == 1e-3


def test_the_short_schedule_differs_in_what_it_says():
    config: Any = cifar100.get_config('short')
    configuration.check(config)
    changes = configuration.differences(
        configuration.plain(cifar100.get_config()), configuration.plain(config)
    )
    names = {change.split(' is ')[0] for change in changes}
    assert names == {
        'config.name',
        'config.epochs',
        'config.data.validation',
        'config.compare.methods',
        *(f'config.models.{model}.dtype' for model in config.models),
    }
    with pytest.raises(ValueError, match="published, short; got 'x'"):
        cifar100.get_config('x')


def test_where_the_data_is_is_no_setting_of_a_run():
    here, there = cifar100.get_config(), cifar100.get_config()
    there.data.update({'data_dir': '/somewhere', 'cache_dir': '/else'})
    assert configuration.of_run(here) == configuration.of_run(there)
    assert '/somewhere' not in json.dumps(configuration.plain(there))


@pytest.mark.parametrize('regime', cifar100_small.REGIMES)
def test_the_small_configurations_are_complete(regime):
    config: Any = cifar100_small.get_config(regime)
    configuration.check(config)
    assert not set(config.tune.seeds) & set(config.compare.seeds)
    zoo.create(config.model, config.models[config.model], 20)
    for method, field, values, others in config.tune.grid:
        for value in values:
            trial = {field: value, **dict(others)}
            setting: Any = configuration.with_values(config, trial)
            registry.create(method, setting.methods[method], setting.optimizer, TASK)


def test_an_unknown_regime_is_named():
    with pytest.raises(ValueError, match="noisy, underfitted, few; got 'x'"):
        cifar100_small.get_config('x')
