"""Convolutions in the order and the portions that the CPU is fast at."""

import functools
import os
import re
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import vsam_jax
from tests import problems
from vsam_jax import convolutions

pytestmark = pytest.mark.around


@pytest.fixture(autouse=True)
def every_fallback_warns(monkeypatch):
    """Not the first of a process only: pytest makes an error of each."""
    monkeypatch.setattr(convolutions, '_has_warned', False)
    monkeypatch.delenv('VSAM_JAX_CONVOLUTIONS', raising=False)


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


def conv(kernel, x):
    return lax.conv(x, kernel, (1, 1), 'SAME')


def gradient_of(block):
    """The gradients of a loss that calls a block, with respect to kernel and inputs."""
    loss = lambda kernel, x: jnp.sum(jnp.sin(block(kernel, x)))
    return jax.grad(loss, argnums=(0, 1))


@jax.custom_vjp
def with_vjp(kernel, x):
    return conv(kernel, x)


def with_vjp_backward(residuals, g):
    _, pull = jax.vjp(conv, *residuals)
    return jax.tree.map(lambda x: 0.5 * x, pull(g))


with_vjp.defvjp(lambda *args: (conv(*args), args), with_vjp_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_static(power, kernel, x):
    return conv(kernel, x) ** power


with_static.defvjp(
    lambda power, *args: (with_static(power, *args), args),
    lambda power, args, g: jax.vjp(lambda *a: power * conv(*a), *args)[1](g),
)


@jax.custom_jvp
def with_jvp(kernel, x):
    return conv(kernel, x)


@with_jvp.defjvp
def with_jvp_rule(primals, tangents):
    (kernel, x), (dk, dx) = primals, tangents
    return conv(kernel, x), 0.5 * conv(dk, x) + conv(kernel, dx)


def remat(policy):
    def block(kernel, x):
        y = checkpoint_name(conv(kernel, x), 'y')
        return conv(kernel, jnp.tanh(y))

    return gradient_of(jax.checkpoint(block, policy=policy))


POLICIES = jax.checkpoint_policies
CONSTANT = np.random.default_rng(1).normal(size=(2, 2, 3, 3))


def scanned(kernel, x):
    carry, ys = lax.scan(lambda c, _: (conv(kernel, c), jnp.sum(c)), x, length=2)
    return jnp.sum(carry) * ys[-1]


def while_loop(kernel, x):
    smaller = lambda c: c[0] < 2 + 0 * jnp.sum(conv(kernel, c[1]))
    grow = lambda c: (c[0] + 1, conv(kernel, c[1]))
    return lax.while_loop(smaller, grow, (0.0, x))[1]


def fori_loop(kernel, x):
    step = lambda i, k: k - 0.01 * (i + 1) * gradient_of(conv)(k, x)[0]
    return lax.fori_loop(0, 2, step, kernel)


def switch(kernel, x):
    branches = [conv, lambda kernel, x: conv(kernel, conv(kernel, x)), lambda _, x: x]
    return lax.switch(jnp.sum(x > 0) % 3, branches, kernel, x)


def with_keys(kernel, x):
    key, raw = jax.random.key(0), jax.random.PRNGKey(1)
    noise = jax.random.uniform(key)
    block = lambda kernel, x: conv(kernel, x) * noise
    # Keys are arguments and results of what is rewritten, too.
    draw = convolutions.canonical(
        lambda keys: (jax.random.split(keys), jnp.sum(conv(kernel, x)))
    )
    keys, number = draw(key)
    return gradient_of(block)(kernel, x), jax.random.key_data(keys), number, raw


def with_a_reference(kernel, x):
    sums = jax.new_ref(jnp.zeros_like(x))
    sums[...] += conv(kernel, x)
    sums[...] *= 2
    return sums[...]


def donated(kernel, x):
    return jax.jit(gradient_of(conv), donate_argnums=(0,))(kernel + 1, x)


def duplicated(kernel, x):
    y = conv(kernel, x)
    return y, {'again': y, 'given': x, 'and': [x, kernel]}


def python_scalars(kernel, x):
    return 1, 2.5, True, gradient_of(conv)(kernel, x), 0.0


def called_back(kernel, x):
    x = x.astype(jnp.float32)  # Callbacks run in other threads, without 64 bits.
    told = jax.pure_callback(np.sin, x, x, vmap_method='expand_dims')
    return conv(kernel, told.astype(kernel.dtype))


def printed(kernel, x):
    y = conv(kernel, x)
    jax.debug.print('{y}', y=jnp.sum(y))
    return gradient_of(conv)(kernel, y)


NO_GRADIENT = {'gradient of a closure'}
# Functions, and where JAX does not allow them.
FUNCTIONS = {
    'custom_vjp': (gradient_of(with_vjp), {}),
    'custom_vjp, its gradient outside': (with_vjp, {}),
    'custom_vjp with what is no array': (
        gradient_of(functools.partial(with_static, 2)),
        {},
    ),
    'custom_jvp': (gradient_of(with_jvp), {}),
    'custom_jvp, its gradient outside': (with_jvp, {}),
    'checkpoint that saves nothing': (remat(POLICIES.nothing_saveable), {}),
    'checkpoint that saves dots': (remat(POLICIES.dots_saveable), {}),
    'checkpoint of names': (remat(POLICIES.save_only_these_names('y')), {}),
    'scan': (gradient_of(scanned), {}),
    'while': (while_loop, NO_GRADIENT),
    'fori': (fori_loop, {}),
    'switch': (gradient_of(switch), {}),
    'a constant': (lambda _, x: gradient_of(conv)(CONSTANT, x), {}),
    'an array as a constant': (lambda _, x: conv(jnp.array(CONSTANT), x), {}),
    'jit in jit': (jax.jit(jax.jit(gradient_of(jax.jit(conv)))), {}),
    'donated inside': (donated, {}),
    'keys': (with_keys, {}),
    'a reference': (with_a_reference, {}),
    'given and duplicated': (duplicated, {}),
    'nothing but what is given': (lambda kernel, x: (x, kernel, x), {}),
    'Python scalars': (python_scalars, {}),
    'pure_callback': (called_back, NO_GRADIENT),
    'debug.print': (printed, {}),
}
# One for each way in which a function is taken apart and put together.
TRICKY = (
    'custom_vjp',
    'custom_jvp',
    'checkpoint of names',
    'scan',
    'while',
    'a constant',
    'jit in jit',
    'donated inside',
    'a reference',
    'given and duplicated',
    'pure_callback',
)


def in_surroundings(wrap, function, forbidden):
    """A function that uses another in each kind of surroundings.

    Args:
        wrap: what to do with the function.
        function: of a kernel and images.
        forbidden: the names of the surroundings to leave out.
    """
    closed = lambda *args: wrap(lambda: function(*args))()
    wrapped = wrap(function)

    def total(function):
        leaves = lambda *args: jax.tree.leaves(function(*args))
        is_float = lambda x: jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
        return lambda *args: sum(
            jnp.sum(jnp.cos(x)) for x in leaves(*args) if is_float(x)
        )

    def scan(function):
        return lambda kernel, x: lax.scan(
            lambda c, s: (c, function(c, s * x)), kernel, jnp.array([1.0, 0.5])
        )

    def vmap(function):
        return lambda kernel, x: jax.vmap(function, (None, 0))(
            kernel, jnp.stack([x, 0.5 * x])
        )

    surroundings = {
        'jit': wrapped,
        'closure': closed,
        'scan': scan(wrapped),
        'vmap of a closure': vmap(closed),
        'gradient of a closure': jax.grad(total(closed)),
        'branch': lambda *args: lax.cond(
            jnp.sum(args[1]) > 0, closed, lambda *args: function(*args), *args
        ),
    }
    return lambda *args: {
        name: f(*args) for name, f in surroundings.items() if name not in forbidden
    }


@pytest.fixture
def kernel_and_images():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 2, 3, 3)), rng.normal(size=(3, 2, 4, 4))


