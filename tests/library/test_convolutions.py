"""Convolutions in the order and the portions that the CPU is fast at."""

import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import vsam_jax
from tests import problems
from vsam_jax import convolutions

# Kernels, inputs and outputs as words, for convolutions of one to three dimensions in
# every kind of order, and settings of them.
CONVOLUTIONS = {
    'canonical': (('NHWC', 'HWIO', 'NHWC'), {}),
    'channels first': (('NCHW', 'OIHW', 'NCHW'), {'padding': 'SAME'}),
    'another order of outputs': (('HNCW', 'IWOH', 'CWNH'), {'padding': 'VALID'}),
    'one dimension': (('NCW', 'OIW', 'NCW'), {'window_strides': (2,)}),
    'no dimension': (('CN', 'IO', 'CN'), {}),
    'three dimensions': (('NCDHW', 'DHWIO', 'NDHWC'), {'padding': 'SAME'}),
    'strides and dilations': (
        ('NCHW', 'OIHW', 'NCHW'),
        {
            'window_strides': (2, 1),
            'padding': ((1, 2), (0, 3)),
            'lhs_dilation': (1, 2),
            'rhs_dilation': (2, 1),
        },
    ),
    'groups of channels': (('NCHW', 'OIHW', 'NCHW'), {'feature_group_count': 2}),
    'groups of examples': (('NCHW', 'OIHW', 'NCHW'), {'batch_group_count': 2}),
}
SIZES = {'N': 4, 'C': 4, 'I': 4, 'O': 6, 'H': 5, 'W': 7, 'D': 3}


def convolution(name):
    """A convolution and random arguments of it."""
    (lhs, rhs, out), settings = CONVOLUTIONS[name]
    space = len(lhs) - 2
    sizes = SIZES | {'I': SIZES['I'] // settings.get('feature_group_count', 1)}
    kernel_sizes = sizes | {'H': 3, 'W': 2, 'D': 2}
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=[sizes[c] for c in lhs])
    kernel = rng.normal(size=[kernel_sizes[c] for c in rhs])
    settings = {'window_strides': (1,) * space, 'padding': 'VALID', **settings}
    convolve = lambda inputs, kernel: lax.conv_general_dilated(
        inputs, kernel, dimension_numbers=(lhs, rhs, out), **settings
    )
    return convolve, inputs, kernel


def orders(function, *args):
    """The orders of dimensions of the convolutions in a lowered program."""
    text = jax.jit(function).lower(*args).as_text()
    return re.findall(r'dim_numbers = (.*?->\[.*?\])', text)


def gradient(name):
    convolve, inputs, kernel = convolution(name)
    loss = lambda args: jnp.sum(jnp.sin(convolve(*args)))
    return jax.value_and_grad(loss), (inputs, kernel)


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_values_and_gradients_stay_and_dimensions_are_in_the_fast_order(name):
    function, args = gradient(name)
    with jax.enable_x64(True):
        chex.assert_trees_all_close(
            jax.jit(convolutions.canonical(function))(args), function(args), rtol=1e-12
        )
        found = orders(convolutions.canonical(function), args)
    space = ', '.join(['b', *map(str, range(args[0].ndim - 2)), 'f'])
    kernel = ', '.join([*map(str, range(args[0].ndim - 2)), 'i', 'o'])
    assert found == 3 * [f'[{space}]x[{kernel}]->[{space}]']


def in_portions(monkeypatch, num_bytes):
    monkeypatch.setattr(convolutions, '_cache', lambda: num_bytes)


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_values_and_gradients_stay_in_portions(name, monkeypatch):
    function, args = gradient(name)
    with jax.enable_x64(True):
        expected = function(args)
        # So little that there is one example a portion, where there are portions.
        in_portions(monkeypatch, 1)
        chex.assert_trees_all_close(
            jax.jit(convolutions.canonical(function))(args), expected, rtol=1e-12
        )


