"""Many devices: shardings, mapped axes, several processes, other platforms."""

import contextlib
import functools
import itertools
import json
import pathlib
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import dynamic_scale
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import vsam_jax
from tests import problems, processes
from tests.library.sharded_runs import (
    LAYOUTS,
    METHODS,
    STEPS,
    batches,
    driver,
    loss_fn,
    mapped_step,
    optimizer,
    own_step,
    radius,
)
from vsam_jax._state import only_state, states_in

pytestmark = pytest.mark.around
# They differ in what devices have to agree on: a plan, nothing, a decision, no method.
FEW_METHODS = ('vsam', 'sam', 'aesam', 'sgd')


def first_state(tx: optax.GradientTransformation) -> tuple[Any, Any]:
    params = problems.mlp_params(dtype=jnp.float64)
    return params, tx.init(params)


def train(step: Any, state: Any, data: Any) -> tuple[Any, list[bool]]:
    """The last state, and which steps were sampled."""
    sampled = []
    for batch in data:
        state, _ = step(state, batch)
        sampled.append(any(bool(x.sampled) for x in states_in(state)))
    return state, sampled


@functools.cache
def on_one_device(method: str, steps: int = STEPS) -> tuple[Any, list[bool]]:
    tx = optimizer(method)
    step = jax.jit(problems.make_step(tx, loss_fn))
    return train(step, first_state(tx), batches()[:steps])


def assert_same_run(
    run: tuple[Any, list[bool]], other: tuple[Any, list[bool]], tolerance: float = 1e-12
) -> None:
    assert run[1] == other[1]
    problems.assert_close(run[0], other[0], atol=tolerance, rtol=10 * tolerance)


def shares(batch: Any) -> Any:
    """A mini-batch cut into the shares of eight devices."""
    return jax.tree.map(lambda a: a.reshape(8, -1, *a.shape[1:]), batch)