@pytest.mark.parametrize('name', problems.slow_but(TRICKY, FUNCTIONS))
def test_functions_of_users_in_all_surroundings(
    name, kernel_and_images, monkeypatch, x64
):
    in_portions(monkeypatch, 1)
    function, forbidden = FUNCTIONS[name]
    plain = jax.jit(in_surroundings(lambda f: f, function, forbidden))
    fast = jax.jit(in_surroundings(convolutions.canonical, function, forbidden))
    expected, found = plain(*kernel_and_images), fast(*kernel_and_images)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    typed = lambda tree: jax.tree.map(lambda x: x.weak_type, tree)
    assert typed(found) == typed(expected)
    # Sums of a few hundred terms that cancel each other in part.
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)


def emit_debug(tell, x):
    jax.debug.callback(tell, x)


def emit_ordered_debug(tell, x):
    jax.debug.callback(tell, x, ordered=True)


def emit_io(tell, x):
    io_callback(tell, None, x)


def emit_ordered_io(tell, x):
    io_callback(tell, None, x, ordered=True)


EFFECTS = {
    'debug': emit_debug,
    'ordered debug': emit_ordered_debug,
    'io': emit_io,
    'ordered io': emit_ordered_io,
}


@pytest.mark.parametrize('name', EFFECTS)
def test_side_effects_happen_as_often_as_before(name, kernel_and_images):
    kernel, images = (jnp.asarray(x, jnp.float32) for x in kernel_and_images)
    emit, seen = EFFECTS[name], []
    tell = lambda x: seen.append(round(float(x), 3))

    def function(kernel, x):
        emit(tell, 0)

        def body(i, k):
            k = k - 0.01 * gradient_of(conv)(k, x)[0]
            emit(tell, i + 1)
            return k

        kernel = lax.fori_loop(0, 3, body, kernel)
        told = lambda k: emit(tell, 10) or conv(k, x)
        y = lax.cond(jnp.sum(kernel**2) > 0, told, lambda k: conv(k, 2 * x), kernel)
        emit(tell, 20)
        return y

    def happened(function):
        looped = lambda k, x: lax.scan(
            lambda c, x: (c, function(c, x)), k, jnp.stack([x, x])
        )
        for run in (function, looped):
            jax.block_until_ready(jax.jit(run)(kernel, images))
            jax.effects_barrier()
        found = list(seen)
        seen.clear()
        return found if 'ordered' in name else sorted(found)

    expected = happened(function)
    assert len(expected) == 18
    assert happened(convolutions.canonical(function)) == expected


