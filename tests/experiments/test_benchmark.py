"""The benchmark measures what it says it measures."""

import functools
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import vsam_jax
from experiments.benchmark import (
    jax_steps,
    problems,
    report,
    rounds,
    steps,
    sweeps,
    variants,
    whole_runs,
)
from experiments.models import zoo
from experiments.models.networks import vit
from experiments.models.networks.resnet import ResNet
from experiments.models.networks.wide_resnet import WideResNet
from vsam_jax import convolutions
from vsam_jax._state import only_state

TINY = problems.PROBLEMS['tiny']()


@functools.cache
def measured() -> dict[str, Any]:
    with mock.patch.object(rounds, '_SECONDS', 0):
        return steps.measure(
            TINY, number=2, steps=1, torch_runners=None, advance=lambda: None
        )


@pytest.mark.slow
def test_every_variant_is_timed_and_planned_steps_hold_no_conditional():
    rows = measured()['steps']
    assert list(rows) == ['SGD', *list(variants.VARIANTS)[1:]]
    for name, row in rows.items():
        assert (row['conditionals'] > 0) == ('traced' in name)
        assert row['times_base']['median'] > 0
        assert row['compile_seconds'] > 0
        assert row['rounds'] == 2
    assert rows['SGD']['times_base']['median'] == 1
    assert rows[variants.OPTAX_SAM]['times_optax_sam']['median'] == 1


def test_a_second_gradient_is_in_the_steps_that_should_have_one():
    rows = measured()['steps']
    base = rows['SGD']['flops']
    # What vSAM adds (statistics, plans) is much beside a network as small as this.
    assert rows[variants.OPTAX_SAM]['flops'] == pytest.approx(2 * base, rel=0.1)
    assert rows['optax.contrib.sam, transparent']['flops'] > 2 * base
    added = rows[variants.SAMPLED]['flops'] - rows[variants.REUSE]['flops']
    assert added > base
    # A conditional does not count as both of its branches.
    assert rows[variants.TRACED_SAMPLED]['flops'] == rows[variants.SAMPLED]['flops']
    assert rows[variants.TRACED_REUSE]['flops'] == rows[variants.REUSE]['flops']
    in_five = rows['vSAM planned, one step in 5 sampled']['flops']
    assert in_five == pytest.approx(rows[variants.REUSE]['flops'] + added / 5)


@pytest.mark.slow
def test_a_step_written_by_hand_has_the_convolutions_of_jax(monkeypatch):
    # As little as that is in portions, so that there are loops in the builder's step.
    monkeypatch.setattr(convolutions, '_cache', lambda: 1)
    problem = problems.PROBLEMS['tiny_convolutions']()
    runners = jax_steps.runners(problem, (variants.BASE, variants.BY_HAND))
    texts = [runner._calls[0].executable.as_text() for runner in runners.values()]
    built, by_hand = (text.count(' while(') for text in texts)
    assert built > by_hand
    # Not those of one round of a loop.
    built, by_hand = (runner.flops for runner in runners.values())
    assert built == by_hand
    states = [runner.run(1) and runner._session.state for runner in runners.values()]
    chex.assert_trees_all_close(
        *(state.params for state in states), rtol=1e-4, atol=1e-6
    )


def test_a_cycle_makes_the_steps_that_it_says():
    session = jax_steps.Session(TINY, variants.vsam('SGD', warmup_steps=0))
    runner = jax_steps.JaxRunner(
        session, variants.VARIANTS['vSAM planned, one step in 5 sampled']
    )
    runner.run(2)
    state = only_state(session.state)
    assert (int(state.step), int(state.num_samples)) == (2 * runner.steps, 2)


def test_optax_sam_is_the_same_method_in_both_modes():
    states = []
    for name in (variants.OPTAX_SAM, 'optax.contrib.sam, transparent'):
        variant = variants.VARIANTS[name]
        session = jax_steps.Session(TINY, variants.OPTIMIZERS[variant.optimizer]('SGD'))
        jax_steps.JaxRunner(session, variant).run(3)
        states.append(session.state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *states)


class Fake:
    """A runner on a clock of its own; slower by ``drift`` each time it runs."""

    steps = 1

    def __init__(self, seconds: float, clock: dict[str, float]):
        self.seconds = seconds
        self.clock = clock

    def run(self, cycles: int) -> float:
        return self.seconds * self.clock['slower']


def test_what_slows_a_round_down_touches_no_ratio_and_slow_ones_run_seldom():
    clock = {'slower': 1.0}

    def advance() -> None:
        clock['slower'] *= 3

    runners = {name: Fake(s, clock) for name, s in (('a', 1), ('b', 2), ('c', 50))}
    seconds = rounds.interleaved(runners, 5, 1, advance)
    assert rounds.ratios(seconds, 'b', 'a') == {'median': 2, 'low': 2, 'high': 2}
    assert rounds.ratios(seconds, 'c', 'a')['median'] == 50
    assert len(seconds['b']) == 5
    assert len(seconds['c']) == 3