def assert_same_bits_everywhere(tree: Any) -> None:
    """Whether eight devices hold the same, looked at one by one."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    for leaf in jax.tree.leaves(tree):
        leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
        copies = {np.asarray(s.data).tobytes() for s in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == 8
        assert len(copies) == 1


def array_types(tree: Any) -> Any:
    return jax.tree.map(lambda x: (jax.typeof(x), x.weak_type, x.sharding), tree)


# --- jit with shardings -------------------------------------------------------


@pytest.mark.parametrize(
    ('method', 'planned', 'layout', 'axis_type'),
    [
        ('vsam', True, 'replicated', AxisType.Auto),
        ('vsam', False, 'replicated', AxisType.Explicit),
        *problems.slow_but(
            [
                ('vsam', True, 'fsdp', AxisType.Explicit),
                ('vsam', False, 'fsdp', AxisType.Auto),
            ],
            itertools.product(
                ['vsam'], [True, False], ['fsdp'], [AxisType.Auto, AxisType.Explicit]
            ),
        ),
        # What a rule may write (a reshape) is a type error on sharded dimensions.
        ('asam', False, 'fsdp', AxisType.Explicit),
        ('looksam', False, 'fsdp', AxisType.Explicit),
    ],
)
@pytest.mark.usefixtures('x64')
def test_a_sharded_run_is_the_run_on_one_device(method, planned, layout, axis_type):
    specs = LAYOUTS[layout]
    mesh = jax.make_mesh((8,), ('data',), axis_types=(axis_type,))
    split = lambda batch: jax.device_put(batch, NamedSharding(mesh, P('data')))
    tx = optimizer(method)
    with jax.set_mesh(mesh):
        params = problems.mlp_params(dtype=jnp.float64)
        params = [
            jax.device_put(p, NamedSharding(mesh, s))
            for p, s in zip(params, specs, strict=True)
        ]
        make_state = lambda params: (params, tx.init(params))
        options = {}
        if axis_type == AxisType.Auto:
            shardings = vsam_jax.sharding.state_shardings(
                jax.eval_shape(make_state, params), params
            )
            options = {'out_shardings': (shardings, None)}
            make_state = jax.jit(make_state, out_shardings=shardings)
        else:
            make_state = jax.jit(make_state)
        state = make_state(params)
        before = array_types(state)
        step = driver(problems.make_step(tx, loss_fn), planned, **options)
        state, sampled = train(step, state, map(split, batches()))
    assert array_types(state) == before
    inner = only_state(state)
    if inner.psf is not None:
        for s, spec in zip(inner.psf, specs, strict=True):
            assert s.sharding.is_equivalent_to(NamedSharding(mesh, spec), s.ndim)
    for leaf in jax.tree.leaves(inner._replace(psf=None)):
        assert leaf.sharding.is_fully_replicated
    programs = step._programs.values() if planned else [step]
    assert all(program._cache_size() <= 1 for program in programs)
    assert_same_run((state, sampled), on_one_device(method))


def test_shardings_of_a_state_follow_the_parameters():
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
    params = {
        'a': {'w': jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=split)},
        'w': jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=whole),
        'b': jax.ShapeDtypeStruct((8,), jnp.float32, sharding=split),
    }
    tx = optax.chain(
        # A plan and rings of length 8, which are not the bias of that length.
        vsam_jax.vsam(window=8, segments=2),
        optax.masked(optax.trace(0.9), {'a': True, 'w': True, 'b': False}),
        # Holds factors: at the path of a parameter, but of other shapes.
        optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    )
    make_state = lambda params: vsam_jax.linen.TrainState.create(
        apply_fn=lambda: None, params=params, tx=tx, dropout_key=jax.random.key(0)
    )
    shapes = jax.eval_shape(make_state, params)
    shardings = vsam_jax.sharding.state_shardings(shapes, params)
    expected = {'a': {'w': split}, 'w': whole, 'b': split}
    inner, masked, factored = shardings.opt_state
    assert shardings.params == expected
    assert inner.psf == expected
    assert set(jax.tree.leaves(inner._replace(psf=None))) == {whole}
    assert masked.inner_state.trace['a'] == {'w': split}
    assert masked.inner_state.trace['w'] == whole
    assert shapes.opt_state[2].v_row['a']['w'].shape == (3,)
    assert factored.v_row['a']['w'] == whole
    assert shardings.step == shardings.dropout_key == whole


def test_parameters_without_a_mesh_have_no_shardings_to_follow():
    params = {'w': jnp.ones(3)}
    with pytest.raises(ValueError, match=r"params must .* at \['w'\] the sharding is"):
        vsam_jax.sharding.state_shardings(params, params)
    two = [jax.make_mesh((n,), ('data',)) for n in (1, 2)]
    params = [
        jax.ShapeDtypeStruct((2,), jnp.float32, sharding=NamedSharding(mesh, P()))
        for mesh in two
    ]
    with pytest.raises(ValueError, match=r'params must .* got 2 meshes'):
        vsam_jax.sharding.state_shardings(params, params)


# --- One program per device ---------------------------------------------------


def along(method: str, g: Any, memory: Any) -> Any:
    """What a method climbs, of a gradient and of what it keeps of those before."""
    if method == 'asyncsam':
        return memory
    if method not in ('fsam', 'vasso'):
        return g
    mix = {'fsam': lambda g, m: g - m, 'vasso': lambda g, m: 0.4 * g + 0.6 * m}[method]
    mixed = jax.tree.map(mix, g, memory.mean)
    return jax.tree.map(lambda a, b: jnp.where(memory.started, a, b), mixed, g)


@functools.cache
def by_hand(method: str, steps: int = STEPS) -> tuple[Any, list[bool]]:
    """One perturbation per device, on one device: the mean second gradient is
    formed by the gradient function, from each share's own gradient."""
    tx, rho = optimizer(method), radius(method)

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        shares = jax.tree.map(lambda a: a.reshape(8, -1, *a.shape[1:]), batch)
        gradient = jax.grad(loss_fn)

        def second(share):
            g = gradient(params, share)
            if method.startswith('asam'):
                eta = 0.01 if method == 'asam' else 0.0
                t = jax.tree.map(lambda w: jnp.abs(w) + eta, params)
                norm = optax.tree.norm(jax.tree.map(jnp.multiply, t, g))
                ascent = jax.tree.map(lambda t, g: rho * t**2 * g / norm, t, g)
            else:
                g = along(method, g, opt_state[0].perturbation_memory)
                norm = optax.tree.norm(g) + 1e-12
                ascent = jax.tree.map(lambda g: rho * g / norm, g)
            perturbed = jax.tree.map(jnp.add, params, ascent)
            return jax.value_and_grad(loss_fn)(perturbed, share)

        mean_second = jax.tree.map(lambda g: g.mean(0), jax.vmap(second)(shares))
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=value, grad_fn=lambda _: mean_second
        )
        return (optax.apply_updates(params, updates), opt_state), None

    return train(step, first_state(tx), batches()[:steps])


@pytest.mark.parametrize('planned', [True, False])
@pytest.mark.usefixtures('x64')
def test_devices_share_a_perturbation(planned):
    # Of the other methods: test_every_method_trains_one_model.
    assert_same_run(over_devices('vsam', planned), on_one_device('vsam'), 1e-11)


@pytest.mark.usefixtures('x64')
def test_a_planned_step_has_a_perturbation_per_device():
    run = over_devices('vsam', planned=True, per_device=True)
    assert_same_run(run, by_hand('vsam'), 1e-11)


# AsyncSAM's perturbation is that of the mean.
@pytest.mark.parametrize(
    'method',
    problems.slow_but((*FEW_METHODS, 'vasso'), [m for m in METHODS if m != 'asyncsam']),
)
@pytest.mark.usefixtures('x64')
def test_devices_have_a_perturbation_each(method):
    run = over_devices(method, planned=False, per_device=True)
    # ASAM's scales of small weights carry rounding on.
    assert_same_run(run, by_hand(method), 1e-11)


def over_devices(method: str, planned: bool, per_device: bool = False) -> Any:
    tx = optimizer(method)
    step = mapped_step(tx, axis_name='data', per_device=per_device)
    # That shard_map accepts out_specs=P() proves the state to be the same on all.
    return train(driver(step, planned), first_state(tx), batches())


@pytest.mark.usefixtures('x64')
def test_the_two_choices_differ():
    shared, own = on_one_device('vsam')[0][0], by_hand('vsam')[0][0]
    assert optax.tree.norm(optax.tree.sub(shared, own)) > 1e-3