def test_callbacks_that_return_happen_as_often_as_before(kernel_and_images):
    kernel, images = (jnp.asarray(x, jnp.float32) for x in kernel_and_images)
    seen = []

    def doubled(x):
        seen.append(x.shape)
        return np.asarray(2 * x)

    call_pure = lambda x: jax.pure_callback(doubled, x, x, vmap_method='sequential')
    call_io = lambda x: io_callback(doubled, x, x)

    def number(wrap, call):
        function = wrap(lambda kernel, x: conv(kernel, call(x)))
        mapped = jax.vmap(function, (None, 0))
        jax.block_until_ready(jax.jit(function)(kernel, images))
        if call is call_pure:
            jax.block_until_ready(jax.jit(mapped)(kernel, jnp.stack([images] * 3)))
        found = list(seen)
        seen.clear()
        return found

    for call, times in ((call_pure, 4), (call_io, 1)):
        expected = number(lambda f: f, call)
        assert len(expected) == times
        assert number(convolutions.canonical, call) == expected


def test_donated_arguments_are_given_away(kernel_and_images):
    kernel, images = kernel_and_images
    step = lambda kernel: kernel - gradient_of(conv)(kernel, images)[0]
    expected = step(jnp.asarray(kernel, jnp.float32))
    given = jnp.asarray(kernel, jnp.float32)
    found = jax.jit(convolutions.canonical(step), donate_argnums=0)(given)
    assert given.is_deleted()
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_python_scalars_and_arrays_with_values_stay_what_they_are():
    seen = []

    def function(x, mask, array):
        seen.append((type(mask), float(array)) if isinstance(mask, np.ndarray) else 0)
        return 1, 2.5, True, None, mask, array, x[mask]

    array = jnp.array(1.0)

    @jax.jit
    def outer(x):
        mask = np.array([True, False, True])
        result = convolutions.canonical(function)(x, mask, array)
        one, half, true, none, same_mask, same_array, picked = result
        assert (one, half, true, none) == (1, 2.5, True, None)
        assert type(one) is int
        assert type(half) is float
        assert same_mask is mask
        assert same_array is array
        return picked

    chex.assert_trees_all_equal(outer(jnp.arange(3.0)), jnp.array([0.0, 2.0]))


