"""Learned step sizes: the formulas, quantized networks, whole numbers, training."""

import functools
import json
import math
import operator
import shutil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from experiments.common import configuration, progress
from experiments.configs import digits
from experiments.documents import EXPERIMENTS
from experiments.methods import registry
from experiments.models import layer_inputs, lsq, quantization, zoo
from experiments.models.networks.layers import logits, norm
from experiments.models.quantization import QuantizedOperands
from experiments.studies.quantization import __main__ as export
from experiments.studies.quantization import cifar100_small, integers
from experiments.studies.quantization import digits as quantized_digits
from experiments.training import experiment, run_files
from experiments.training.loop import train
from tests import problems
from tests.experiments.small import QUICK, SMALL, TASK, changed, tiny_digits

BITS = (2, 3, 4, 8)
IMAGE = (8, 8, 1)


# --- The formulas, against NumPy ----------------------------------------------


def reference(x: np.ndarray, s: float, bits: int, signed: bool, count: int) -> Any:
    """x̄ and its derivatives with respect to x and s, element by element."""
    low = -(2 ** (bits - 1)) if signed else 0
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    output, by_x, by_s = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    for i, element in np.ndenumerate(x):
        v = element / s
        if v <= low:
            output[i], by_x[i], by_s[i] = low * s, 0, low
        elif v >= high:
            output[i], by_x[i], by_s[i] = high * s, 0, high
        else:
            output[i], by_x[i], by_s[i] = round(v) * s, 1, round(v) - v
    return output, by_x, by_s / np.sqrt(count * high)


def numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('bits', BITS)
def test_values_and_gradients_are_those_of_the_formula(bits, signed):
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    x, cotangent, s = numbers((5, 7)), numbers((5, 7), 1), 1.5 / high
    # Both ends and halves, where rounding goes to even numbers.
    x[0, :6] = np.array([0, high, 0.5, 1.5, 2.5, -0.5]) * s
    quantize = functools.partial(lsq.quantize, bits=bits, signed=signed, count=35)
    output, pull = jax.vjp(quantize, jnp.asarray(x), jnp.asarray(s))
    expected, by_x, by_s = reference(x, s, bits, signed, count=35)
    assert 0 < np.mean(by_x) < 1
    np.testing.assert_allclose(output, expected, rtol=1e-15)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], by_x * cotangent)
    np.testing.assert_allclose(
        pull(jnp.asarray(cotangent))[1], np.sum(by_s * cotangent), rtol=1e-13
    )


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('signed', [True, False])
def test_a_quantized_layer_has_the_gradients_of_the_formulas(signed):
    x, kernel, cotangent = numbers((6, 5)), numbers((5, 3), 1), numbers((6, 3), 2)
    kernel_step, input_step = 0.3, 0.2
    layer = nn.Dense(
        3, promote_dtype=QuantizedOperands(4, signed), param_dtype=jnp.float64
    )
    params = {
        'kernel': jnp.asarray(kernel),
        'bias': jnp.ones(3),
        'kernel_quantizer': {'step': jnp.asarray(kernel_step)},
        'input_quantizer': {'step': jnp.asarray(input_step)},
    }
    output, pull = jax.vjp(
        lambda params, x: layer.apply({'params': params}, x), params, jnp.asarray(x)
    )
    by_params, by_x = pull(jnp.asarray(cotangent))
    w, w_by_w, w_by_s = reference(kernel, kernel_step, 4, True, count=15)
    # Of an example, which has five features.
    z, z_by_x, z_by_s = reference(x, input_step, 4, signed, count=5)
    np.testing.assert_allclose(output, z @ w + 1, rtol=1e-13)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    close(by_params['kernel'], (z.T @ cotangent) * w_by_w)
    close(by_params['kernel_quantizer']['step'], np.sum((z.T @ cotangent) * w_by_s))
    close(by_x, (cotangent @ w.T) * z_by_x)
    close(by_params['input_quantizer']['step'], np.sum((cotangent @ w.T) * z_by_s))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('bits', BITS)