@pytest.mark.usefixtures('x64')
def test_without_vma_checks_all_devices_hold_the_same_bits():
    tx = optimizer('vsam')
    step = mapped_step(tx, None, check_vma=False, axis_name='data', per_device=True)
    run = train(jax.jit(step), first_state(tx), batches())
    assert_same_bits_everywhere(run[0])
    assert_same_run(run, by_hand('vsam'))


@pytest.mark.parametrize(
    ('mapping', 'per_device'), [(jax.pmap, False), (jax.pmap, True), (jax.vmap, True)]
)
@pytest.mark.usefixtures('x64')
def test_axis_name_works_under_pmap_and_vmap(mapping, per_device):
    tx = optimizer('vsam')
    step = own_step(tx, axis_name='data', per_device=per_device)
    step = mapping(step, axis_name='data', in_axes=(None, 0), out_axes=None)
    run = train(jax.jit(step), first_state(tx), map(shares, batches()))
    assert_same_run(run, by_hand('vsam') if per_device else on_one_device('vsam'))


@pytest.mark.usefixtures('x64')
def test_gradients_that_are_means_already_need_no_axis_name():
    tx = optimizer('vsam')
    mean_loss = lambda p, batch: jax.lax.pmean(loss_fn(p, batch), 'data')
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))

    own = problems.make_step(tx, mean_loss)
    step = jax.shard_map(own, mesh=mesh, in_specs=(P(), P('data')), out_specs=P())
    run = train(jax.jit(step), first_state(tx), batches())
    assert_same_run(run, on_one_device('vsam'))


@pytest.mark.usefixtures('x64')
def test_several_axes_and_a_frozen_tensor():
    """What is not perturbed has a second gradient on each device all the same."""
    data = batches()[:3]
    tx = optimizer('sam', perturb_mask=[False] + 5 * [True])
    # Under vmap no gradient is summed by itself.
    step = own_step(tx, axis_name='data', per_device=True)
    step = jax.vmap(step, axis_name='data', in_axes=(None, 0), out_axes=None)
    one_axis = train(jax.jit(step), first_state(tx), map(shares, data))

    axes = ('host', 'data')
    mesh = jax.make_mesh((4, 2), axes, axis_types=(AxisType.Auto,) * 2)
    step = own_step(tx, axes, axis_name=axes, per_device=True)
    step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P())
    assert_same_run(train(jax.jit(step), first_state(tx), data), one_axis)


class Network(nn.Module):
    """BatchNorm over all devices of an axis, if there is one."""

    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = {'param_dtype': jnp.float64}
        norm = nn.BatchNorm(
            use_running_average=False, axis_name=self.axis_name, **options
        )
        x = norm(nn.tanh(nn.Dense(8, **options)(x)))
        return nn.Dense(3, **options)(x)


def flax_run(
    axis_name: str | None, tx: Any, num_micro_batches: int = 1, **options: Any
) -> Any:
    """Ten steps of the step builder, on one device or under shard_map."""
    network = Network(axis_name)

    def loss(params, batch_stats, batch, key):
        x, y = batch
        variables = {'params': params, 'batch_stats': batch_stats}
        out, updated = network.apply(variables, x, mutable=['batch_stats'])
        return jnp.mean((out - y) ** 2), (updated['batch_stats'], out)

    step = vsam_jax.linen.make_train_step(
        loss, num_micro_batches=num_micro_batches, axis_name=axis_name
    )
    if axis_name is not None:
        mesh = jax.make_mesh((8,), (axis_name,), axis_types=(AxisType.Auto,))
        specs = P(), P(axis_name)
        step = jax.shard_map(
            step, mesh=mesh, in_specs=specs, out_specs=specs, **options
        )
    state = vsam_jax.linen.TrainState.create(
        apply_fn=network.apply,
        **Network(None).init(jax.random.key(0), batches()[0][0]),
        tx=tx,
        dynamic_scale=dynamic_scale.DynamicScale(),
    )
    return train(jax.jit(step), state, batches()[:10])


@pytest.mark.usefixtures('x64')
def test_the_flax_step_over_devices_is_that_of_one_device():
    run = flax_run('data', optimizer('vsam'))
    reference = flax_run(None, optimizer('vsam'))
    fields = lambda run: (run[0].params, run[0].batch_stats, run[0].opt_state)
    # The loss scale of flax brings gradients to float32.
    assert_same_run((fields(run), run[1]), (fields(reference), reference[1]), 1e-6)


@pytest.mark.usefixtures('x64')
def test_micro_batches_and_batchnorm_over_devices():
    run, _ = flax_run('data', optimizer('vsam'), num_micro_batches=2)
    for leaf in jax.tree.leaves((run.params, run.batch_stats)):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all((shard == shards[0]).all() for shard in shards)
        assert np.isfinite(shards[0]).all()
    # Running statistics went through both parts of all ten mini-batches.
    mean = run.batch_stats['BatchNorm_0']['mean']
    whole = flax_run(None, optimizer('vsam'))[0].batch_stats['BatchNorm_0']['mean']
    np.testing.assert_allclose(mean, whole, atol=0.2)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('check_vma', [True, False])