def test_names_of_mapped_axes_are_known_inside(kernel_and_images):
    kernel, images = (jnp.asarray(x, jnp.float32) for x in kernel_and_images)

    def function(kernel, x):
        gradients = gradient_of(conv)(kernel, x)
        return lax.pmean(gradients, 'i'), lax.axis_index('i')

    mapped = lambda f: jax.jit(jax.vmap(f, (None, 0), axis_name='i'))
    args = kernel, jnp.stack([images, 2 * images])
    chex.assert_trees_all_close(
        mapped(convolutions.canonical(function))(*args),
        mapped(function)(*args),
        rtol=1e-4,
        atol=1e-5,
    )


def test_references_from_outside_are_written_once(kernel_and_images):
    kernel, images = (jnp.asarray(x, jnp.float32) for x in kernel_and_images)
    count, closed = jax.new_ref(jnp.zeros(())), jax.new_ref(jnp.zeros(()))

    def function(count, kernel):
        count[...] += 1
        closed[...] += 2
        return gradient_of(conv)(kernel, images)

    jax.jit(convolutions.canonical(function))(count, kernel)
    assert (count[...], closed[...]) == (1, 2)


def is_rewritten(function, args):
    # Another function, which jit has not seen yet.
    found = orders(lambda args: function(args), args)
    return '[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]' in found


def test_the_switch(monkeypatch):
    function, args = gradient('channels first')
    args = [jnp.asarray(x, jnp.float32) for x in args]
    # Wrapped before the variable is set: it is read in the call.
    default, on, off = (
        convolutions.canonical(function, enabled=x) for x in (None, True, False)
    )
    switched = lambda: [is_rewritten(f, args) for f in (default, on, off)]
    assert switched() == [True, True, False]
    monkeypatch.setenv('VSAM_JAX_CONVOLUTIONS', '0')
    assert switched() == [False, True, False]
    monkeypatch.setenv('VSAM_JAX_CONVOLUTIONS', '1')
    assert switched() == [True, True, False]


@pytest.mark.parametrize('value', ['', 'off', 'true', '2'])
def test_a_switch_that_says_neither_is_refused(value, monkeypatch):
    identity = lambda x: x
    monkeypatch.setenv('VSAM_JAX_CONVOLUTIONS', value)
    wrapped = convolutions.canonical(identity)
    message = f"VSAM_JAX_CONVOLUTIONS must be 1 .* or 0 .*, got '{value}'"
    for call in (wrapped, jax.jit(wrapped)):
        with pytest.raises(ValueError, match=message):
            call(1.0)
    assert convolutions.canonical(identity, enabled=True)(1.0) == 1
    with pytest.raises(TypeError, match="enabled must be a bool or None, got '0'"):
        convolutions.canonical(identity, enabled='0')


def test_conditionals_and_builders_follow_the_variable(monkeypatch):
    state = vsam_jax.linen.TrainState.create(
        apply_fn=None, params=[jnp.ones((2, 2, 3, 3))], tx=vsam_jax.vsam(0.1)
    )
    loss_fn = lambda w, stats, batch, key: (conv_loss(w, batch), (stats, None))

    def found():
        step = vsam_jax.linen.make_train_step(loss_fn)
        traced = lambda state, images: step(state, images)
        return set(orders(traced, state, jnp.ones((2, 2, 4, 4))))

    assert found() == {'[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]'}
    monkeypatch.setenv('VSAM_JAX_CONVOLUTIONS', '0')
    # Those of JAX: forward, and the gradient of the kernel.
    assert found() == {
        '[b, f, 0, 1]x[o, i, 0, 1]->[b, f, 0, 1]',
        '[f, b, 0, 1]x[i, o, 0, 1]->[f, b, 0, 1]',
    }


def broken_rewriting(monkeypatch):
    def fail(*_):
        raise AttributeError('no eqns')

    monkeypatch.setattr(convolutions, '_transposed', fail)


