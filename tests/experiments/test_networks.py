"""The networks: their sizes, what they compute in, and the order of their tensors."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsam_jax
from experiments.common import configuration
from experiments.models import zoo
from experiments.models.networks import pyramidnet, vit
from tests import problems
from tests.experiments.small import QUICK, SMALL
from vsam_jax._state import only_state

# The decoder learns text.
IMAGES = [name for name in zoo.MODELS if name != 'decoder']


def abstract_variables(model: nn.Module, shape: tuple[int, ...] = (32, 32, 3)):
    """Shapes and dtypes of a network's variables, without computing them."""
    init = lambda key: model.init(key, jnp.zeros((1, *shape)), train=False)
    return jax.eval_shape(init, jax.random.key(0))


def number_of_parameters(name: str, num_classes: int, **settings: int) -> int:
    model = zoo.create(name, settings, num_classes)
    params = abstract_variables(model)['params']
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# --- Sizes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'with_100_classes', 'with_10_classes'),
    [
        ('resnet18', 11_220_132, 11_173_962),
        pytest.param('resnet50', 23_705_252, 23_520_842, marks=pytest.mark.slow),
        ('wide_resnet', 36_536_884, 36_479_194),
        pytest.param('pyramidnet', 28_511_307, 28_485_477, marks=pytest.mark.slow),
        ('mobilenet', 3_309_476, 3_217_226),
    ],
)
def test_networks_have_the_sizes_of_the_publications(
    name, with_100_classes, with_10_classes
):
    assert number_of_parameters(name, 100) == with_100_classes
    # The difference is the classifier's, which a compact method makes last.
    assert number_of_parameters(name, 10) == with_10_classes


def test_a_vit_has_the_size_that_its_settings_say():
    width, depth, patch = 12, 3, 8
    attention = 4 * (width * width + width)
    dense = 2 * 4 * width * width + 4 * width + width
    block = attention + dense + 2 * (2 * width)
    tokens = (32 // patch) ** 2
    stem = patch * patch * 3 * width + width + tokens * width
    head = 2 * width + width * 10 + 10
    settings = {'patch': patch, 'width': width, 'depth': depth}
    assert number_of_parameters('vit', 10, **settings) == stem + depth * block + head


@pytest.mark.parametrize(
    'name', problems.slow_but(QUICK, [name for name in IMAGES if name != 'mlp'])
)
def test_networks_take_images_of_any_size(name):
    model = zoo.create(name, SMALL[name], num_classes=7)
    for shape in [(2, 32, 32, 3), (2, 28, 28, 1), (2, 20, 36, 3)]:
        init = lambda key, x: model.init_with_output(key, x, train=True)
        images = jax.ShapeDtypeStruct(shape, jnp.float32)
        output, _ = jax.eval_shape(init, jax.random.key(0), images)
        assert output.shape == (2, 7)


@pytest.mark.parametrize(
    ('name', 'settings', 'message'),
    [
        ('wide_resnet', {'depth': 30}, r'depth must be 6 n \+ 4 .* got 30'),
        ('pyramidnet', {'depth': 2}, r'depth must be 6 n \+ 2 .* got 2'),
        ('vit', {'width': 100}, r'width must be a multiple of heads \(3\), got 100'),
        ('resnet18', {'dtype': 'float17'}, 'float17'),
    ],
)
def test_settings_that_make_no_network_are_refused(name, settings, message):
    with pytest.raises(configuration.ConfigError, match=message):
        zoo.create(name, settings, num_classes=10)


# --- What is computed ---------------------------------------------------------


@pytest.mark.parametrize('name', problems.slow_but(QUICK, IMAGES))
def test_only_products_are_bfloat16_and_the_classifier_is_not(name):
    model = zoo.create(name, {**SMALL[name], 'dtype': 'bfloat16'}, num_classes=7)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = abstract_variables(model)

    def forward(variables, x):
        return model.apply(variables, x, train=True, mutable=['batch_stats'])

    outputs = jax.eval_shape(forward, variables, x)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((variables, outputs))}
    assert dtypes == {jnp.dtype('float32')}

    lines = jax.jit(forward).lower(variables, x).as_text().splitlines()
    signatures = lambda *names: [
        line.split(' : ')[-1] for line in lines if any(name in line for name in names)
    ]
    products = signatures('stablehlo.convolution', 'stablehlo.dot_general')
    wide = [product for product in products if 'bf16' not in product]
    assert len(products) > 1
    assert len(wide) == 1
    assert wide[0].endswith('tensor<2x7xf32>')
    # Means, variances and softmax.
    sums = signatures('stablehlo.reduce(', 'stablehlo.rsqrt')
    assert sums
    assert not any('bf16' in line for line in sums)