def test_values_lie_on_the_grid_exactly(bits, dtype):
    x = jnp.asarray(2 * numbers((400,)), dtype)
    step = jnp.float32(0.123)
    for signed in (True, False):
        output = lsq.quantize(x, step, bits=bits, signed=signed, count=1)
        assert output.dtype == dtype
        low, high = lsq.levels(bits, signed)
        grid = (np.arange(low, high + 1) * np.float32(step)).astype(dtype)
        assert set(np.asarray(output)) <= set(grid)
        assert len(set(np.asarray(output))) > min(high - low, 30)


def test_gradients_pass_straight_through_under_jit_vmap_and_in_bfloat16():
    x, steps = numbers((3, 40)).astype(np.float32), np.float32([0.1, 0.2, 0.4])

    def loss(x: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.sum(lsq.quantize(x, step, bits=3, signed=True, count=40) ** 2)

    gradients = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1))))
    by_x, by_step = gradients(x, steps)
    # In bfloat16 what is quantized is another number, but in the same way.
    narrow = jnp.asarray(x, jnp.bfloat16)
    narrow_by_x, narrow_by_step = gradients(narrow, steps)
    assert narrow_by_x.dtype == jnp.bfloat16
    assert narrow_by_step.dtype == jnp.float32
    for i in range(3):
        for given, found, found_step, tolerance in (
            (x, by_x, by_step, 1e-5),
            (narrow, narrow_by_x, narrow_by_step, 0.01),
        ):
            values = np.asarray(given[i], np.float64)
            z, z_by_x, z_by_s = reference(values, steps[i], 3, True, count=40)
            np.testing.assert_allclose(
                np.asarray(found[i], np.float64), 2 * z * z_by_x, rtol=tolerance
            )
            np.testing.assert_allclose(
                found_step[i], np.sum(2 * z * z_by_s), rtol=tolerance
            )


def test_the_gradient_can_be_differentiated_again():
    # Curvature is measured with such products.
    x = 3 * numbers((20,)).astype(np.float32)
    loss = lambda x: jnp.sum(
        lsq.quantize(x, jnp.float32(0.3), bits=4, signed=True, count=1) ** 2
    )
    curvature = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (x,))[1])
    inside = (x / 0.3 > -8) & (x / 0.3 < 7)
    np.testing.assert_allclose(curvature(x), 2 * x * inside, rtol=1e-6)


# --- Steps --------------------------------------------------------------------


@pytest.mark.parametrize('step', [0.25, -0.25])
def test_a_step_that_was_driven_below_zero_counts_by_its_size(step):
    x = jnp.array([-0.6, 0.3, 5.0])
    quantize = functools.partial(lsq.quantize, bits=3, signed=True, count=1)
    np.testing.assert_array_equal(quantize(x, jnp.float32(step)), [-0.5, 0.25, 0.75])
    slope = jax.grad(lambda step: jnp.sum(quantize(x, step)))(jnp.float32(step))
    # -2 + 2.4, 1 - 1.2 and Q_P.
    expected = math.copysign((0.4 - 0.2 + 3) / math.sqrt(3), step)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


@pytest.mark.parametrize('step', [0.0, 1e-30, -1e-12])
def test_a_step_is_never_zero(step):
    x = jnp.array([0.0, 1e-3, -1e30])
    quantize = functools.partial(lsq.quantize, bits=3, signed=True, count=1)
    output, pull = jax.vjp(quantize, x, jnp.float32(step))
    floor = lsq.SMALLEST_STEP
    np.testing.assert_allclose(output, [0, 3 * floor, -4 * floor], rtol=1e-6)
    assert all(np.isfinite(g).all() for g in pull(jnp.ones(3)))


def test_steps_start_at_twice_the_mean_size_over_the_root_of_the_range():
    x = jnp.array([1.0, -3.0])
    np.testing.assert_allclose(lsq.initial_step(x, 7), 4 / math.sqrt(7), rtol=1e-6)
    # Bfloat16 could hold neither the sum nor the step.
    step = lsq.initial_step(jnp.full(1000, 1.5, jnp.bfloat16), 7)
    assert step.dtype == jnp.float32
    np.testing.assert_allclose(step, 3 / math.sqrt(7), rtol=1e-6)


