"""The PSF of a slice of the mini-batch: every k-th example."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import vsam_jax
from tests import problems
from tests.library.built_runs import (
    Weights,
    assert_same_run,
    mean_loss,
    optimizer,
    run_linen,
    run_nnx,
)
from vsam_jax import _portions

STEPS = 8
SLICEABLE = [name for name in problems.METHODS if name != 'looksam']


@functools.cache
def batches() -> list[np.ndarray]:
    return list(np.random.default_rng(1).normal(size=(STEPS, 8)) * 0.5)


def make_step(name: str, parts: int = 4):
    tx = optimizer(name)

    def step(state, batch, *, sample=None):
        params, opt_state = state
        value, grads = jax.value_and_grad(mean_loss)(params, batch)
        of_slice = lambda p: jax.value_and_grad(mean_loss)(p, batch[::parts])
        updates, opt_state = tx.update(
            grads, opt_state, params, psf_grad_fn=of_slice, sample=sample, value=value
        )
        return (optax.apply_updates(params, updates), opt_state), value

    return step


@functools.cache
def by_hand(name: str) -> tuple[Any, Any]:
    step = jax.jit(make_step(name))
    params = problems.toy_params(jnp.float64)
    state = params, optimizer(name).init(params)
    for batch in batches():
        state, _ = step(state, batch)
    return state


# --- The formula --------------------------------------------------------------


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
    'name', [n for n in SLICEABLE if n not in problems.OTHER_DIRECTION]
)
def test_the_direction_is_g_of_all_and_s_of_the_slice(name):
    method = problems.METHODS[name](0.1)
    params, batch = problems.toy_params(jnp.float64), batches()[0]
    grad = jax.grad(mean_loss)
    grads, own = (jax.jit(grad)(params, x) for x in (batch, batch[::4]))

    @jax.jit
    def update(state):
        seen = []
        of_slice = lambda p: seen.append(p) or grad(p, batch[::4])
        found = method.update(grads, state, params, psf_grad_fn=of_slice, sample=True)
        return *found, seen

    direction, state, (first, second) = update(method.init(params))
    problems.assert_equal(first, params)
    psf = optax.tree.sub(jax.jit(grad)(second, batch[::4]), own)
    problems.assert_close(direction, optax.tree.add(grads, psf))
    norms = optax.tree.norm(grads), optax.tree.norm(psf)
    np.testing.assert_allclose((state.grad_norm, state.psf_norm), norms, rtol=1e-10)
    # ε is of length ρ, along the slice's gradient.
    if name not in problems.OTHER_PERTURBATION:
        epsilon = optax.tree.scale(0.1 / optax.tree.norm(own), own)
        problems.assert_close(second, optax.tree.add(params, epsilon))
    if state.rings is not None:
        ratio = optax.tree.norm(psf) / optax.tree.norm(own)
        np.testing.assert_allclose(state.rings.ratios[-1], ratio, rtol=1e-10)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
    ('method', 'rule'),
    [
        (vsam_jax.gsam(0.1, alpha=0.3), vsam_jax.reuse.SurrogateGap(0.3)),
        (vsam_jax.wsam(0.1, gamma=0.6), vsam_jax.reuse.Amplified(1.5)),
    ],
)
def test_rules_that_combine_gradients_get_g_of_all_and_g_plus_s(method, rule):
    params, batch = problems.toy_params(jnp.float64), batches()[0]
    of_slice = jax.grad(lambda p: mean_loss(p, batch[::4]))
    grads, own = jax.jit(jax.grad(mean_loss))(params, batch), jax.jit(of_slice)(params)
    direction, _ = jax.jit(functools.partial(method.update, psf_grad_fn=of_slice))(
        grads, method.init(params), params
    )
    ascent = optax.tree.scale(0.1 / optax.tree.norm(own), own)
    psf = optax.tree.sub(jax.jit(of_slice)(optax.tree.add(params, ascent)), own)
    expected = rule.combine(grads, optax.tree.add(grads, psf))
    problems.assert_close(direction, expected)


@pytest.mark.parametrize('name', [n for n in problems.KINDS if n != 'looksam'])
def test_at_radius_zero_the_direction_is_the_gradient_to_the_bit(name):
    method = problems.METHODS[name](0.0)
    params, batch = problems.toy_params(), jnp.asarray(batches()[0], jnp.float32)
    grads = jax.jit(jax.grad(mean_loss))(params, batch)
    of_slice = lambda p: jax.jit(jax.grad(mean_loss))(p, batch[::2])
    direction, _ = jax.jit(
        lambda state: method.update(
            grads, state, params, psf_grad_fn=of_slice, sample=True
        )
    )(method.init(params))
    problems.assert_equal(direction, grads)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', ['vsam', 'steady_vsam', 'sam', 'fsam'])
def test_planned_is_traced(name):
    step = vsam_jax.PlannedStep(make_step(name))
    params = problems.toy_params(jnp.float64)
    state = params, optimizer(name).init(params)
    for batch in batches():
        state, _ = step(state, batch)
    assert_same_run(state, by_hand(name))


@pytest.mark.usefixtures('x64')
def test_a_scan_of_steps_is_the_loop_and_vmap_runs_each_alone():
    name, params = 'vsam', problems.toy_params(jnp.float64)
    step = make_step(name)
    state = params, optimizer(name).init(params)
    body = lambda state, batch: step(state, batch)
    last, _ = jax.jit(lambda s: jax.lax.scan(body, s, jnp.stack(batches())))(state)
    assert_same_run(last, by_hand(name))
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    last, _ = jax.jit(
        lambda s: jax.lax.scan(
            lambda s, batch: jax.vmap(step, (0, None))(s, batch),
            s,
            jnp.stack(batches()),
        )
    )(twice)
    assert_same_run(jax.tree.map(lambda x: x[1], last), by_hand(name))


@pytest.mark.parametrize('where', ['g', 'first pass', 'second pass'])
def test_a_sample_that_is_not_finite_anywhere_is_rejected(where):
    method, params = problems.METHODS['vsam'](0.1), problems.toy_params()
    batch = jnp.asarray(batches()[0], jnp.float32)
    grads = jax.grad(mean_loss)(params, batch)
    _, state = method.update(
        grads,
        method.init(params),
        params,
        psf_grad_fn=lambda p: jax.grad(mean_loss)(p, batch[::2]),
        sample=True,
    )
    calls = []

    def of_slice(p):
        calls.append(p)
        bad = where == ('first pass' if len(calls) == 1 else 'second pass')
        scale = jnp.inf if bad else 1.0
        return jax.tree.map(lambda g: g * scale, jax.grad(mean_loss)(p, batch[::2]))

    bad = jax.tree.map(lambda g: g * jnp.inf, grads) if where == 'g' else grads
    direction, after = method.update(
        bad, state, params, psf_grad_fn=of_slice, sample=True
    )
    assert int(after.num_rejected) == 1
    assert all(np.isnan(x).all() for x in jax.tree.leaves(direction))
    problems.assert_equal(after.psf, state.psf)
    problems.assert_equal(after.rings, state.rings)


def test_only_a_sampled_step_looks_at_the_slice():
    calls, method, params = [], problems.METHODS['vsam'](0.1), problems.toy_params()
    method.update(
        params, method.init(params), params, sample=False, psf_grad_fn=calls.append
    )
    assert not calls


def test_looksam_says_why_it_takes_no_slices():
    method, params = vsam_jax.looksam(0.1), problems.toy_params()
    with pytest.raises(ValueError, match=r'psf_grad_fn must not .* orthogonal to g'):
        method.update(params, method.init(params), params, psf_grad_fn=lambda p: p)


def test_a_share_without_the_gradient_of_a_slice_is_named():
    """It would be ignored, and s the difference of two sets of examples."""
    params, batch = problems.toy_params(), jnp.ones(4)
    for method in (vsam_jax.sam(0.1), vsam_jax.lean_sam(0.1)):
        update = functools.partial(
            method.update,
            jax.grad(mean_loss)(params, batch),
            method.init(params),
            params,
        )
        of_slice = lambda p: jax.grad(mean_loss)(p, batch[::4])
        with pytest.raises(ValueError, match=r'without psf_grad_fn.*psf_share=1/4'):
            update(grad_fn=of_slice, psf_share=1 / 4)
        with pytest.raises(ValueError, match='psf_share must be one divided by'):
            update(psf_grad_fn=of_slice, psf_share=0.3)
        update(psf_grad_fn=of_slice, psf_share=1 / 4)


# --- Builders -----------------------------------------------------------------


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('framework', [run_linen, run_nnx])
@pytest.mark.parametrize('name', ['vsam', 'sam', 'steady_vsam'])
def test_built_steps_take_every_kth_example(name, framework):
    run = framework(name, batches(), planned=False, scaled=False, psf_share=1 / 4)
    assert_same_run(run, by_hand(name))
    run = framework(name, batches(), planned=True, scaled=True, psf_share=0.25)
    assert_same_run(run, by_hand(name), atol=1e-5)


@pytest.mark.usefixtures('x64')
def test_a_step_of_nnx_by_hand_takes_every_kth_example():
    optim = nnx.Optimizer(model := Weights(), optimizer('steady_vsam'), wrt=nnx.Param)

    def loss_fn(model, batch):
        params = {'bias': model.bias[...], 'kernel': model.kernel[...]}
        return mean_loss(params, batch)

    @nnx.jit
    def step(model, optim, batch):
        grad_fn = vsam_jax.nnx.value_and_grad(loss_fn, psf_share=1 / 4)
        _, grads = grad_fn(model, batch)
        with pytest.raises(ValueError, match='pass it as psf_grad_fn'):
            optim.update(model, grads, grad_fn=grad_fn)
        optim.update(model, grads, psf_grad_fn=grad_fn)

    for batch in batches():
        step(model, optim, batch)
    params = {'bias': model.bias[...], 'kernel': model.kernel[...]}
    assert_same_run(params, by_hand('steady_vsam')[0])


def examples_seen(batch, **options) -> list[list[list[int]]]:
    """What each pass of one step saw, micro-batch after micro-batch."""
    passes = []

    def loss_fn(params, batch_stats, batch, key):
        del key
        jax.debug.callback(lambda x: passes.append(x.astype(int).tolist()), batch)
        return jnp.sum(params**2) + 0 * batch.sum(), (batch_stats, None)

    state = vsam_jax.linen.TrainState.create(
        apply_fn=None, params=jnp.ones(2), tx=vsam_jax.sam(0.1)
    )
    vsam_jax.linen.make_train_step(loss_fn, **options)(state, batch)
    jax.effects_barrier()
    return passes


@pytest.mark.parametrize(
    ('micro', 'share', 'slices'),
    [
        (1, 1 / 4, [[0, 4]]),
        (4, 1 / 2, [[0, 1], [4, 5]]),  # Whole micro-batches, every second.
        (4, 1 / 4, [[0, 1]]),
        (2, 1 / 4, [[0, 4]]),  # Less than one of them: one pass over the slice.
        (1, 1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_a_slice_is_never_larger_than_a_micro_batch(micro, share, slices):
    seen = examples_seen(jnp.arange(8.0), num_micro_batches=micro, psf_share=share)
    whole = np.arange(8).reshape(micro, -1).tolist()
    rounds = 1 if share == 1 else 2
    assert seen == whole + slices * rounds


def test_batch_norm_normalizes_with_the_slice_and_keeps_the_whole_batchs_statistics():
    norm = nn.BatchNorm(use_running_average=False, momentum=0.5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    variables = norm.init(jax.random.key(0), x)
    seen = []

    def loss_fn(params, batch_stats, batch, key):
        del key
        variables = {'params': params, 'batch_stats': batch_stats}
        out, updated = norm.apply(variables, batch, mutable=['batch_stats'])
        seen.append(out)
        return jnp.mean(out**4), (updated['batch_stats'], None)

    tx = optax.chain(vsam_jax.sam(0.1), optax.sgd(0.1))
    state = vsam_jax.linen.TrainState.create(apply_fn=None, tx=tx, **variables)
    step = vsam_jax.linen.make_train_step(loss_fn, psf_share=1 / 2)
    new, _ = step(state, x)
    assert [out.shape[0] for out in seen] == [8, 4, 4]
    expected = 0.5 * x.mean(axis=0)
    np.testing.assert_allclose(new.batch_stats['mean'], expected, atol=1e-6)


def test_both_passes_over_a_slice_draw_the_same_dropout_mask():
    masks = []

    def loss_fn(params, batch_stats, batch, key):
        mask = jax.random.bernoulli(key, 0.5, batch.shape)
        jax.debug.callback(lambda x: masks.append(np.asarray(x)), mask)
        return jnp.sum(params * batch * mask), (batch_stats, None)

    state = vsam_jax.linen.TrainState.create(
        apply_fn=None,
        params=jnp.ones(()),
        tx=vsam_jax.sam(0.1),
        dropout_key=jax.random.key(0),
    )
    step = vsam_jax.linen.make_train_step(loss_fn, psf_share=1 / 4)
    jax.jit(step)(state, jnp.ones(64))
    jax.effects_barrier()
    first, second = (mask for mask in masks if mask.shape == (16,))
    assert len(masks) == 3
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ('share', 'error', 'message'),
    [
        (0.3, ValueError, r'psf_share must be one .* got 0\.3\. The nearest is 1/3'),
        (0, ValueError, 'psf_share must be one divided by an integer.* got 0'),
        (2, ValueError, 'psf_share must be one divided by an integer.* got 2'),
        (True, TypeError, 'psf_share must be one divided by an integer'),
        ('1/8', TypeError, 'psf_share must be one divided by an integer'),
    ],
)
def test_shares_that_are_none_are_named(share, error, message):
    for builder in (vsam_jax.linen, vsam_jax.nnx):
        with pytest.raises(error, match=message):
            builder.make_train_step(lambda *args: None, psf_share=share)


def test_a_share_that_does_not_divide_says_which_do():
    with pytest.raises(
        ValueError, match=r'for an array of shape \(12, 2\).*1/2, 1/3, '
    ):
        _portions.slice_of(jnp.ones((12, 2)), 8)
    with pytest.raises(ValueError, match=r'of shape \(\).*none but 1'):
        _portions.slice_of(jnp.ones(()), 2)


# --- Devices ------------------------------------------------------------------


def mesh_of(kind):
    return jax.make_mesh((8,), ('data',), axis_types=(kind,))


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_no_example_of_a_slice_moves_between_devices(kind):
    mesh = mesh_of(kind)
    x = jax.device_put(jnp.ones((64, 3)), NamedSharding(mesh, P('data')))
    with jax.set_mesh(mesh):
        sliced = jax.jit(lambda x: _portions.slice_of({'x': x}, 4)['x'] * 2)
        text = sliced.lower(x).compile().as_text()
        assert sliced(x).sharding.is_equivalent_to(x.sharding, 2)
    for collective in ('all-gather', 'all-to-all', 'collective-permute', 'all-reduce'):
        assert collective not in text


def test_on_explicit_meshes_a_share_must_divide_each_devices_examples():
    mesh = mesh_of(AxisType.Explicit)
    x = jax.device_put(jnp.ones((32, 3)), NamedSharding(mesh, P('data')))
    with (
        jax.set_mesh(mesh),
        pytest.raises(
            ValueError,
            match=r'on each of 8 devices, got psf_share=1/8.*Shares.*1/2, 1/4\.',
        ),
    ):
        jax.jit(lambda x: _portions.slice_of(x, 8))(x)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('per_device', [False, True])
def test_mapped_over_devices_each_has_its_share_of_the_slice(per_device):
    """Every second of each device's two examples is every second of all sixteen."""

    def loss_fn(params, batch_stats, batch, key):
        del key
        return mean_loss(params, batch), (batch_stats, None)

    def create():
        return vsam_jax.linen.TrainState.create(
            apply_fn=None,
            params=problems.toy_params(jnp.float64),
            tx=optimizer('steady_vsam'),
        )

    data = np.random.default_rng(2).normal(size=(6, 16)) * 0.5
    options = {'psf_share': 1 / 2}
    mapped = jax.jit(
        jax.shard_map(
            vsam_jax.linen.make_train_step(
                loss_fn, axis_name='data', per_device=per_device, **options
            ),
            mesh=mesh_of(AxisType.Auto),
            in_specs=(P(), P('data')),
            out_specs=(P(), P()),
        )
    )
    whole = jax.jit(vsam_jax.linen.make_train_step(loss_fn, **options))
    one, other = create(), create()
    for batch in data:
        one, _ = mapped(one, batch)
        other, _ = whole(other, batch)
    assert int(vsam_jax.metrics(one)['num_samples']) == 2
    if per_device:  # Another objective.
        assert not np.allclose(one.params['kernel'], other.params['kernel'], atol=1e-6)
    else:
        assert_same_run((one.params, one.opt_state), (other.params, other.opt_state))