@pytest.mark.parametrize(
    ('portion', 'number'),
    # The forward pass, and the gradient of the kernel: whole; or its first portion,
    # the one in the loop, and what is left of seven examples.
    [(1, 3), (3, 4), (4, 3), (7, 2)],
)
def test_gradients_of_kernels_are_summed_in_portions(portion, number, monkeypatch):
    rng = np.random.default_rng(0)
    inputs, kernel = rng.normal(size=(7, 4, 16, 16)), rng.normal(size=(4, 4, 3, 3))
    loss = lambda kernel: jnp.sum(lax.conv(inputs, kernel, (1, 1), 'SAME') ** 3)
    plain = jax.grad(loss)
    # Of the outputs' gradients as many bytes are read as of the inputs.
    in_portions(monkeypatch, portion * 2 * inputs.nbytes // 7)
    summed = jax.jit(convolutions.canonical(plain))
    curvature = lambda f: jax.grad(lambda kernel: jnp.sum(f(kernel) ** 2))(kernel)
    with jax.enable_x64(True):
        program = str(jax.make_jaxpr(summed)(kernel))
        chex.assert_trees_all_close(summed(kernel), plain(kernel), rtol=1e-9)
        chex.assert_trees_all_close(curvature(summed), curvature(plain), rtol=1e-9)
    assert program.count('conv_general_dilated[') == number


def test_narrow_results_groups_and_several_devices_are_not_cut(monkeypatch):
    inputs = jnp.ones((8, 4, 9, 9))

    def number(dtype=jnp.float32, groups=1):
        """Of convolutions in a gradient."""
        loss = lambda kernel: jnp.sum(
            lax.conv_general_dilated(
                inputs.astype(dtype), kernel, (1, 1), 'SAME', feature_group_count=groups
            )
        )
        gradient = convolutions.canonical(jax.grad(loss))
        shape = (4, 4 // groups, 3, 3)
        program = jax.make_jaxpr(gradient)(jnp.ones(shape, dtype))
        return str(program).count('conv_general_dilated[')

    assert jax.device_count() > 1
    whole = number()
    monkeypatch.setattr(convolutions, '_CACHE', 1)
    assert number() == whole
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    assert number() > whole
    assert number(jnp.bfloat16) == number(groups=2) == whole


@jax.custom_vjp
def flipped(x):
    return x


flipped.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def in_branch(function):
    return lambda *args: lax.cond(jnp.sum(args[0]) > 0, function, function, *args)


def in_loop(function):
    return lambda *args: lax.scan(lambda c, _: (c, function(*args)), 0, length=1)[1][0]


NESTED = {
    'jit': jax.jit,
    'checkpoint': jax.checkpoint,
    'cond': in_branch,
    'scan': in_loop,
    'vmap': lambda f: lambda *args: jax.vmap(f)(*(jnp.stack([x]) for x in args))[0],
    'custom_vjp': lambda f: lambda *args: flipped(f(*args)),
}


@pytest.mark.parametrize('name', NESTED)
def test_convolutions_inside_of_other_functions(name):
    convolve, inputs, kernel = convolution('channels first')
    inputs, kernel = (jnp.asarray(x, jnp.float32) for x in (inputs, kernel))
    inner = NESTED[name](convolve)
    function = jax.grad(lambda kernel: jnp.sum(inner(inputs, kernel) ** 2))
    found = orders(convolutions.canonical(function), kernel)
    assert len(found) >= 2
    assert set(found) == {'[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]'}
    chex.assert_trees_all_close(
        jax.jit(convolutions.canonical(function))(kernel), function(kernel), rtol=1e-4
    )


def test_trees_keys_closures_and_outer_transformations():
    convolve, inputs, kernel = convolution('channels first')
    inputs, kernel = (jnp.asarray(x, jnp.bfloat16) for x in (inputs, kernel))

    def noisy(params, key, *, scale):
        noise = jax.random.normal(key, (), jnp.float32)
        return {'out': jnp.sum(convolve(inputs, params['kernel'])) * scale, 'e': noise}

    def outer(function):
        def loss(kernel, scale):
            # Arguments from outside are traced here, also inside of the function.
            result = function(
                {'kernel': kernel * scale, 'none': None}, jax.random.key(0), scale=scale
            )
            return result['out'].astype(jnp.float32) + result['e']

        return jax.jit(jax.vmap(jax.grad(loss), (None, 0)))

    scales = jnp.arange(3, dtype=jnp.bfloat16)
    chex.assert_trees_all_close(
        outer(convolutions.canonical(noisy))(kernel, scales),
        outer(noisy)(kernel, scales),
        rtol=2e-2,
    )


@pytest.mark.parametrize('check_vma', [False, True])
def test_inside_shard_map(check_vma):
    convolve, inputs, kernel = convolution('channels first')
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh(
        (2,), ('data',), axis_types=axis_types, devices=jax.devices()[:2]
    )
    spec = jax.sharding.PartitionSpec

    def gradient(inputs, kernel):
        loss = lambda kernel: jnp.sum(convolve(inputs, kernel) ** 2)
        inner = convolutions.canonical(jax.jit(jax.grad(loss)))
        return jax.lax.psum(inner(kernel), 'data') if not check_vma else inner(kernel)

    sharded = jax.jit(
        jax.shard_map(
            gradient,
            mesh=mesh,
            in_specs=(spec('data'), spec()),
            out_specs=spec(),
            check_vma=check_vma,
        )
    )
    inputs, kernel = (jnp.asarray(x, jnp.float32) for x in (inputs, kernel))
    expected = jax.grad(lambda kernel: jnp.sum(convolve(inputs, kernel) ** 2))(kernel)
    chex.assert_trees_all_close(sharded(inputs, kernel), expected, rtol=1e-4)


def conv_loss(kernels, images):
    for kernel in kernels:
        images = jax.lax.conv(images, kernel, (1, 1), 'SAME')
    return jnp.mean(images**2)


def in_compiled(step, *args):
    """Orders of dimensions of the convolutions in a compiled program."""
    text = jax.jit(step).lower(*args).compile().as_text()
    assert ' conditional(' in text or ' while(' in text
    return re.findall(r' convolution\(.*dim_labels=([^,\s]+)', text)


@pytest.mark.parametrize('nested', [False, True])
def test_a_traced_step_has_no_slow_convolution(nested):
    tx = optax.chain(vsam_jax.vsam(0.1), optax.sgd(0.1))
    step = problems.make_step(tx, jax.jit(conv_loss) if nested else conv_loss)
    kernels = [jnp.ones((8, 8, 3, 3))] * 2
    found = in_compiled(step, (kernels, tx.init(kernels)), jnp.ones((2, 8, 8, 8)))
    # Forward and backward of two layers, without a gradient of the images; twice.
    assert found == 10 * ['b01f_01io->b01f']


def test_micro_batches_have_no_slow_convolution():
    loss_fn = lambda w, stats, batch, key: (conv_loss(w, batch), (stats, key))
    step = vsam_jax.linen.make_train_step(loss_fn, num_micro_batches=2)
    state = vsam_jax.linen.TrainState.create(
        apply_fn=None, params=[jnp.ones((8, 8, 3, 3))] * 2, tx=vsam_jax.sam(0.1)
    )
    assert in_compiled(step, state, jnp.ones((4, 8, 8, 8))) == 10 * ['b01f_01io->b01f']


def test_other_backends_and_code_without_jit_are_left_alone(monkeypatch):
    function, args = gradient('channels first')
    args = [jnp.asarray(x, jnp.float32) for x in args]
    wrapped = convolutions.canonical(function)
    plain = orders(function, args)
    assert orders(wrapped, args) != plain
    with jax.disable_jit(), monkeypatch.context() as context:
        context.setattr(jax, 'make_jaxpr', None)  # Nothing is traced.
        wrapped(args)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    # Another function, which jit has not seen yet.
    assert orders(lambda args: wrapped(args), args) == plain


def test_what_is_no_array_stays_what_it_is():
    def scaled(x, how, *, times):
        scaled = x * {'twice': 2, 'never': 0}[how] if times > 1 else x
        return scaled, {'how': how, 'times': times, 'none': None}

    @jax.jit
    def step(x):
        scaled_x, told = convolutions.canonical(scaled)(x, 'twice', times=2)
        assert told == {'how': 'twice', 'times': 2, 'none': None}
        return scaled_x

    assert step(3.0) == 6


def test_outside_of_jit_the_function_itself_runs():
    seen = []
    wrapped = convolutions.canonical(lambda x: seen.append(x) or (x if x > 1 else -x))
    x = jnp.array(2.0)
    assert wrapped(x) is x
    assert seen == [x]


def test_what_is_shared_stays_shared():
    convolve, inputs, kernel = convolution('channels first')
    x = jnp.ones(())
    # One that is left as it is, and one that is rewritten.
    for block in (jnp.sin, lambda x: x + jnp.sum(convolve(inputs, kernel))):
        block = jax.jit(block)
        two = lambda x, block=block: block(block(x))
        programs = lambda f: {
            id(e.params['jaxpr'])
            for e in jax.make_jaxpr(jax.jit(f))(x).jaxpr.eqns[0].params['jaxpr'].eqns
        }
        assert len(programs(convolutions.canonical(two))) == len(programs(two)) == 1


def test_modules_that_would_be_copied_are_refused():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    loss = convolutions.canonical(nnx.grad(lambda model, x: jnp.sum(model(x))))
    with pytest.raises(TypeError, match=r'objects of NNX.*Linear.*nnx\.split'):
        loss(model, jnp.ones((1, 2)))
    draw = convolutions.canonical(lambda rngs: rngs.dropout())
    with pytest.raises(TypeError, match=r'objects of NNX.*Rngs.*nnx\.split'):
        draw(nnx.Rngs(dropout=0))


@pytest.mark.parametrize('kind', ['shard_map', 'auto_axes'])
def test_inside_of_other_meshes(kind):
    convolve, inputs, kernel = convolution('channels first')
    inputs, kernel = (jnp.asarray(x, jnp.float32) for x in (inputs, kernel))
    axis_types = (AxisType.Auto if kind == 'shard_map' else AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ('data',), axis_types=axis_types)
    if kind == 'shard_map':
        inner = jax.shard_map(convolve, in_specs=(P('data'), P()), out_specs=P('data'))
    else:
        inner = jax.sharding.auto_axes(convolve, out_sharding=P())
    gradient = jax.grad(lambda kernel: jnp.sum(inner(inputs, kernel) ** 2))
    expected = jax.grad(lambda kernel: jnp.sum(convolve(inputs, kernel) ** 2))(kernel)
    with jax.set_mesh(mesh):
        found = jax.jit(convolutions.canonical(gradient))(kernel)
    chex.assert_trees_all_close(found, expected, rtol=1e-4)


def test_mini_batches_of_a_size_that_is_not_known(monkeypatch):
    in_portions(monkeypatch, 1)
    loss = lambda kernel, x: jnp.mean(lax.conv(x, kernel, (1, 1), 'SAME') ** 2)
    step = jax.jit(convolutions.canonical(jax.grad(loss)))
    (size,) = export.symbolic_shape('b')
    kernel, inputs = jnp.ones((2, 2, 3, 3)), jnp.ones((3, 2, 8, 8))
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in (kernel.shape, (size, *inputs.shape[1:]))
    ]
    exported = export.export(step)(*shapes)
    chex.assert_trees_all_close(
        exported.call(kernel, inputs), step(kernel, inputs), rtol=1e-5
    )


# On one device, which pytest's processes are not.
ON_ONE_DEVICE = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import vsam_jax
from vsam_jax import convolutions
assert jax.device_count() == 1
convolutions._CACHE = 1024
def loss_fn(kernel, stats, images, key):
    out = jax.lax.conv(images, kernel, (1, 1), 'SAME')
    return jnp.mean(out ** 2), (stats, None)
def number_of_convolutions(axis_types):
    state = vsam_jax.linen.TrainState.create(
        apply_fn=None, params=jnp.ones((4, 4, 3, 3)), tx=vsam_jax.sam(0.1))
    images = jnp.ones((64, 4, 8, 8))
    if axis_types is not None:
        mesh = jax.make_mesh((1,), ('data',), axis_types=axis_types)
        place = lambda x: jax.device_put(x, NamedSharding(mesh, P()))
        state, images = jax.tree.map(place, (state, images))
    step = vsam_jax.linen.make_train_step(loss_fn)
    return str(jax.make_jaxpr(step)(state, images)).count('conv_general_dilated[')
# Of two passes each: forward, the first portion, and the one in the loop.
print(number_of_convolutions(None), number_of_convolutions((AxisType.Auto,)),
      number_of_convolutions((AxisType.Explicit,)))
"""


@pytest.mark.subprocess
def test_steps_of_the_builders_are_in_portions_on_one_device():
    output = subprocess.run(
        [sys.executable, '-c', ON_ONE_DEVICE],
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # What a type says to lie on a mesh is not cut, be there only one device in it.
    assert output.split() == ['6', '6', '4']


def test_side_effects_stay():
    seen = []

    def told(x):
        jax.debug.callback(lambda value: seen.append(float(value)), x)
        return 2 * x

    assert jax.jit(convolutions.canonical(told))(jnp.array(3.0)) == 6
    jax.effects_barrier()
    assert seen == [3.0]


def test_wrapping_starts_no_backend(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', None)
    convolutions.canonical(lambda x: x)


@pytest.mark.parametrize(
    ('dimensions', 'inputs', 'kernel', 'outputs'),
    [
        (('HNWC', 'HWIO', 'HNWC'), P(None, 'data'), P(), P(None, 'data')),
        (('NHWC', 'HWIO', 'NHWC'), P(), P(None, None, None, 'data'), P('data')),
        (('NCHW', 'OIHW', 'NCHW'), P('data'), P(), P('data')),
    ],
)
def test_explicit_shardings_move_with_the_dimensions(
    dimensions, inputs, kernel, outputs
):
    mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Explicit,))
    sizes = {'N': 4, 'C': 4, 'I': 4, 'O': 4, 'H': 3, 'W': 5}
    place = lambda letters, spec: jax.device_put(
        np.random.default_rng(0).normal(size=[sizes[x] for x in letters]),
        NamedSharding(mesh, spec),
    )
    args = place(dimensions[0], inputs), place(dimensions[1], kernel)

    def loss(args):
        out = lax.conv_general_dilated(
            *args,
            (1, 1),
            'SAME',
            dimension_numbers=dimensions,
            out_sharding=NamedSharding(mesh, outputs),
        )
        return jnp.sum(jnp.sin(out))

    with jax.set_mesh(mesh):
        plain = jax.jit(jax.grad(loss))(args)
        fast = jax.jit(convolutions.canonical(jax.grad(loss)))(args)
    typed = lambda tree: [(x.shape, x.sharding.spec) for x in tree]
    assert typed(fast) == typed(plain)
    chex.assert_trees_all_close(fast, plain, rtol=1e-4, atol=1e-4)


def test_portions_fill_the_caches_of_all_cores(monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    for cores in (1, 3):
        monkeypatch.setattr(
            os, 'sched_getaffinity', lambda _, n=cores: set(range(n)), raising=False
        )
        assert convolutions._cache() == cores * convolutions._CACHE


def test_gradients_larger_than_what_they_are_summed_over_are_not_cut(monkeypatch):
    monkeypatch.setattr(convolutions, '_cache', lambda: 1)
    inputs = jnp.ones((8, 64, 1, 1))
    loss = lambda kernel: jnp.sum(lax.conv(inputs, kernel, (1, 1), 'SAME') ** 2)
    gradient = convolutions.canonical(jax.grad(loss))
    program = str(jax.make_jaxpr(gradient)(jnp.ones((64, 64, 1, 1))))
    assert program.count('conv_general_dilated[') == 2


def test_convolutions_keep_the_lines_they_were_written_on():
    inputs = jnp.ones((2, 3, 8, 8))
    convolve = lambda kernel: jnp.sum(lax.conv(inputs, kernel, (1, 1), 'SAME'))
    program = jax.make_jaxpr(convolutions.canonical(convolve))(jnp.ones((4, 3, 3, 3)))
    (found,) = [
        equation.source_info
        for equation in program.eqns
        if equation.primitive.name == 'conv_general_dilated'
    ]
    files = {frame.file_name for frame in found.traceback.frames}
    assert __file__ in files