def broken_types(monkeypatch):
    # A program of another type than what it stands for.
    monkeypatch.setattr(
        convolutions,
        '_in_closed',
        lambda program, _: jax.make_jaxpr(
            lambda *args: [
                x.astype(jnp.bfloat16)
                for x in convolutions.core.jaxpr_as_fun(program)(*args)
            ]
        )(*program.in_avals),
    )


def broken_evaluation(monkeypatch):
    def halfway(*args):
        lax.tan(args[0])
        raise RuntimeError('in the middle')

    monkeypatch.setattr(convolutions.core, 'jaxpr_as_fun', lambda _: halfway)


def broken_internals(monkeypatch):
    monkeypatch.delattr(convolutions.core, 'primitives')


BROKEN = {
    'AttributeError: no eqns': broken_rewriting,
    'TypeError: types .*float32.* became .*bfloat16': broken_types,
    'RuntimeError: in the middle': broken_evaluation,
    'AttributeError: .*primitives': broken_internals,
}


@pytest.mark.parametrize('message', BROKEN)
def test_what_cannot_be_rewritten_stays_as_it_is(
    message, monkeypatch, kernel_and_images
):
    args = [jnp.asarray(x, jnp.float32) for x in kernel_and_images]
    plain = lambda *args: gradient_of(conv)(*args)
    wrapped = convolutions.canonical(plain)
    expected = str(jax.make_jaxpr(plain)(*args))
    BROKEN[message](monkeypatch)
    warning = f'{message}.*jax {re.escape(jax.__version__)}.*VSAM_JAX_CONVOLUTIONS=0'
    with pytest.warns(RuntimeWarning, match=f'(?s){warning}') as caught:
        found = str(jax.make_jaxpr(wrapped)(*args))
    assert len(caught) == 1
    # Nothing is left of the attempt.
    assert found == expected
    with warnings.catch_warnings(action='error'):  # Once a process.
        again = jax.make_jaxpr(lambda *args: wrapped(*args))(*args)
    assert str(again) == expected


def test_silenced_fallbacks(monkeypatch, kernel_and_images):
    args = [jnp.asarray(x, jnp.float32) for x in kernel_and_images]
    broken_rewriting(monkeypatch)
    monkeypatch.setenv('VSAM_JAX_CONVOLUTIONS', '0')
    jax.make_jaxpr(convolutions.canonical(gradient_of(conv)))(*args)
    monkeypatch.delenv('VSAM_JAX_CONVOLUTIONS')
    jax.make_jaxpr(convolutions.canonical(gradient_of(conv), enabled=False))(*args)


def test_errors_of_the_function_are_its_own():
    calls = []

    class OwnError(Exception):
        pass

    def function(x):
        calls.append(x)
        raise OwnError('mine')

    # A warning would be an error here.
    with pytest.raises(OwnError, match=r'^mine') as caught:
        jax.jit(convolutions.canonical(function))(1.0)
    assert caught.value.__cause__ is None
    assert len(calls) == 1


def test_errors_of_outer_transformations_are_their_own(kernel_and_images):
    kernel, images = (jnp.asarray(x, jnp.float32) for x in kernel_and_images)
    calls = []

    def function(kernel):
        calls.append(kernel)
        io_callback(lambda _: None, None, kernel, ordered=True)
        return jnp.sum(conv(kernel, images))

    wrapped = convolutions.canonical(function)
    with pytest.raises(ValueError, match=r'Cannot `vmap` ordered IO'):
        jax.jit(jax.vmap(wrapped))(jnp.stack([kernel]))
    assert len(calls) == 1


WITHOUT_FLAX = """
import importlib.util, sys
sys.modules['flax'] = None
spec = importlib.util.spec_from_file_location('convolutions', sys.argv[1])
convolutions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convolutions)
import jax, jax.numpy as jnp
x = jnp.ones((1, 1, 4, 4))
loss = lambda kernel: jnp.mean(jax.lax.conv(x, kernel, (1, 1), 'SAME') ** 2)
print(jax.jit(convolutions.canonical(jax.grad(loss)))(jnp.ones((1, 1, 3, 3))).shape)
"""


def test_flax_is_not_needed():
    output = subprocess.run(
        [sys.executable, '-c', WITHOUT_FLAX, convolutions.__file__],
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.split('\n')[0] == '(1, 1, 3, 3)'


def test_what_is_public():
    assert convolutions.__all__ == ['canonical']