def test_gradients_of_other_optimizers_are_averaged_over_devices(check_vma):
    run = flax_run('data', optax.adam(0.1), check_vma=check_vma)
    # Of all devices, not of the one that is shown.
    for leaf in jax.tree.leaves(run[0].params):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all((shard == shards[0]).all() for shard in shards)
    fields = lambda run: (run[0].params, run[0].batch_stats, run[0].opt_state)
    problems.assert_close(fields(run), fields(flax_run(None, optax.adam(0.1))), 1e-5)


@pytest.mark.usefixtures('x64')
def test_each_device_has_its_own_dropout_mask():
    masks = []

    def loss(params, batch_stats, batch, key):
        # The mask does not depend on the loss: 32 flips of a coin a part.
        return jnp.sum(params**2), (batch_stats, jax.random.bits(key, (1,)))

    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    state = vsam_jax.linen.TrainState.create(
        apply_fn=lambda: None,
        params=jnp.ones(2),
        tx=optimizer('sam'),
        dropout_key=jax.random.key(2),
    )
    step = jax.shard_map(
        vsam_jax.linen.make_train_step(loss, axis_name='data', num_micro_batches=2),
        mesh=mesh,
        in_specs=(P(), P('data')),
        out_specs=(P(), P('data')),
    )
    for batch in batches()[:2]:
        state, bits = jax.jit(step)(state, batch)
        masks += np.asarray(bits).ravel().tolist()
    assert len(set(masks)) == 2 * 8 * 2


def test_a_gradient_that_was_summed_over_the_devices_is_refused():
    tx = optimizer('vsam')
    params = problems.mlp_params()
    x, y = problems.mlp_batches(1)[0]
    with pytest.raises(ValueError, match=r"updates must be each device's own.*pcast"):
        jax.eval_shape(
            mapped_step(tx, None, axis_name='data'),
            (params, tx.init(params)),
            (x, jax.nn.one_hot(y, 3)),
        )


@pytest.mark.parametrize('method', METHODS)
def test_wrong_axis_arguments_are_named(method):
    tx, w = METHODS[method](0.1), jnp.ones(2)
    update = functools.partial(
        tx.update, w, tx.init(w), w, grad_fn=lambda w: w, sample=True
    )
    assert_wrong_axis_arguments_are_named(update)


@pytest.mark.parametrize('framework', ['linen', 'nnx'])
def test_wrong_axis_arguments_of_a_builder_are_named(framework):
    build = getattr(vsam_jax, framework).make_train_step
    assert_wrong_axis_arguments_are_named(functools.partial(build, lambda *_: None))


def assert_wrong_axis_arguments_are_named(call: Any) -> None:
    with pytest.raises(ValueError, match='per_device must be False where axis_name is'):
        call(per_device=True)
    with pytest.raises(ValueError, match=r'per_device must be False .* is \(\), got'):
        call(axis_name=(), per_device=True)
    with pytest.raises(TypeError, match=r'axis_name must be None, .* got 3\.'):
        call(axis_name=3)
    with pytest.raises(TypeError, match=r"axis_name must be None, .* got \('a', 3\)\."):
        call(axis_name=('a', 3))
    with pytest.raises(TypeError, match=r'per_device must be True or False, got 1\.'):
        call(per_device=1)


# --- Steps that are built, in both frameworks ---------------------------------


MAPPINGS = ['checked', 'unchecked', 'pmap']
FEW = 5  # Steps: samples and reuse in every method that reuses.


def mapped(step: Any, mapping: str) -> Any:
    """``(state, batch) -> (state, aux)`` over eight devices that begin alike."""
    if mapping == 'pmap':
        # Each device's own state comes back, whatever the others have.
        step = jax.pmap(step, axis_name='data', in_axes=(0, 0))
        return lambda state, batch: step(state, shares(batch))
    return jax.jit(
        jax.shard_map(
            step,
            mesh=jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P('data')),
            out_specs=(P(), P('data')),
            check_vma=mapping == 'checked',
        )
    )


def begin(state: Any, mapping: str) -> Any:
    if mapping != 'pmap':
        return state
    return jax.tree.map(lambda x: jnp.stack([x] * 8), state)


def first_of(state: Any, mapping: str) -> Any:
    """The state of one device, after all were seen to have the same."""
    assert_same_bits_everywhere(state)
    return on_device(state, 0) if mapping == 'pmap' else state


def on_device(state: Any, device: int) -> Any:
    """What jax.pmap left on one device."""
    # Read there: a gather over all devices, outside of any program, may wait for ever
    # where there are fewer cores than devices.
    return jax.tree.map(lambda x: x.addressable_shards[device].data[0], state)


class Layers(nnx.Module):
    """The parameters of the network that loss_fn knows."""

    def __init__(self, params: Any):
        self.layers = nnx.List([nnx.Param(p) for p in params])