def test_a_slow_first_call_makes_no_slow_runner():
    clock = {'slower': 1.0}

    class Cold(Fake):
        def run(self, cycles: int) -> float:
            seconds, self.seconds = self.seconds, 1e-3
            return seconds

    runners = {'a': Fake(1e-3, clock), 'b': Cold(0.1, clock)}
    seconds = rounds.interleaved(runners, 5, 1)
    assert rounds.ratios(seconds, 'b', 'a')['median'] == 1
    assert len(seconds['b']) == 5


def test_whole_runs_count_windows_and_samples():
    run = whole_runs.measure(TINY, 'vSAM, K = 10', windows=3, chunk=10)
    # One window comes before those that are timed.
    assert (run['windows'], run['steps'], run['plan_reads']) == (3, 30, 4)
    assert run['sampling_rate'] == pytest.approx(0.1)
    assert all(run[name]['median'] > 0 for name in ('times_base', 'times_expected'))


def test_points_of_a_sweep_differ_in_what_is_swept():
    for name, points in sweeps.points(largest=20_000).items():
        fields = {
            'parameters': [point.problem.num_parameters for point in points],
            'batch_size': [point.problem.batch_size for point in points],
            'window': [point.window for point in points],
        }
        assert len(set(fields.pop(name))) == len(points)
        assert all(len(set(values)) == 1 for values in fields.values())
    sizes = [p.problem.num_parameters for p in sweeps.points(10**8)['parameters']]
    np.testing.assert_allclose(sizes, [1e5, 1e6, 1e7, 1e8], rtol=0.03)


def test_tables_and_figure_are_made_from_the_json_alone(tmp_path):
    problem = measured()
    point = {'parameters': 442, 'batch_size': 8, 'window': 50, **problem}
    content = {
        'problems': {'tiny': problem},
        'sweeps': {'parameters': [point, {**point, 'parameters': 900}]},
        'whole_runs': {},
    }
    for file in report.write(content, tmp_path / 'benchmark.json'):
        assert file.stat().st_size > 0
    text = (tmp_path / 'benchmark.md').read_text()
    cost = problem['steps'][variants.REUSE]['times_base']['median']
    assert f'| {variants.REUSE} | {cost:.2f} (' in text
    # A column of which nothing was measured is left out.
    assert 'Examples/s' in text
    assert 'Of the peak' not in text


def test_an_overview_has_a_column_per_network_and_takes_the_later_cost():
    row = lambda cost, **kwargs: {
        'times_base': {'median': cost, 'low': cost, 'high': cost},
        **kwargs,
    }
    problem = {'title': 'net, batch 8', 'base': 'SGD'}
    first = {'SGD': row(1, examples_per_second=2000), 'SAM': row(2)}
    first['PyTorch SGD'] = row(1, examples_per_second=None)
    contents = [
        {'problems': {'a': {**problem, 'steps': first}}},
        {'problems': {'a': {**problem, 'steps': {'SAM': row(3)}}}},
        {'problems': {'b': {**problem, 'title': 'other', 'steps': {'SAM': row(4)}}}},
    ]
    header, rows = report.overview(contents)
    assert header == ['Step', 'net', 'other']
    assert rows == [
        ['base optimizer', '1.00 (1.00–1.00)', '–'],
        ['SAM', '3.00 (3.00–3.00)', '4.00 (4.00–4.00)'],
        ['PyTorch base optimizer', '1.00 (1.00–1.00)', '–'],
        ['base optimizer, examples/s', '2,000', '–'],
    ]


def test_the_floor_of_a_sample_is_sam_with_a_memory_that_stays_finite():
    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0])
    grad_fn = lambda w: 3.0 * w
    floor = variants.storing_sam('SGD')
    sam = optax.chain(vsam_jax.sam(variants.RHO), variants.base('SGD'))
    found, state = floor.update(grads, floor.init(params), params, grad_fn=grad_fn)
    wanted, _ = sam.update(grads, sam.init(params), params, grad_fn=grad_fn)
    chex.assert_trees_all_close(found, wanted, rtol=1e-6)
    psf = state[0]
    assert bool(jnp.all(psf != 0))
    _, state = floor.update(grads, state, params, grad_fn=lambda w: w / 0)
    chex.assert_trees_all_equal(state[0], psf)