@pytest.mark.slow
def test_weights_and_activations_that_are_all_zero_give_finite_steps_and_gradients():
    layer = nn.Dense(
        3,
        promote_dtype=QuantizedOperands(2, signed_input=False),
        kernel_init=nn.initializers.zeros_init(),
    )
    x = jnp.zeros((4, 5))
    variables = layer.init(jax.random.key(0), x)
    steps = {
        name: float(variables['params'][name]['step'])
        for name in ('kernel_quantizer', 'input_quantizer')
    }
    assert steps['kernel_quantizer'] == 1
    np.testing.assert_allclose(steps['input_quantizer'], 1 / math.sqrt(3), rtol=1e-6)
    loss = lambda variables: jnp.sum(jnp.cos(layer.apply(variables, x + 1)))
    gradients = jax.tree.leaves(jax.grad(loss)(variables))
    assert all(np.isfinite(g).all() for g in gradients)


def test_grids_start_from_the_weights_and_from_the_first_images():
    network = zoo.MLP(num_classes=3, width=4, depth=1)
    model = quantization.quantize(network, IMAGE, bits=2)
    images = jax.random.normal(jax.random.key(1), (6, *IMAGE))
    params, full = jax.jit(
        lambda key, x: [
            each.init(key, x, train=True)['params'] for each in (model, network)
        ]
    )(jax.random.key(0), images)

    x, step = np.asarray(images).reshape(6, -1), {}
    for layer, low, high in (('Dense_0', -128, 127), ('Dense_1', 0, 255)):
        kernel = np.asarray(params[layer]['kernel'])
        # The weights are those of the network in full precision.
        np.testing.assert_array_equal(kernel, full[layer]['kernel'])
        step['kernel'] = 2 * np.abs(kernel).mean() / np.sqrt(127)
        step['input'] = 2 * np.abs(x).mean() / np.sqrt(high)
        for name, expected in step.items():
            found = params[layer][f'{name}_quantizer']['step']
            np.testing.assert_allclose(found, expected, rtol=1e-4)
        # What the next layer sees: ReLU of BatchNorm of the mini-batch.
        z = np.round(np.clip(x / step['input'], low, high)) * step['input']
        w = np.round(np.clip(kernel / step['kernel'], -128, 127)) * step['kernel']
        y = z @ w
        y = (y - y.mean(axis=0)) / np.sqrt(y.var(axis=0) + 1e-5)
        x = np.maximum(y, 0)


# --- Networks -----------------------------------------------------------------


def flat_shapes(model: nn.Module, shape: tuple[int, ...]) -> dict[Any, Any]:
    init = functools.partial(model.init, train=True)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    params = jax.eval_shape(init, jax.random.key(0), images)['params']
    return traverse_util.flatten_dict(params)


@pytest.mark.parametrize('name', problems.slow_but(QUICK, SMALL))
def test_every_network_can_be_quantized_and_keeps_its_parameters(name):
    network = zoo.create(name, SMALL[name], num_classes=7)
    full = flat_shapes(network, (32, 32, 3))
    kernels = {path[:-1] for path in full if path[-1] == 'kernel'}
    steps = {
        (*path, f'{operand}_quantizer', 'step')
        for path in kernels
        for operand in ('kernel', 'input')
    }
    assert all(quantization.is_step_size(path) for path in steps)
    assert not any(quantization.is_step_size(path) for path in full)
    for bits in (2, 4) if name == 'mlp' else (4,):
        model = quantization.quantize(network, (32, 32, 3), bits)
        # The first and the last layer have 8 bits, all others as many as asked for.
        layers = model.layers
        assert {layer.path for layer in layers} == kernels
        assert [layer.bits for layer in layers[1:-1]] == [bits] * (len(layers) - 2)
        assert [layers[0].bits, layers[-1].bits] == [8, 8]
        assert layers[0].path == ('Dense_0' if name == 'mlp' else 'Conv_0',)
        assert full[(*layers[-1].path, 'kernel')].shape[-1] == 7
    quantized = flat_shapes(model, (32, 32, 3))
    assert quantized.keys() - full.keys() == steps
    assert {path: quantized[path] for path in full} == full