def built(framework: str, tx: Any, **options: Any) -> tuple[Any, Any, Any]:
    """A step for loss_fn, its state, and what shows parameters and tx's state in it."""
    params = problems.mlp_params(dtype=jnp.float64)
    if framework == 'linen':
        step = vsam_jax.linen.make_train_step(
            lambda p, stats, batch, key: (loss_fn(p, batch), (stats, jnp.zeros(1))),
            **options,
        )
        state = vsam_jax.linen.TrainState.create(apply_fn=None, params=params, tx=tx)
        return step, state, lambda state: (state.params, state.opt_state)
    loss = lambda model, batch: (
        loss_fn([p[...] for p in model.layers], batch),
        jnp.zeros(1),
    )
    model = Layers(params)
    modules = model, nnx.Optimizer(model, tx, wrt=nnx.Param)
    state, show = as_arrays(modules)
    step = of_arrays(vsam_jax.nnx.make_train_step(loss, **options), modules)

    def parts(state):
        model, optimizer = show(state)
        params = [p[...] for p in model.layers]
        # The optimizer sees a tree of the model's, others see a list.
        leaves = jax.tree.leaves(nnx.as_pure(optimizer.opt_state))
        return params, jax.tree.unflatten(jax.tree.structure(tx.init(params)), leaves)

    return step, state, parts


def as_arrays(modules: Any) -> tuple[Any, Any]:
    graphdef, state = nnx.split(modules)
    return nnx.as_pure(state), lambda state: nnx.merge(graphdef, state)


def of_arrays(step: Any, modules: Any) -> Any:
    """A step of NNX as a pure function of the modules' arrays."""
    graphdef, _ = nnx.split(modules)

    def pure(state, batch):
        modules = nnx.merge(graphdef, state)
        aux = step(*modules, batch)
        return nnx.as_pure(nnx.state(modules)), aux

    return pure


def run_built(framework: str, method: str, mapping: str, **options: Any) -> Any:
    step, state, parts = built(framework, optimizer(method), **options)
    step, state = mapped(step, mapping), begin(state, mapping)
    for batch in batches()[:FEW]:
        state, _ = step(state, batch)
    return parts(first_of(state, mapping))


@pytest.mark.parametrize(
    ('framework', 'mapping', 'method'),
    [
        *problems.slow_but(
            itertools.product(['linen'], ['checked', 'pmap'], ['vsam']),
            itertools.product(['linen'], ['checked', 'pmap'], ['vsam', 'asam', 'sgd']),
        ),
        *problems.slow_but(
            [
                *itertools.product(['nnx'], MAPPINGS, ['vsam']),
                ('nnx', 'unchecked', 'sgd'),
            ],
            itertools.product(['nnx'], MAPPINGS, ['vsam', 'sgd']),
        ),
    ],
)
@pytest.mark.usefixtures('x64')
def test_whoever_builds_a_step_with_an_axis_trains_one_model(
    framework, mapping, method
):
    assert_one_model(framework, mapping, method)


@pytest.mark.parametrize('method', problems.slow_but(FEW_METHODS, [*METHODS, 'sgd']))
@pytest.mark.usefixtures('x64')
def test_every_method_trains_one_model(method):
    # Nothing but the step itself keeps replicas together here.
    assert_one_model('linen', 'unchecked', method)


def assert_one_model(framework: str, mapping: str, method: str) -> None:
    run = run_built(framework, method, mapping, axis_name='data')
    problems.assert_close(run, on_one_device(method, FEW)[0], 1e-11, 1e-11)


@pytest.mark.parametrize('framework', ['linen', 'nnx'])
@pytest.mark.usefixtures('x64')
def test_micro_batches_and_perturbations_of_devices_in_a_step_that_is_built(framework):
    run = run_built(framework, 'sam', 'checked', axis_name='data', num_micro_batches=2)
    problems.assert_close(run, on_one_device('sam', FEW)[0], 1e-11, 1e-11)
    run = run_built(framework, 'sam', 'pmap', axis_name='data', per_device=True)
    problems.assert_close(run, by_hand('sam', FEW)[0], 1e-11, 1e-11)


# --- Who does not say which axis ----------------------------------------------


@pytest.mark.parametrize('mapping', ['unchecked', 'pmap'])
@pytest.mark.parametrize('way', ['by hand', 'linen', 'nnx'])
def test_replicas_that_could_part_in_silence_are_refused(way, mapping):
    with jax.enable_x64(True):
        if way == 'by hand':
            tx = optimizer('vsam')
            step, state = own_step(tx), first_state(tx)
        else:
            step, state, _ = built(way, optimizer('vsam'))
        with pytest.raises(
            ValueError, match=r"inside a function mapped over 'data'.*got None"
        ):
            mapped(step, mapping)(begin(state, mapping), batches()[0])


@pytest.mark.parametrize('way', ['by hand', 'linen', 'nnx'])
@pytest.mark.parametrize('method', ['vsam', 'sgd'])
def test_gradients_of_shares_without_an_axis_are_refused(way, method):
    """With their types checked: by hand they differ, a builder's have been summed."""
    if way == 'by hand' and method == 'sgd':
        pytest.skip('Optax has no axes.')
    with jax.enable_x64(True):
        if way == 'by hand':
            tx = optimizer(method)
            step, state = own_step(tx, 'data'), first_state(tx)
        else:
            step, state, _ = built(way, optimizer(method))
        with pytest.raises(ValueError, match=r"must be given here.*differs.*'data'"):
            mapped(step, 'checked')(state, batches()[0])


def mean_step(tx: Any) -> Any:
    """A step by hand that takes the mean itself."""

    def step(state, batch):
        params, opt_state = state

        def grad_fn(params):
            own = jax.value_and_grad(loss_fn)(params, batch)
            return jax.lax.pmean(own, 'data')

        value, grads = grad_fn(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=value, grad_fn=grad_fn, axis_name=()
        )
        return (optax.apply_updates(params, updates), opt_state), jnp.zeros(1)

    return step