# --- The method made for it ---------------------------------------------------


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('scheduled', [True, False])
def test_lean_sam_is_steady_vsam_at_a_smaller_radius(scheduled):
    rho = optax.linear_schedule(0.1, 0.2, 8) if scheduled else 0.1
    smaller = (lambda count: rho(count) / 2) if callable(rho) else rho / 2
    ways = (
        vsam_jax.lean_sam(rho, share=1 / 4, tolerance=0.3),
        vsam_jax.steady_vsam(smaller, tolerance=0.3),
    )
    params, grad = problems.toy_params(jnp.float64), jax.grad(mean_loss)

    def directions(method):
        @jax.jit
        def update(state, batch):
            of_slice = lambda p: grad(p, batch[::4])
            grads = grad(params, batch)
            return method.update(grads, state, params, psf_grad_fn=of_slice)

        state = method.init(params)
        for batch in batches():
            direction, state = update(state, batch)
            yield direction

    problems.assert_close(*map(list, map(directions, ways)))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('framework', [run_linen, run_nnx])
def test_a_builder_of_another_share_is_named(framework, monkeypatch):
    lean = lambda name: optax.chain(vsam_jax.lean_sam(0.1), optax.sgd(0.1))
    monkeypatch.setattr('tests.library.built_runs.optimizer', lean)
    for settings in ({}, {'psf_share': 1 / 2}):
        part = '1/2 of the' if settings else 'the whole'
        with pytest.raises(
            ValueError, match=f'share=1/4.* taken of {part} mini-batch.*psf_share=1/4'
        ):
            framework('', batches(), planned=False, scaled=False, **settings)
    framework('', batches()[:1], planned=False, scaled=False, psf_share=1 / 4)


def test_lean_sam_by_hand_asks_for_the_gradient_of_the_part():
    method, w = vsam_jax.lean_sam(0.1), jnp.ones(2)
    with pytest.raises(ValueError, match='By hand give psf_grad_fn'):
        method.update(w, method.init(w), w, grad_fn=lambda p: p)
    # Between samples nothing is taken of anything.
    method.update(w, method.init(w), w, sample=False)


def test_a_share_that_is_none_is_named_as_the_method_has_it():
    with pytest.raises(ValueError, match=r'^share must be one divided by'):
        vsam_jax.lean_sam(share=0.3)