def test_a_quantized_network_computes_in_its_own_dtype():
    network = zoo.create('cnn', {'width': 2, 'dtype': 'bfloat16'}, num_classes=3)
    model = quantization.quantize(network, IMAGE, bits=4)
    x = jax.ShapeDtypeStruct((2, *IMAGE), jnp.float32)
    variables = jax.eval_shape(
        functools.partial(model.init, train=True), jax.random.key(0), x
    )
    forward = jax.jit(functools.partial(model.apply, train=False))
    lines = forward.lower(variables, x).as_text().splitlines()
    convolutions = [line for line in lines if 'stablehlo.convolution' in line]
    assert len(convolutions) == 4
    assert all('bf16' in line.split(' : ')[-1] for line in convolutions)
    # Division by the step and rounding are not.
    roundings = [line for line in lines if 'stablehlo.round' in line]
    assert len(roundings) == 10
    assert not any('bf16' in line for line in roundings)


@pytest.mark.parametrize(
    ('name', 'signed'),
    [
        ('cnn', {'Conv_0'}),
        ('small_resnet', {'Conv_0'}),
        ('resnet50', {'Conv_0'}),
        ('wide_resnet', {'Conv_0'}),
        ('mobilenet', {'Conv_0'}),
        # Blocks start with a BatchNorm that no ReLU follows.
        ('pyramidnet', {'Conv_0', *(f'_Block_{i}/Conv_0' for i in range(6))}),
        ('vit', None),
    ],
)
def test_grids_of_inputs_are_signed_unless_a_relu_precedes(name, signed):
    network = zoo.create(name, SMALL[name], num_classes=7)
    model = quantization.quantize(network, (32, 32, 3), bits=4)
    found = {'/'.join(layer.path) for layer in model.layers if layer.signed_input}
    everywhere = {'/'.join(layer.path) for layer in model.layers}
    assert found == (everywhere if signed is None else signed)


def _twice(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, _: (x - 0.5, None), x, None, length=2)[0]


# What becomes of numbers of either sign, and whether it may be negative.
CASES = {
    'as they are': (lambda x: x, True),
    'relu': (nn.relu, False),
    'relu in a remat': (jax.checkpoint(nn.relu), False),
    'sum with itself': (lambda x: nn.relu(x) + nn.relu(-x), False),
    'pooled': (lambda x: nn.max_pool(nn.relu(x), (2,), (2,)), False),
    'mean': (lambda x: nn.relu(x).mean(axis=1, keepdims=True), False),
    'square': (jnp.square, False),
    'clipped': (lambda x: jnp.clip(x, 0, 1), False),
    'clipped below zero': (lambda x: jnp.clip(x, -0.1, 1), True),
    'negated': (lambda x: -nn.relu(x), True),
    'lowered': (lambda x: nn.relu(x) - 0.1, True),
    'scaled by a negative number': (lambda x: nn.relu(x) * -1.0, True),
    'padded with a negative number': (
        lambda x: jnp.pad(nn.relu(x), ((0, 0), (0, 1), (0, 0)), constant_values=-1),
        True,
    ),
    'a residual': (lambda x: nn.relu(x) + x, True),
    'gelu': (nn.gelu, True),
    'a loop': (lambda x: _twice(nn.relu(x)), True),
}


@pytest.mark.parametrize('name', list(CASES))
def test_what_is_called_nonnegative_is(name):
    function, signed = CASES[name]

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            return nn.Dense(1)(function(x))

    known = layer_inputs.nonnegative_inputs(Network(), (4, 3))
    assert known == {('Dense_0',): not signed}
    values = jax.jit(function)(numbers((2, 4, 3)))
    assert np.any(np.asarray(values) < 0) == signed


def test_a_layer_that_is_called_twice_is_signed_if_one_of_its_inputs_is():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            layer = nn.Dense(x.shape[-1])
            return nn.Dense(2)(nn.relu(layer(nn.relu(layer(x)))))

    known = layer_inputs.nonnegative_inputs(Network(), (3,))
    assert known == {('Dense_0',): False, ('Dense_1',): True}