@pytest.mark.parametrize('mapping', ['unchecked', 'pmap'])
@pytest.mark.usefixtures('x64')
def test_means_that_are_said_to_be_means_train_one_model(mapping):
    tx = optimizer('vsam')
    step, state = mapped(mean_step(tx), mapping), begin(first_state(tx), mapping)
    for batch in batches()[:FEW]:
        state, _ = step(state, batch)
    state = first_of(state, mapping)
    problems.assert_close(state, on_one_device('vsam', FEW)[0], 1e-11, 1e-11)


@pytest.mark.parametrize('way', ['by hand', 'linen', 'nnx'])
@pytest.mark.usefixtures('x64')
def test_each_device_may_train_a_model_of_its_own(way):
    if way == 'by hand':
        tx = optimizer('vsam')
        step, state = own_step(tx, axis_name=()), first_state(tx)
    else:
        step, state, _ = built(way, optimizer('vsam'), axis_name=())
    each = jax.pmap(step, axis_name='data')
    states = begin(state, 'pmap')
    for batch in batches()[:3]:
        states, _ = each(states, shares(batch))
    for device in (0, 7):
        alone = state
        for batch in batches()[:3]:
            share = jax.tree.map(lambda x, i=device: x[i], shares(batch))
            alone, _ = jax.jit(step)(alone, share)
        own = on_device(states, device)
        problems.assert_close(jax.tree.leaves(own), jax.tree.leaves(alone))


@pytest.mark.parametrize('way', ['by hand', 'linen', 'nnx'])
@pytest.mark.parametrize('axis_name', ['model', ('data', 'model')])
@pytest.mark.parametrize('mapping', [None, *MAPPINGS])
def test_an_axis_that_is_not_mapped_is_named(way, axis_name, mapping):
    with jax.enable_x64(True):
        if way == 'by hand':
            tx = optimizer('sam')
            step, state = own_step(tx, axis_name=axis_name), first_state(tx)
        else:
            step, state, _ = built(way, optimizer('sgd'), axis_name=axis_name)
        unknown = 'data' if not mapping and axis_name[0] == 'data' else 'model'
        step = mapped(step, mapping) if mapping else jax.jit(step)
        with pytest.raises(ValueError, match=f"nothing around .* maps '{unknown}'"):
            step(begin(state, mapping), batches()[0])


# --- Modules of NNX over devices ----------------------------------------------


