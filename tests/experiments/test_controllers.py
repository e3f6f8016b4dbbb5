"""The candidates for sampling and reuse, and the program that compares them."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from experiments import tune
from experiments.common import configuration
from experiments.common.shards import Shard
from experiments.configs.digits_tasks import TASKS
from experiments.methods import registry, titles
from experiments.studies.controllers import candidates, measure, report
from experiments.studies.controllers import config as study
from experiments.studies.noise import __main__ as noise
from tests.experiments.small import TASK, TINY
from vsam_jax._state import only_state


def walk(tx: Any, steps: int, loss: Any = None) -> dict[str, np.ndarray]:
    """What a transformation does with mini-batches of its own, step by step."""
    params = [jnp.linspace(-0.5, 0.5, 6)]
    state = tx.init(params)
    inputs = np.random.default_rng(0).standard_normal((steps, 12, 6), np.float32)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        gradient = lambda w: jax.grad(loss or noisy)(w, batch)
        grads = gradient(params)
        direction, state = tx.update(grads, state, params, grad_fn=gradient)
        found = only_state(state)
        added = optax.tree.sub(direction, grads)
        # The direction is g + weight · memory.
        weight = optax.tree.vdot(added, found.psf) / optax.tree.norm(
            found.psf, squared=True
        )
        params = jax.tree.map(lambda w, u: w - 0.05 * u, params, direction)
        return params, state, (found.sampled, weight, found.budget)

    rows = []
    for batch in inputs:
        params, state, row = step(params, state, batch)
        rows.append(jax.device_get(row))
    sampled, weight, budget = map(np.asarray, zip(*rows, strict=True))
    return {'sampled': sampled, 'weight': weight, 'budget': budget, 'state': state}


def noisy(params: Any, inputs: jax.Array) -> jax.Array:
    """A loss whose mini-batches have little in common."""
    return jnp.mean((jnp.tanh(inputs @ params[0]) - 0.5) ** 2)


def bowl(params: Any, batch: Any) -> jax.Array:
    """So far from its minimum that g, and with it s, hardly turns."""
    del batch
    return 0.01 * jnp.sum((params[0] - 5) ** 2)


def test_every_third_step_is_sampled_and_its_psf_decays():
    seen = walk(candidates.periodic(0.3), 9)
    np.testing.assert_array_equal(np.flatnonzero(seen['sampled']), [0, 3, 6])
    np.testing.assert_allclose(seen['weight'], [1, 0.7, 0.49] * 3, rtol=1e-3)


def test_weights_may_be_scaled_to_a_mean_of_one():
    weights = walk(candidates.periodic(0.3, mean_one=True), 9)['weight']
    np.testing.assert_allclose(np.mean(weights), 1, rtol=1e-3)
    np.testing.assert_allclose(weights[1] / weights[0], 0.7, rtol=1e-3)


def test_an_average_of_psfs_moves_by_the_share_that_it_is_told():
    rule = candidates.MovingAverage(decay=1.0, reuse_steps=6, average=0.75)
    zeros, ones = jnp.zeros(3), jnp.ones(3)
    memory, _ = rule.remember(zeros, 2 * ones, zeros)
    np.testing.assert_allclose(memory, 2 * ones)  # The first is its own average.
    memory, _ = rule.remember(zeros, 6 * ones, memory)
    np.testing.assert_allclose(memory, 3 * ones)


def test_samples_at_random_are_as_many_as_asked():
    seen = walk(candidates.periodic(0.3, at_random=True), 120)
    assert 24 <= seen['sampled'].sum() <= 56
    assert len(set(np.diff(np.flatnonzero(seen['sampled'])))) > 1


def test_the_published_controller_may_start_at_another_rate():
    tx = candidates.from_rate(0.3, window=10, warmup_steps=0, first_rate=0.5)
    seen = walk(tx, 10)
    # Nothing was measured before the first window.
    assert seen['sampled'].sum() == 5


@pytest.mark.parametrize(
    ('settings', 'shares'),
    [
        ({'start': 0.5}, [0, 0, 1, 1]),
        ({'first_rate': 0.2, 'last_rate': 1.0}, [0.2, 0.4, 0.6, 0.8]),
    ],
)
def test_the_rate_follows_its_schedule(settings, shares):
    tx = candidates.scheduled(0.3, num_steps=80, window=20, **settings)
    sampled = walk(tx, 80)['sampled'].reshape(4, 20)
    np.testing.assert_allclose(sampled.mean(1), shares, atol=1e-6)


def test_samples_of_psfs_that_do_not_go_stale_become_few():
    seen = walk(candidates.measured(0.3, tolerance=0.9, decay=1.0), 84, bowl)
    np.testing.assert_allclose(seen['budget'][-1], 2.1, rtol=1e-5)
    assert seen['state'].error < 0.1


def test_samples_that_are_always_stale_become_many():
    seen = walk(candidates.measured(0.3, tolerance=1e-3), 84)
    np.testing.assert_allclose(seen['budget'][-1], 8.4, rtol=1e-5)


def test_a_fitted_weight_is_one_where_psfs_repeat_and_less_where_they_are_noise():
    repeated = walk(candidates.measured(0.3, fitted=True), 30, bowl)['state']
    noisy = walk(candidates.measured(0.3, fitted=True), 30)['state']
    np.testing.assert_allclose(repeated.scale, 1, atol=0.01)
    assert noisy.scale < 0.9


@pytest.mark.parametrize('task', [*TASKS, 'cifar'])
def test_every_task_is_complete(task):
    config = study.get_config(task)
    configuration.check(config)
    tuned = list(dict.fromkeys(method for method, *_ in config.tune.grid))
    assert tuned == list(config.compare.methods)
    for name in tuned:
        registry.create(name, config.methods[name], config.optimizer, TASK)
    assert len({titles.title(name, config.methods[name]) for name in tuned}) == len(
        tuned
    )


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"task must be one of mlp_200, .*; got 'no'"):
        study.get_config('no')


def test_noise_raises_the_published_budget_the_more_the_wider_it_is():
    summary = noise.measure(sigmas=(0.0, 0.5), window=10, seeds=3)
    still, moved = summary['budgets'].values()
    assert [row['median'] for row in still.values()] == [1.0] * len(noise.WINDOWS)
    medians = [row['median'] for row in moved.values()]
    assert medians == sorted(medians)
    assert medians[-1] > 2


@pytest.fixture(scope='module')
def config() -> ml_collections.ConfigDict:
    """A task that takes no time."""
    config = configuration.with_values(
        study.get_config('mlp_200'), {**TINY, 'epochs': 2}
    )
    with config.unlocked():
        config.compare.methods = ('sam', 'every_third')
        config.compare.seeds = (20, 21)
        rho = 'methods.{}.rho'.format
        config.tune = {
            'seeds': (200,),
            'grid': (
                ('sam', rho('sam'), (0.25,), {'methods.sam.optimizer': {}}),
                ('every_third', rho('every_third'), (0.5,), {}),
            ),
        }
    return config


@pytest.mark.slow
def test_candidates_are_run_with_their_own_settings_and_with_those_of_sam(
    config, tmp_path
):
    tuning = tune.tune(config, tmp_path / 'tuning', **config.tune)
    plan = {
        'methods': config.compare.methods,
        'seeds': config.compare.seeds,
        'tuning': tuning,
    }
    # A part reports nothing; the whole makes what is left.
    assert not measure.measure(config, tmp_path, **plan, shard=Shard(0, 2))
    summary = measure.measure(config, tmp_path, **plan)
    assert json.loads((tmp_path / measure.SUMMARY).read_text()) == summary
    third = summary['methods']['every_third']
    assert third['title'] == 'every 3rd, β = 0.7'
    assert 'as_sam' not in summary['methods']['sam']
    rhos = {
        kind: json.loads(path.read_text())['config']['methods']['every_third']['rho']
        for kind, path in {
            'own': tmp_path / 'every_third/seed20/result.json',
            'as_sam': tmp_path / 'every_third_as_sam/seed20/result.json',
        }.items()
    }
    assert rhos == {'own': 0.5, 'as_sam': 0.25}
    sam = summary['methods']['sam']['own']
    assert sam['minus_sam'] == {'mean': 0, 'low': 0, 'high': 0}
    for kind in rhos:
        expected = np.mean(third[kind]['test_accuracy']['values']) - np.mean(
            sam['test_accuracy']['values']
        )
        assert third[kind]['minus_sam']['mean'] == pytest.approx(expected, abs=1e-6)
    assert third['own']['sampling_rate']['mean'] == pytest.approx(2 / 6)
    header, rows = measure.rows_of(summary)
    assert {len(row) for row in rows} == {len(header)}


def test_a_method_that_was_not_tuned_is_named(config, tmp_path):
    with pytest.raises(configuration.ConfigError, match='what was tuned'):
        measure.measure(
            config,
            tmp_path,
            methods=('sam', 'late'),
            seeds=(20,),
            tuning={'chosen': {'sam': {}}, 'tried': {}},
        )


def test_the_base_optimizer_may_be_adamw(config):
    chosen = configuration.with_values(config, {'optimizer.weight_decay': 0.0})
    with chosen.unlocked():
        chosen.optimizer = {'name': 'adamw', 'learning_rate': 0.1}
    tx = registry.create('sgd', {}, chosen.optimizer, TASK).tx
    params = {'w': jnp.ones(3)}
    updates, _ = tx.update({'w': jnp.array([5.0, -3.0, 0.1])}, tx.init(params), params)
    np.testing.assert_allclose(updates['w'], [-0.1, 0.1, -0.1], rtol=1e-4)
    with pytest.raises(configuration.ConfigError, match=r'config\.optimizer\.name'):
        registry.create('sgd', {}, {**chosen.optimizer, 'name': 'no'}, TASK)


def made_up(name: str, steps: int, **minus_sam: float) -> dict[str, Any]:
    """What the report reads of a task, with made-up numbers."""
    spread = lambda mean: {'mean': mean, 'sd': 0.01, 'values': [mean, mean]}
    method = lambda name, minus: {
        'title': name,
        'tried': [
            {
                'settings': {f'methods.{name}.rho': rho, 'optimizer.rate': rate},
                'validation_accuracy': spread(0.5 + rho * rate),
            }
            for rho in (0.5, 1.0)
            for rate in (0.1, 0.2)
        ],
        **{
            kind: {
                'test_accuracy': spread(0.5 + minus),
                'minus_sam': {
                    'mean': minus,
                    'low': minus - 0.01,
                    'high': minus + 0.01,
                },
                'sampling_rate': spread(0.3),
            }
            for kind in (('own',) if name == 'sam' else ('own', 'as_sam'))
        },
    }
    return {
        'name': name,
        'num_steps': steps,
        'seeds': [1, 2],
        'tuning_seeds': [0],
        'methods': {key: method(key, minus) for key, minus in minus_sam.items()},
        'config': {'label_noise': 0.4, 'model': 'mlp', 'data': {'name': 'digits'}},
        'commands': ['python -m one'],
        'versions': {'jax': '1'},
        'device': {'platform': 'cpu', 'cpu_cores': 2, 'machine': 'x'},
    }


def test_the_report_joins_tasks_and_leaves_out_what_did_not_take_part(tmp_path):
    few = made_up('few', 200, sam=0.0, vsam=-0.05)
    many = made_up('many', 2000, sam=0.0, vsam=0.02, late=-0.3)
    for each in (many, few):
        (tmp_path / f'{each["name"]}.json').write_text(json.dumps(each))
    (tmp_path / 'noise.json').write_text('{"budgets": {}}')
    reports = report.load(tmp_path)
    assert [each['name'] for each in reports] == ['few', 'many']
    header, rows = report.rows_of(reports, 'own')
    assert header[2] == 'digits, mlp, 200 steps, 40 % wrong'
    assert rows == [
        ['sam', '0.30', '50.0 ± 1.0', '50.0 ± 1.0'],
        ['vsam', '0.30', '−5.0 [−6.0, −4.0]', '+2.0 [+1.0, +3.0]'],
        ['late', '0.30', '', '−30.0 [−31.0, −29.0]'],
    ]
    table, *figures, summary = report.write(reports, tmp_path)
    assert 'python -m one' in table.read_text()
    assert summary.read_text().startswith('| Task |')
    assert all(file.read_bytes().startswith(b'\x89PNG') for file in figures)


def test_a_curve_over_rho_takes_the_best_of_what_else_was_tuned():
    tried = made_up('any', 1, vsam=0.0)['methods']['vsam']['tried']
    rhos, means, values = report.curve('vsam', tried)
    assert rhos == [0.5, 1.0]
    np.testing.assert_allclose(means, [60, 70])
    assert [len(seeds) for seeds in values] == [2, 2]


def test_a_directory_without_reports_is_named(tmp_path):
    with pytest.raises(configuration.ConfigError, match='workdir must hold files'):
        report.load(tmp_path)