def test_a_quantized_network_runs_under_vmap():
    network = zoo.MLP(num_classes=3, width=4, depth=1)
    model = quantization.quantize(network, IMAGE, bits=4)
    x = jax.random.normal(jax.random.key(1), (5, *IMAGE))
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def both(keys: jax.Array, x: jax.Array) -> Any:
        init = functools.partial(model.init, train=True)
        apply = functools.partial(model.apply, train=False)
        variables = jax.vmap(init, in_axes=(0, None))(keys, x)
        second = jax.tree.map(operator.itemgetter(1), variables)
        return jax.vmap(apply, in_axes=(0, None))(variables, x), apply(second, x)

    at_once, alone = both(keys, x)
    np.testing.assert_allclose(at_once[1], alone, rtol=1e-4, atol=1e-5)
    assert np.abs(at_once[0] - at_once[1]).max() > 0.1


@pytest.mark.parametrize('bits', [1, 5, 16, -2, True, '4', 4.5])
def test_other_numbers_of_bits_are_refused(bits):
    network = zoo.MLP(num_classes=3)
    with pytest.raises(
        ValueError, match=r'bits must be one of 2, 3, 4, 8, or 0 .* got'
    ):
        quantization.quantize(network, IMAGE, bits)


def test_no_bits_leave_a_network_as_it_is():
    network = zoo.MLP(num_classes=3)
    assert quantization.quantize(network, IMAGE) is network


# --- Whole numbers ------------------------------------------------------------