class Noisy(nnx.Module):
    """One layer, BatchNorm over all devices and a dropout mask that shows."""

    def __init__(self, axis_name: str | None = None):
        rngs = nnx.Rngs(0)
        self.w = nnx.Param(jnp.ones(64))
        self.norm = nnx.BatchNorm(6, rngs=rngs, axis_name=axis_name, momentum=0.5)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def noisy_loss(model: Noisy, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Linear in w, so that its two gradients differ only if their masks do."""
    mask = model.dropout(jnp.ones(64))
    # No gradient comes through, but statistics do.
    model.norm(x)
    return model.w[...] @ mask, mask[None]


@pytest.mark.parametrize(
    ('mapping', 'num_micro_batches'),
    problems.slow_but(
        [('pmap', 1), ('unchecked', 2), ('nnx.shard_map', 2)],
        itertools.product([*MAPPINGS, 'nnx.shard_map'], [1, 2]),
    ),
)
def test_devices_draw_masks_of_their_own_and_keep_one_stream(
    mapping, num_micro_batches
):
    model = Noisy()
    tx = optax.chain(vsam_jax.steady_vsam(0.1, every=2), optax.sgd(0.1))
    modules = model, nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = np.asarray(jax.random.key_data(model.dropout.rngs.key[...]))
    step = vsam_jax.nnx.make_train_step(
        noisy_loss, axis_name='data', num_micro_batches=num_micro_batches
    )
    data = [np.asarray(x, np.float32) for x, _ in batches()[:2]]
    masks = []
    if mapping == 'nnx.shard_map':
        over_devices = nnx.jit(
            nnx.shard_map(
                step,
                mesh=jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,)),
                in_specs=(P(), P(), P('data')),
                out_specs=P('data'),
            )
        )
        for x in data:
            masks.append(over_devices(*modules, x))
        assert_same_bits_everywhere(nnx.as_pure(nnx.state(modules)))
    else:
        state, show = as_arrays(modules)
        state = begin(state, mapping)
        over_devices = mapped(of_arrays(step, modules), mapping)
        for x in data:
            state, mask = over_devices(state, x)
            masks.append(mask)
        modules = show(first_of(state, mapping))
        model = modules[0]
    masks = np.asarray(jnp.stack(masks)).reshape(-1, 64)
    assert len({mask.tobytes() for mask in masks}) == 2 * 8 * num_micro_batches
    # Sampled once, and the second pass saw the masks of the first.
    log = vsam_jax.metrics(modules[1])
    assert (float(log['psf_norm']), float(log['sampling_rate'])) == (0, 0.5)
    # The mean over all masks is what was descended along.
    np.testing.assert_allclose(
        model.w[...], 1 - 2 * 0.1 * masks.mean(0), rtol=1e-5, atol=1e-6
    )
    after = np.asarray(jax.random.key_data(model.dropout.rngs.key[...]))
    np.testing.assert_array_equal(after, before)
    assert int(model.dropout.rngs.count[...]) == 2 * num_micro_batches
    # Running statistics went through all parts of all shares.
    parts = np.stack(data).reshape(2, 8, num_micro_batches, -1, 6).mean(3)
    mean = np.zeros((8, 6))
    for part in parts.transpose(0, 2, 1, 3).reshape(-1, 8, 6):
        mean = (mean + part) / 2
    np.testing.assert_allclose(model.norm.mean[...], mean.mean(0), atol=1e-5)


@pytest.mark.parametrize('framework', ['linen', 'nnx'])
def test_what_overflows_on_one_device_is_skipped_on_all(framework):
    scale = dynamic_scale.DynamicScale()
    loss = lambda w, x: jnp.sum(w * x)
    # Without a sample there is no second gradient that all could see to be bad.
    tx = optax.chain(vsam_jax.steady_vsam(0.1, every=2), optax.sgd(0.1))
    if framework == 'linen':
        step = vsam_jax.linen.make_train_step(
            lambda w, stats, x, key: (loss(w, x), (stats, jnp.zeros(1))),
            axis_name='data',
        )
        state = vsam_jax.linen.TrainState.create(
            apply_fn=None, params=jnp.ones(2), tx=tx, dynamic_scale=scale
        )
        show = lambda state: (state.params, state.dynamic_scale.scale)
    else:
        model = Layers([jnp.ones(2)])
        optimizer = vsam_jax.nnx.Optimizer(
            model, tx, wrt=nnx.Param, dynamic_scale=scale
        )
        step = vsam_jax.nnx.make_train_step(
            lambda model, x: (loss(model.layers[0][...], x), jnp.zeros(1)),
            axis_name='data',
        )
        step = of_arrays(step, (model, optimizer))
        state, merge = as_arrays((model, optimizer))
        show = lambda state: (
            merge(state)[0].layers[0][...],
            merge(state)[1].dynamic_scale.scale[...],
        )
    step = mapped(step, 'unchecked')
    x = np.ones((8, 2), np.float32)
    state, _ = step(state, x)
    assert_same_bits_everywhere(state)
    problems.assert_close(show(state), (0.9 * np.ones(2), 65536.0), 1e-6)
    x[3, 1] = 1e35  # Times the scale, this is no float32.
    state, _ = step(state, x)
    assert_same_bits_everywhere(state)
    problems.assert_close(show(state), (0.9 * np.ones(2), 32768.0), 1e-6)


# --- Several processes --------------------------------------------------------


PROGRAM = 'tests.library.two_processes'


def reports_of_two_processes(folder: pathlib.Path) -> list[dict[str, Any]]:
    """What each of two processes that train together has to say."""
    port = processes.free_port()
    outputs = [folder / f'{i}.json' for i in range(2)]
    logs = [folder / f'{i}.log' for i in range(2)]
    with contextlib.ExitStack() as stack:
        workers = []
        for i in range(2):
            worker = subprocess.Popen(
                [sys.executable, '-m', PROGRAM, port, str(i), outputs[i]],
                cwd=processes.ROOT,
                stdout=stack.enter_context(logs[i].open('w')),
                stderr=subprocess.STDOUT,
            )
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            workers.append(worker)
        for worker, log in zip(workers, logs, strict=True):
            # A deadlock ends here.
            assert worker.wait(timeout=240) == 0, log.read_text()
    return [json.loads(output.read_text()) for output in outputs]


@pytest.mark.subprocess
@pytest.mark.usefixtures('x64')
def test_two_processes_train_together(tmp_path):
    reports = reports_of_two_processes(tmp_path)
    for layout in ('fsdp', 'per_device'):
        reference = by_hand if layout == 'per_device' else on_one_device
        state, sampled = reference('vsam')
        first, second = (report[layout] for report in reports)
        assert first['plans'] == second['plans']
        assert first['sampled'] == second['sampled'] == sampled
        assert first['bits'] == second['bits']
        params = [np.array(p) for p in first['params']]
        assert_same_run((params, sampled), (state[0], sampled))


# --- Other platforms ----------------------------------------------------------


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
@pytest.mark.parametrize(
    ('layout', 'sample'),
    [
        *itertools.product(['one device'], [True, False, None]),
        ('fsdp', None),
        ('per_device', None),
    ],
)
def test_a_step_lowers_for_other_platforms(platform, sample, layout):
    per_device = layout == 'per_device'
    tx = optimizer('vsam')
    if per_device:
        step = mapped_step(tx, axis_name='data', per_device=True)
    else:
        step = problems.make_step(tx, loss_fn)
    params = problems.mlp_params()
    x, y = problems.mlp_batches(1)[0]
    batch = (x, jax.nn.one_hot(y, 3))
    if layout == 'fsdp':
        mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
        params = [
            jax.device_put(p, NamedSharding(mesh, s))
            for p, s in zip(params, LAYOUTS['fsdp'], strict=True)
        ]
        batch = jax.device_put(batch, NamedSharding(mesh, P('data')))
    state = (params, tx.init(params))
    if sample is None:
        program = jax.jit(step)
    else:
        program = vsam_jax.PlannedStep(step).program(sample)
    exported = jax.export.export(program, platforms=[platform])(state, batch)
    assert exported.platforms == (platform,)
    assert exported.nr_devices == (1 if layout == 'one device' else 8)
    text = exported.mlir_module()
    assert ('stablehlo.case' in text or 'stablehlo.if' in text) == (sample is None)


def test_counters_among_running_statistics_stay_whole_numbers_over_devices():
    loss_fn = lambda w, stats, batch, key: (
        jnp.sum(w * batch),
        ({'count': stats['count'] + 1}, None),
    )
    state = vsam_jax.linen.TrainState.create(
        apply_fn=None,
        params=jnp.ones(2),
        batch_stats={'count': jnp.zeros((), jnp.int32)},
        tx=vsam_jax.sam(),
    )
    step = jax.vmap(
        vsam_jax.linen.make_train_step(loss_fn, axis_name='data'),
        axis_name='data',
        in_axes=(None, 0),
        out_axes=None,
    )
    state, _ = step(state, jnp.ones((4, 2)))
    assert state.batch_stats['count'].dtype == jnp.int32
    assert int(state.batch_stats['count']) == 1


def test_micro_batches_of_a_device_have_running_statistics_of_their_own():
    loss_fn = lambda w, stats, batch, key: (
        jnp.sum(w * batch),
        ({'mean': (stats['mean'] + batch.mean(0)) / 2}, None),
    )
    state = vsam_jax.linen.TrainState.create(
        apply_fn=None,
        params=jnp.ones(2),
        batch_stats={'mean': jnp.zeros(2)},
        tx=vsam_jax.sam(),
    )
    step = jax.shard_map(
        vsam_jax.linen.make_train_step(loss_fn, num_micro_batches=2, axis_name='data'),
        mesh=jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P('data')),
        out_specs=(P(), P('data')),
    )
    batch = np.arange(32.0, dtype=np.float32).reshape(8, 2, 2)  # Of a device, a part.
    state, _ = jax.jit(step)(state, batch.reshape(16, 2))
    expected = (batch[:, 0] / 4 + batch[:, 1] / 2).mean(0)
    np.testing.assert_allclose(state.batch_stats['mean'], expected)


@pytest.mark.parametrize(('own', 'other'), [('host', 'data'), ('data', 'host')])
def test_a_gradient_that_was_summed_over_one_of_two_axes_is_refused(own, other):
    axes = ('host', 'data')
    tx = vsam_jax.sam()
    mesh = jax.make_mesh((4, 2), axes, axis_types=(AxisType.Auto,) * 2)
    loss = lambda w, x: jnp.mean((x @ w) ** 2)

    def step(w, x):
        grads = jax.grad(loss)(jax.lax.pcast(w, own, to='varying'), x)
        grad_fn = lambda w: jax.grad(loss)(w, x)
        return tx.update(grads, tx.init(w), w, grad_fn=grad_fn, axis_name=axes)

    step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P())
    message = f"at its root it is the same on all devices of '{other}'"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, jnp.ones(3), jnp.ones((8, 3)))


@pytest.mark.parametrize('per_device', [False, True])
def test_a_summed_gradient_is_refused_whoever_perturbs(per_device):
    tx = vsam_jax.sam()
    step = mapped_step(tx, None, axis_name='data', per_device=per_device)
    params = problems.mlp_params()
    (x, y) = problems.mlp_batches(1)[0]
    with pytest.raises(ValueError, match="updates must be each device's own"):
        jax.eval_shape(step, (params, tx.init(params)), (x, jax.nn.one_hot(y, 3)))


def test_shardings_of_no_parameters_are_refused():
    with pytest.raises(ValueError, match=r'params must .* got 0 meshes'):
        vsam_jax.sharding.state_shardings({'step': jnp.zeros(())}, {})


def test_a_bare_array_without_a_mesh_is_named_by_its_root():
    with pytest.raises(ValueError, match='at its root the sharding is'):
        vsam_jax.sharding.state_shardings(jnp.ones(3), jnp.ones(3))


@pytest.mark.parametrize('method', ['sgd', 'sam'])
def test_scales_of_8_bit_floats_are_the_largest_of_all_devices(method):
    owned = '_overwrite_with_gradient'

    @jax.custom_vjp
    def scaled(x, batch, scale):
        return x

    scaled.defvjp(
        lambda x, batch, scale: (x, batch),
        lambda batch, g: (g, jnp.zeros_like(batch), jnp.max(batch)),
    )

    def loss_fn(params, batch_stats, batch, key):
        w = scaled(params['params'], batch, params[owned])
        return jnp.sum(w * batch), (batch_stats, None)

    methods = {'sgd': optax.sgd(0.1), 'sam': vsam_jax.sam()}
    state = vsam_jax.linen.TrainState.create(
        apply_fn=None,
        params={'params': jnp.ones(2), owned: jnp.array(1.0)},
        tx=methods[method],
    )
    step = jax.shard_map(
        vsam_jax.linen.make_train_step(loss_fn, axis_name='data'),
        mesh=jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P('data')),
        out_specs=(P(), P('data')),
    )
    batch = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    state, _ = jax.jit(step)(state, batch)
    assert float(state.params[owned]) == 15