def test_small_and_huge_pages_stand_side_by_side():
    def content(rate: float, cost: float) -> dict[str, Any]:
        quartiles = {'median': cost, 'low': cost, 'high': cost}
        steps = {
            'SGD': {'examples_per_second': rate},
            variants.SAMPLED: {'times_optax_sam': quartiles},
            variants.TRACED_REUSE: {'times_base': {**quartiles, 'median': cost / 2}},
        }
        problem = {'title': 'net, batch 8', 'base': 'SGD', 'steps': steps}
        return {'problems': {'a': problem}}

    _, rows = report.of_pages(content(1000, 4), content(2000, 3))
    assert rows == [
        [
            'net',
            '1,000',
            '2,000',
            '4.00 (4.00–4.00)',
            '3.00 (3.00–3.00)',
            '2.00 (4.00–4.00)',
            '1.50 (3.00–3.00)',
        ]
    ]


def small_networks() -> dict[str, problems.Problem]:
    shape = (2, 16, 16, 3)
    resnet = problems.images('', ResNet(10, (1, 1, 1), 4, stem_stride=2), 2)
    wide = problems.images('', WideResNet(10, depth=10, width=1), 2)
    transformer = vit.ViT(num_classes=10, depth=1, width=24)
    return {
        'mlp': TINY,
        'resnet': resnet._replace(shape=shape),
        'wide_resnet': wide._replace(shape=shape),
        'transformer': problems.Problem('', transformer, shape),
    }


def as_in_pytorch(problem: problems.Problem, params: Any) -> list[np.ndarray]:
    """Flax's parameters in the layouts and the order of the PyTorch module."""
    flat = traverse_util.flatten_dict(params)
    paths = zoo.parameter_paths(problem.model, problem.shape[1:])
    found: list[np.ndarray] = []
    for path in paths:
        values, projection = np.asarray(flat[path]), path[-2:-1]
        if projection in (('query',), ('key',), ('value',)):
            # One layer there, made when the last of the three is met.
            if projection == ('value',) and path[-1] == 'bias':
                parts = [(*path[:-2], part) for part in ('query', 'key', 'value')]
                width = params['LayerNorm_0']['scale'].size
                kernels = [flat[*part, 'kernel'].reshape(width, -1).T for part in parts]
                found.append(np.concatenate(kernels))
                found.append(np.concatenate([flat[*p, 'bias'].ravel() for p in parts]))
        elif projection == ('out',) and path[-1] == 'kernel':
            found.append(values.reshape(-1, values.shape[-1]).T)
        elif path == ('positions',):
            found.insert(0, values)
        else:
            layouts = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
            found.append(values.transpose(layouts[values.ndim]))
    return found


@pytest.mark.parametrize('name', list(small_networks()))
def test_networks_in_pytorch_are_those_in_jax(name):
    torch = pytest.importorskip('torch')
    from experiments.benchmark import torch_networks

    problem = small_networks()[name]
    network = torch_networks.port(problem.model, problem.shape)
    inputs, _ = problem.batch()
    init = jax.jit(functools.partial(problem.model.init, train=True))
    variables = init(jax.random.key(0), inputs)
    ours = as_in_pytorch(problem, variables['params'])
    with torch.no_grad():
        for parameter, values in zip(network.parameters(), ours, strict=True):
            parameter.copy_(torch.from_numpy(values.copy()))
        given = torch.from_numpy(inputs)
        given = given.permute(0, 3, 1, 2) if given.ndim == 4 else given
        theirs = network.train()(given).numpy()
    apply: Any = functools.partial(
        problem.model.apply, train=True, mutable=['batch_stats']
    )
    expected, _ = jax.jit(apply)(variables, inputs)
    np.testing.assert_allclose(theirs, expected, atol=2e-4)


@pytest.mark.parametrize('name', [*problems.ON_CPU, *problems.ON_ACCELERATOR])
def test_networks_in_pytorch_have_as_many_parameters(name):
    torch = pytest.importorskip('torch')
    from experiments.benchmark import torch_networks

    problem = problems.PROBLEMS[name]()
    with torch.device('meta'):
        network = torch_networks.port(problem.model, problem.shape)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == problem.num_parameters


def test_looksam_in_pytorch_can_skip_its_second_passes():
    pytest.importorskip('torch')
    pytest.importorskip('pytorch_optimizer')
    from experiments.benchmark import torch_steps

    gradients = {}
    for name, method in torch_steps.METHODS.items():
        runner = torch_steps.TorchRunner(TINY, method)
        calls = []
        gradient = runner._gradient
        runner._gradient = lambda g=gradient, c=calls: (c.append(1), g())[1]
        runner.run(1)
        gradients[name] = len(calls) / method.steps
    assert list(gradients.values()) == [1, 2, 2, 1.2]