@pytest.mark.parametrize('name', problems.slow_but(QUICK, IMAGES))
def test_every_variable_takes_part(name):
    model = zoo.create(name, SMALL[name], num_classes=7)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = abstract_variables(model)
    program = jax.jit(lambda v, x: model.apply(v, x, train=False)).lower(variables, x)
    # What a program does not use is not among its arguments.
    (main,) = re.findall(r'@main\(.*\) ->', program.as_text())
    assert len(re.findall(r'%arg\d+: ', main)) == len(jax.tree.leaves(variables)) + 1


def test_the_shortcut_of_a_pyramid_is_averaged_and_filled_up_with_zeros():
    block = pyramidnet._Block(features=5, stride=2, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    variables = jax.jit(functools.partial(block.init, train=False))(
        jax.random.key(1), x
    )
    # Without the path of convolutions, whose last BatchNorm gives zero at scale 0.
    variables['params']['BatchNorm_2']['scale'] *= 0
    output = np.asarray(
        jax.jit(functools.partial(block.apply, train=False))(variables, x)
    )
    averaged = np.asarray(x).reshape(2, 2, 2, 2, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(output[..., :3], averaged, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(output[..., 3:], 0)


def test_a_vit_tells_patches_apart_by_their_positions_alone():
    model = vit.ViT(num_classes=3, patch=2, width=6, depth=1, heads=2)
    images = jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
    # The left and the right half change places, which are whole patches.
    swapped = jnp.roll(images, 2, axis=2)
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(1), images
    )
    forward = jax.jit(functools.partial(model.apply, train=False))
    apply = lambda images: np.asarray(forward(variables, images))
    assert np.max(np.abs(apply(images) - apply(swapped))) > 1e-4
    variables['params']['positions'] *= 0
    np.testing.assert_allclose(apply(images), apply(swapped), rtol=1e-4, atol=1e-5)


# --- The order of tensors -----------------------------------------------------


def picked(model: nn.Module, n: int) -> set[str]:
    params = abstract_variables(model)['params']
    mask = zoo.last_tensors(model, (32, 32, 3), n)(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    return {
        '/'.join(entry.key for entry in path)
        for path, flag in jax.tree_util.tree_leaves_with_path(mask)
        if flag
    }


def test_the_last_ten_tensors_of_resnet18_end_at_a_shortcuts_batch_norm():
    model = zoo.create('resnet18', {}, num_classes=10)
    params = abstract_variables(model)['params']
    classifier = {'Dense_0/kernel', 'Dense_0/bias'}
    last_block = {
        f'BasicBlock_7/{layer}/{tensor}'
        for layer, tensors in (('Conv', ['kernel']), ('BatchNorm', ['scale', 'bias']))
        for layer in (f'{layer}_0', f'{layer}_1')
        for tensor in tensors
    }
    shortcut = {'BasicBlock_6/BatchNorm_2/scale', 'BasicBlock_6/BatchNorm_2/bias'}
    assert params['BasicBlock_6']['Conv_2']['kernel'].shape == (1, 1, 256, 512)
    assert (len(classifier), len(last_block), len(shortcut)) == (2, 6, 2)
    assert picked(model, 10) == classifier | last_block | shortcut


def test_the_order_is_that_of_the_layers_and_not_of_their_names():
    model = zoo.MLP(num_classes=10, width=4, depth=11)
    assert picked(model, 4) == {
        'Dense_11/kernel',
        'Dense_11/bias',
        'BatchNorm_10/scale',
        'BatchNorm_10/bias',
    }
    paths = zoo.parameter_paths(model, (4, 4, 1))
    assert paths[0] == ('Dense_0', 'kernel')
    assert sorted(paths) != paths


def test_statistics_are_taken_over_the_last_tensors_alone():
    model = zoo.MLP(num_classes=3, width=4, depth=11)
    mask = zoo.last_tensors(model, (2, 2, 1), 2)
    tx = vsam_jax.vsam(rho=0.1, window=4, segments=2, stats_mask=mask)
    shapes = abstract_variables(model, (2, 2, 1))['params']
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    triple = lambda params: jax.tree.map(lambda w: 3 * jnp.ones_like(w), params)
    _, state = jax.jit(lambda p: tx.update(p, tx.init(p), p, grad_fn=triple))(params)
    # s is 2 everywhere; the last two tensors have 4 · 3 + 3 elements.
    measured = only_state(state)
    np.testing.assert_allclose(measured.psf_norm, 2 * np.sqrt(15), rtol=1e-6)
    assert optax.tree.norm(params) ** 2 > 100


@pytest.mark.parametrize('n', [0, -1, 5])
def test_a_network_has_no_more_tensors_than_it_has(n):
    model = zoo.MLP(num_classes=3, width=4, depth=0)
    with pytest.raises(ValueError, match=rf'n must be .* \[1, 2\], .* got {n}'):
        zoo.last_tensors(model, (2, 2, 1), n)