class _EveryLayer(nn.Module):
    """All kinds of layers: strides, groups, biases, several axes of features."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(4, (3, 3), (2, 2), padding=1)(x)
        x = nn.relu(norm(train)(x))
        x = nn.Conv(4, (3, 3), feature_group_count=2, use_bias=False)(x)
        x = norm(train)(x).reshape(x.shape[0], -1, 4)
        x += nn.MultiHeadDotProductAttention(2)(x)
        return logits(nn.relu(x), 5)


@pytest.mark.parametrize('bits', [2, 4])
def test_integers_and_scales_give_the_outputs_of_the_quantized_network(bits):
    model = quantization.quantize(_EveryLayer(), IMAGE, bits)
    random = np.random.default_rng(bits)

    def trained(path: Any, leaf: Any) -> Any:
        value = random.normal(size=leaf.shape)
        if path[-1].key == 'step':
            # Also where it was driven below zero.
            value = (-1) ** random.integers(2) * random.uniform(0.1, 0.5)
        elif path[-1].key in ('var', 'scale'):
            value = np.abs(value) + 0.5
        return np.float32(value)

    x = np.float32(random.normal(size=(8, *IMAGE)))
    init = functools.partial(model.init, train=True)
    shapes = jax.eval_shape(init, jax.random.key(0), x)
    variables = jax.tree_util.tree_map_with_path(trained, shapes)
    exported = integers.export(model, variables)
    expected = jax.jit(functools.partial(model.apply, train=False))(variables, x)
    output = jax.jit(functools.partial(integers.apply, model))(exported, x)

    assert [layer.bits for layer in model.layers] == [8, *[bits] * 5, 8]
    for layer in model.layers:
        params = functools.reduce(lambda p, key: p[key], layer.path, exported['params'])
        low, high = -(2 ** (layer.bits - 1)), 2 ** (layer.bits - 1) - 1
        assert params['kernel'].dtype == jnp.int8
        assert low <= np.min(params['kernel']) < 0 < np.max(params['kernel']) <= high
        assert params['kernel_quantizer']['step'] > 0
    assert np.std(expected, axis=0).min() > 0.01
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


# --- Configurations and training ----------------------------------------------


@pytest.fixture(scope='module')
def config() -> Any:
    """A run of six steps, of three layers."""
    return tiny_digits(
        data__validation=0,
        models__mlp__depth=2,
        epochs=2,
        method='sgd',
        methods__vsam__window=2,
        methods__vsam__segments=1,
        methods__vsam__warmup_steps=1,
    )


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory) -> Any:
    """The workdir of a run in full precision, and the variables it ended with."""
    path = tmp_path_factory.mktemp('full')
    config = changed(config, checkpoint_every=2, seed=3)
    runs = experiment.build(config)
    last = []
    step = runs.step.function

    def noting_step(state: Any, batch: Any) -> Any:
        state = step(state, batch)
        last[:] = [jax.tree.map(np.array, (state.params, state.batch_stats))]
        return state

    runs.step.compile = lambda *_: None
    runs.step.function = noting_step
    train(config, path / 'seed3', experiment=runs, bar=progress.Bar())
    return path, last[0]


def test_a_start_from_full_precision_copies_weights_and_makes_steps(config, finished):
    path, (params, batch_stats) = finished
    quantized = changed(
        config,
        quantization__bits=2,
        init_from=f'{path}/seed{{seed}}',
        models__mlp__dtype='bfloat16',
    )
    runs = experiment.build(quantized)
    state = runs.init(3)
    kept = traverse_util.flatten_dict(state.params)
    for where, value in traverse_util.flatten_dict(params).items():
        np.testing.assert_array_equal(kept.pop(where), value)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, batch_stats)
    assert len(kept) == 6
    for where, step in kept.items():
        assert quantization.is_step_size(where)
        if where[1] == 'kernel_quantizer':
            high = 1 if where[0] == 'Dense_1' else 127
            size = np.abs(params[where[0]]['kernel']).mean()
            np.testing.assert_allclose(step, 2 * size / np.sqrt(high), rtol=1e-5)
    # The first layer's input is the first mini-batch.
    batches = runs.batches
    batch = batches.take(batches.dataset.train, batches.epoch(3, 0), 0)
    images = batch['image']
    np.testing.assert_allclose(
        kept['Dense_0', 'input_quantizer', 'step'],
        2 * np.abs(images).mean() / np.sqrt(127),
        rtol=1e-5,
    )


def test_a_start_in_full_precision_takes_over_everything(config, finished):
    path, variables = finished
    state = experiment.build(changed(config, init_from=f'{path}/seed3')).init(0)
    jax.tree.map(
        np.testing.assert_array_equal, (state.params, state.batch_stats), variables
    )


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'init_from': '{path}/seed4'}, 'workdir of a finished run, got .*seed4'),
        ({'init_from': '{path}/seed{{method}}'}, 'finished run, got .*seedsgd'),
        ({'init_from': '{path}/{{epoch}}'}, 'no other braces'),
        ({'models__mlp__width': 9}, r'another network:\s+config.models.mlp.width is 8'),
        ({'model': 'cnn'}, r'another network:\s+config.models.cnn'),
    ],
)
def test_a_start_from_what_is_no_such_run_is_refused(config, finished, values, message):
    path, _ = finished
    values = {'init_from': '{path}/seed3', **values}
    values['init_from'] = values['init_from'].format(path=path)
    runs = experiment.build(changed(config, **values))
    with pytest.raises(configuration.ConfigError, match=message):
        runs.init(0)


def test_a_start_from_another_task_is_refused(config, finished):
    path, _ = finished
    config = changed(
        config,
        init_from=f'{path}/seed3',
        data={'name': 'synthetic', 'train': 80, 'test': 40, 'num_classes': 3},
    )
    with pytest.raises(
        configuration.ConfigError, match=r'params/Dense_2/kernel is \(8, 10\) there'
    ):
        experiment.build(config).init(0)


def test_a_start_from_a_run_without_checkpoints_is_refused(config, finished, tmp_path):
    path, _ = finished
    shutil.copy(path / 'seed3' / run_files.RESULT, tmp_path)
    runs = experiment.build(changed(config, init_from=str(tmp_path)))
    with pytest.raises(configuration.ConfigError, match='holds no checkpoint; run it'):
        runs.init(0)


def test_a_quantized_network_trains_with_vsam(config, tmp_path):
    quantized = changed(
        config, method='vsam', quantization__bits=2, dispatch='traced', epochs=4
    )
    result = train(quantized, tmp_path, bar=progress.Bar())
    assert result['config']['quantization'] == {'bits': 2}
    # Kernels, biases and BatchNorm, and two steps for each of three layers.
    assert result['parameters'] == 64 * 8 + 8 * 8 + 8 * 10 + 10 + 4 * 8 + 6
    assert 0 < result['sampling_rate'] < 1
    losses = [entry['loss'] for entry in result['log']]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_finished_run_is_exported_to_whole_numbers(config, finished, tmp_path):
    quantized = changed(config, quantization__bits=4, checkpoint_every=4)
    result = train(quantized, tmp_path, bar=progress.Bar())
    found = export.export(tmp_path)
    assert found['accuracy'] == pytest.approx(result['test_accuracy'], abs=1e-6)
    assert found['alike'] > 0.95
    with np.load(tmp_path / export.EXPORTED) as arrays:
        kernels = [x for x in arrays.values() if x.dtype == np.int8]
    assert sum(x.nbytes for x in kernels) == found['bytes'] > 0
    path, _ = finished
    with pytest.raises(configuration.ConfigError, match='ran in full precision'):
        export.export(path / 'seed3')


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'quantization': {'bits': 5}}, r'config.quantization: bits must be one of 2'),
        ({'quantization': {'bit': 4}}, r"holds 'bit', which is not among .*: bits"),
        ({'init_from': None}, 'config.init_from must be the workdir'),
        (
            {'methods': {'sgd': {'perturb_step_sizes': False}}},
            "config.methods.sgd holds 'perturb_step_sizes'",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(config, values, message):
    config = changed(config)
    with config.unlocked(), config.ignore_type():
        for name, value in values.items():
            config[name] = value
    with pytest.raises(configuration.ConfigError, match=message):
        experiment.build(config)


@pytest.mark.parametrize('bits', [2, 4])
def test_digits_in_a_few_bits_differ_from_the_digits_in_nothing_else(bits):
    quantized = quantized_digits.get_config(str(bits))
    assert quantized.quantization.bits == bits
    differs = configuration.differences(
        configuration.plain(digits.get_config()), configuration.plain(quantized)
    )
    names = {line.split(' is ')[0].removeprefix('config.') for line in differs}
    names = {name for name in names if not name.startswith(('compare.', 'tune.'))}
    assert names == {
        'name',
        'quantization.bits',
        'methods.sam_steps',
        'methods.vsam_steps',
        *(
            f'methods.{method}.perturb_step_sizes'
            for method in ('sam', 'asam', 'looksam', 'vsam', 'steady_vsam')
        ),
    }
    for name, settings in quantized.methods.items():
        registry.create(name, settings, quantized.optimizer, TASK)


@pytest.mark.parametrize('bits', [2, 4])
def test_the_small_images_have_the_settings_of_full_precision(bits):
    quantized = cifar100_small.get_config(str(bits))
    configuration.check(quantized)
    assert quantized.quantization.bits == bits
    full = json.loads(
        (EXPERIMENTS / 'results' / 'cifar100_small/noisy/tuning.json').read_text()
    )
    for name in ('sgd', 'sam', 'vsam', 'steady_vsam'):
        for path, value in full['chosen'][name].items():
            assert functools.reduce(getattr, path.split('.'), quantized) == value
    for name, mask in (('sam', False), ('sam_steps', True)):
        settings = quantized.methods[name]
        assert settings.get('perturb_step_sizes', True) == mask
        assert settings.rho == full['chosen']['sam']['methods.sam.rho']
    for name in quantized.compare.methods:
        registry.create(name, quantized.methods[name], quantized.optimizer, TASK)


@pytest.mark.parametrize('name', ['sam', 'asam', 'looksam', 'vsam'])
def test_every_method_can_leave_the_steps_unperturbed(config, name):
    settings = {**config.methods[name], 'perturb_step_sizes': False}
    registry.create(name, settings, config.optimizer, TASK)


def test_steps_are_perturbed_unless_the_method_says_otherwise():
    params = {'kernel': np.ones(2), 'kernel_quantizer': {'step': np.float32(0.5)}}
    params = {'layer': jax.tree.map(np.float32, params)}
    optimizer = {'learning_rate': 1.0, 'momentum': 0.0}
    for settings, is_moved in (({}, True), ({'perturb_step_sizes': False}, False)):
        tx = registry.create('sam', {'rho': 0.1, **settings}, optimizer, TASK).tx
        # The update is the point at which the second gradient was taken, but for its
        # sign.
        updates, _ = jax.jit(
            lambda w, tx=tx: tx.update(w, tx.init(w), w, grad_fn=lambda w: w)
        )(params)
        layer = updates['layer']
        assert np.all(layer['kernel'] < -1)
        assert (layer['kernel_quantizer']['step'] < -0.5) == is_moved
