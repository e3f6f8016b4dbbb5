"""Flax Linen: the step builder gets the second pass right."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import vsam_jax
from tests import problems
from vsam_jax._state import only_state


class Model(nn.Module):
    """BatchNorm and dropout, with parameters in the input's dtype."""

    dtype: Any = None  # What it computes in.
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train):
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=x.dtype)
        norm = nn.BatchNorm(
            use_running_average=not train, param_dtype=x.dtype, momentum=0.5
        )
        x = nn.relu(norm(dense(4)(x)))
        return dense(1)(nn.Dropout(self.rate, deterministic=not train)(x))


HALF = Model(dtype=jnp.float16, rate=0.0)


def make_loss_fn(model, seen=None):
    def loss_fn(params, batch_stats, batch, key):
        x, y = batch
        out, updated = model.apply(
            {'params': params, 'batch_stats': batch_stats},
            x,
            train=True,
            rngs={'dropout': key},
            mutable=['batch_stats'],
        )
        if seen is not None:
            keep = lambda *passed: seen.append(jax.tree.map(np.asarray, passed))
            jax.debug.callback(keep, batch_stats, batch, jax.random.key_data(key))
        loss = jnp.mean((out - y).astype(jnp.float32) ** 2)
        return loss, (updated['batch_stats'], {'loss': loss})

    return loss_fn


def data(dtype=jnp.float32, size=8):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(size, 3)), dtype)
    return x, jnp.sum(x, axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def first_variables(model, key, x):
    return model.init(key, x, train=False)


def create(tx, model=None, dtype=jnp.float32, **kwargs):
    model = model or Model()
    variables = dict(first_variables(model, jax.random.key(0), data(dtype)[0]))
    # Flax starts them in float32 and then goes on in the wider dtype.
    variables['batch_stats'] = optax.tree.cast(variables['batch_stats'], dtype)
    return vsam_jax.linen.TrainState.create(
        apply_fn=model.apply,
        **variables,
        tx=tx,
        dropout_key=jax.random.key(1),
        **kwargs,
    )


def optimizer(name='vsam', rho=0.1):
    return optax.chain(problems.METHODS[name](rho), optax.sgd(0.05, momentum=0.9))


def values(state):
    """What a run computes, without the key, which NumPy cannot read."""
    return state.params, state.batch_stats, state.opt_state, state.step


def differ(a, b):
    """Whether every tensor of one tree differs from the other's."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(not np.array_equal(x, y) for x, y in pairs)


@pytest.mark.usefixtures('x64')
def test_the_direction_is_the_gradient_of_the_same_batch_under_the_same_mask():
    model = Model()
    state = create(optimizer('sam'), model, jnp.float64)
    batch, loss_fn = data(jnp.float64), make_loss_fn(model)
    new, _ = jax.jit(vsam_jax.linen.make_train_step(loss_fn))(state, batch)
    key = jax.random.fold_in(jax.random.key(1), 0)
    of_batch = lambda p: loss_fn(p, state.batch_stats, batch, key)
    grad = jax.jit(jax.grad(of_batch, has_aux=True))
    grads, (stats, _) = grad(state.params)
    scale = 0.1 / optax.tree.norm(grads)
    direction, _ = grad(optax.tree.add_scale(state.params, scale, grads))
    expected = optax.tree.add_scale(state.params, -0.05, direction)
    problems.assert_close(new.params, expected)
    problems.assert_close(new.batch_stats, stats)


@pytest.mark.parametrize('sample', [True, False])
def test_running_statistics_come_from_the_first_pass_alone(sample):
    step = jax.jit(
        vsam_jax.linen.make_train_step(make_loss_fn(Model())), static_argnames='sample'
    )
    new, _ = step(create(optimizer(rho=1.0)), data(), sample=sample)
    plain, _ = step(create(optax.sgd(0.05)), data())
    problems.assert_close(new.batch_stats, plain.batch_stats, atol=1e-6)


def test_every_step_draws_a_dropout_mask_of_its_own():
    step = jax.jit(vsam_jax.linen.make_train_step(make_loss_fn(Model())))
    state = create(optax.sgd(0.0))
    losses = []
    for _ in range(4):
        state, aux = step(state, data())
        losses.append(float(aux['loss']))
    assert len(set(losses)) == 4


@pytest.mark.usefixtures('x64')
def test_planned_and_traced_give_the_same_run():
    train_step = vsam_jax.linen.make_train_step(make_loss_fn(Model()))
    traced_step = jax.jit(train_step)
    planned_step = vsam_jax.PlannedStep(train_step)
    traced, planned = (create(optimizer(), dtype=jnp.float64) for _ in range(2))
    for _ in range(10):
        traced, _ = traced_step(traced, data(jnp.float64))
        planned, _ = planned_step(planned, data(jnp.float64))
    problems.assert_close(values(traced), values(planned))
    assert traced_step._cache_size() == 1
    assert planned_step.num_reads <= 4


def test_a_loss_that_needs_neither_statistics_nor_a_key_works():
    def loss_fn(params, batch_stats, batch, key):
        assert key is None
        return jnp.mean((batch[0] @ params['w'] - batch[1]) ** 2), (batch_stats, None)

    state = vsam_jax.linen.TrainState.create(
        apply_fn=None, params={'w': jnp.zeros((3, 1))}, tx=optimizer()
    )
    step = vsam_jax.PlannedStep(vsam_jax.linen.make_train_step(loss_fn))
    for _ in range(60):
        state, _ = step(state, data())
    np.testing.assert_allclose(state.params['w'], 1.0, atol=0.2)


# --- Micro-batches ------------------------------------------------------------


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('driver', ['traced', 'planned'])
def test_micro_batches_without_state_are_the_whole_batch(driver):
    def loss_fn(params, batch_stats, batch, key):
        loss = jnp.mean(jnp.tanh(batch[0] @ params['w'] - batch[1]) ** 2)
        return loss, (batch_stats, loss)

    def train(n):
        state = vsam_jax.linen.TrainState.create(
            apply_fn=None, params={'w': jnp.zeros((3, 1))}, tx=optimizer()
        )
        step = vsam_jax.linen.make_train_step(loss_fn, num_micro_batches=n)
        step = jax.jit(step) if driver == 'traced' else vsam_jax.PlannedStep(step)
        for _ in range(8):
            state, losses = step(state, data(jnp.float64))
        return values(state), losses

    whole, loss = train(1)
    parts, losses = train(4)
    problems.assert_close(whole, parts)
    assert losses.shape == (4,)
    np.testing.assert_allclose(losses.mean(), loss, rtol=1e-12)


def test_micro_batches_take_one_second_gradient_of_each_part_with_its_mask():
    seen = []
    step = vsam_jax.linen.make_train_step(
        make_loss_fn(Model(), seen), num_micro_batches=2
    )
    state = create(optimizer('sam'))
    new, _ = jax.jit(step)(state, data())
    jax.effects_barrier()
    passes = {}
    for stats, batch, key in seen:
        passes.setdefault(key.tobytes(), []).append((stats, batch))
    halves = [(x[:4], x[4:]) for x in data()]
    parts = sorted(passes.values(), key=lambda of_part: of_part[0][1][0][0, 0])
    expected = sorted(zip(*halves, strict=True), key=lambda half: half[0][0, 0])
    for of_part, half in zip(parts, expected, strict=True):
        assert len(of_part) == 2  # The first pass and the second one.
        for stats, batch in of_part:
            problems.assert_equal(batch, half)
            if np.array_equal(batch[0], data()[0][:4]):
                problems.assert_close(stats, state.batch_stats, atol=1e-6)
            assert differ(new.batch_stats, stats)


def test_micro_batches_keep_what_a_loss_scale_saves_from_underflow():
    """Also where the parameters could not hold the gradient."""

    def loss_fn(params, batch_stats, batch, key):
        loss = jnp.sum(params['w'] * batch.mean(0)).astype(jnp.float32)
        return loss, (batch_stats, loss)

    seen = []
    for n in (1, 2):
        state = vsam_jax.linen.TrainState.create(
            apply_fn=None,
            params={'w': jnp.ones(2, jnp.float16)},
            tx=optax.trace(0.0),
            dynamic_scale=DynamicScale(scale=2.0**15),
        )
        step = vsam_jax.linen.make_train_step(loss_fn, num_micro_batches=n)
        state, _ = jax.jit(step)(state, jnp.full((4, 2), 1e-8, jnp.float32))
        seen.append(optax.tree.get(state.opt_state, 'trace')['w'])
    np.testing.assert_allclose(seen[0], 1e-8, rtol=1e-2)
    problems.assert_close(seen[1], seen[0], atol=0, rtol=1e-3)
    assert seen[0].dtype == seen[1].dtype


def test_micro_batches_that_do_not_divide_the_batch_are_refused():
    step = vsam_jax.linen.make_train_step(make_loss_fn(Model()), num_micro_batches=3)
    with pytest.raises(ValueError, match=r'num_micro_batches must divide .*=3 .*8, 3'):
        step(create(optimizer()), data())
    with pytest.raises(ValueError, match='num_micro_batches must be an integer >= 1'):
        vsam_jax.linen.make_train_step(make_loss_fn(Model()), num_micro_batches=0)


# --- Mixed precision ----------------------------------------------------------


def test_computing_in_bfloat16_keeps_float32_states_and_learns():
    model = Model(dtype=jnp.bfloat16, rate=0.0)
    state = create(optimizer(rho=0.05), model)
    step = vsam_jax.PlannedStep(vsam_jax.linen.make_train_step(make_loss_fn(model)))
    losses = []
    for _ in range(40):
        state, aux = step(state, data())
        losses.append(float(aux['loss']))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {
        jnp.dtype('float32')
    }
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert float(vsam_jax.metrics(state)['psf_norm']) > 0
    assert int(vsam_jax.metrics(state)['num_rejected']) == 0


def scaled(name='vsam', scale=2.0**10, base=None):
    base = base or optax.sgd(0.05, momentum=0.9)
    return create(
        optax.chain(problems.METHODS[name](0.1), base),
        HALF,
        dynamic_scale=DynamicScale(scale=scale, growth_interval=3),
    )


@pytest.fixture(scope='module')
def half_step():
    return vsam_jax.linen.make_train_step(make_loss_fn(HALF))


@pytest.mark.parametrize('driver', ['traced', 'planned'])
def test_the_loss_scale_settles_and_the_model_learns(half_step, driver):
    """From a scale at which everything overflows."""
    state = scaled(scale=2.0**24)
    start = jax.tree.map(jnp.copy, (state.params, state.batch_stats))
    step = jax.jit(lambda *args: half_step(*args))
    program = step
    if driver == 'planned':
        step = vsam_jax.PlannedStep(half_step)
        program = step.program(True)
    state, _ = step(state, data())
    problems.assert_equal((state.params, state.batch_stats), start)
    assert float(state.dynamic_scale.scale) == 2.0**23
    losses = []
    for _ in range(50):
        state, aux = step(state, data())
        losses.append(float(aux['loss']))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert 1 < float(state.dynamic_scale.scale) < 2.0**24
    log = vsam_jax.metrics(state)
    assert int(log['num_rejected']) >= 1
    assert int(only_state(state).step) == int(state.step) == 51
    assert program._cache_size() == 1


def test_the_loss_scale_does_not_show_in_the_update():
    model = Model()  # In float32 nothing overflows.
    step = jax.jit(vsam_jax.linen.make_train_step(make_loss_fn(model)))
    plain, _ = step(create(optimizer('sam'), model), data())
    state = create(optimizer('sam'), model, dynamic_scale=DynamicScale(scale=4096.0))
    state, _ = step(state, data())
    problems.assert_close(state.params, plain.params, atol=1e-6)
    problems.assert_close(state.opt_state, plain.opt_state, atol=1e-5)


# With lion an infinite gradient would become a finite update.
@pytest.mark.parametrize('base', [optax.sgd(0.1, momentum=0.9), optax.lion(0.1)])
@pytest.mark.parametrize('which', ['first', 'second'])
def test_an_overflow_skips_the_update_and_poisons_nothing(base, which):
    """Of either pass: the other one's numbers are then not used either."""

    def loss_fn(params, batch_stats, batch, key):
        del key
        w = params['w']
        # ρ = 0.1 moves w beyond 1.05, where the gradient is infinite.
        threshold = {'first': 0.5, 'second': 1.05, 'none': 9.0}[batch]
        steep = w * jnp.where(w > threshold, jnp.inf, 1.0)
        return jnp.sum(steep**2), ({'mean': batch_stats['mean'] + 1}, None)

    state = vsam_jax.linen.TrainState.create(
        apply_fn=None,
        params={'w': jnp.array(1.0)},
        batch_stats={'mean': jnp.zeros(())},
        tx=optax.chain(problems.METHODS['looksam'](0.1), base),
        dynamic_scale=DynamicScale(scale=64.0),
    )
    step = vsam_jax.linen.make_train_step(loss_fn)
    good, _ = step(state.replace(params={'w': jnp.array(0.9)}), 'none', sample=True)
    good = good.replace(params={'w': jnp.array(1.0)})
    bad, _ = step(good, which, sample=True)
    problems.assert_equal(
        (bad.params, bad.batch_stats, bad.opt_state[1]),
        (good.params, good.batch_stats, good.opt_state[1]),
    )
    assert float(bad.dynamic_scale.scale) == 32.0
    sam_state = only_state(bad)
    assert int(sam_state.step) == 2
    assert int(sam_state.num_rejected) == 1
    problems.assert_equal(sam_state.psf, only_state(good).psf)
    after, _ = step(bad, 'none', sample=False)
    assert bool(jnp.isfinite(after.params['w']))
    assert not np.array_equal(after.params['w'], bad.params['w'])


def test_an_optimizer_without_a_second_gradient_works_with_a_loss_scale(half_step):
    state = create(
        optax.sgd(0.05),
        HALF,
        dynamic_scale=DynamicScale(scale=2.0**24),
    )
    state, _ = jax.jit(half_step)(state, data())
    assert float(state.dynamic_scale.scale) == 2.0**23


# --- Other optimizers, other parameters ------------------------------------------


OWNED = '_overwrite_with_gradient'


@jax.custom_vjp
def in_8_bits(x, scale):
    """As with 8-bit floats: the "gradient" of a scale is its next value."""
    return x


in_8_bits.defvjp(lambda x, scale: (x, scale), lambda scale, g: (g, 2 * scale))


def test_scales_of_8_bit_floats_are_overwritten_and_not_perturbed():
    """As flax does it: their gradient is their next value."""
    seen = []

    def loss_fn(params, batch_stats, batch, key):
        jax.debug.callback(lambda s: seen.append(float(s)), params[OWNED])
        w = in_8_bits(params['params'], params[OWNED])
        loss = jnp.sum((w - batch) ** 2)
        return loss, (batch_stats, loss)

    def train(tx):
        params = {'params': jnp.zeros(3), OWNED: jnp.array(1.0)}
        state = vsam_jax.linen.TrainState.create(apply_fn=None, params=params, tx=tx)
        step = jax.jit(vsam_jax.linen.make_train_step(loss_fn))
        for _ in range(3):
            state, _ = step(state, jnp.ones(3))
        jax.effects_barrier()
        return state

    state = train(optimizer('sam'))
    assert float(state.params[OWNED]) == 8.0
    assert sorted(seen) == [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    w, tx = jnp.zeros(3), optimizer('sam')
    opt_state, gradient = tx.init(w), lambda w: 2 * (w - 1.0)
    for _ in range(3):
        updates, opt_state = tx.update(gradient(w), opt_state, w, grad_fn=gradient)
        w = optax.apply_updates(w, updates)
    problems.assert_close(state.params['params'], w, atol=1e-6)


def test_accumulation_around_the_method_is_refused_and_after_it_works():
    def loss_fn(params, batch_stats, batch, key):
        loss = jnp.sum((params - batch) ** 2)
        return loss, (batch_stats, loss)

    step = vsam_jax.linen.make_train_step(loss_fn)
    create = lambda tx: vsam_jax.linen.TrainState.create(
        apply_fn=None, params=jnp.zeros(3), tx=tx
    )
    with pytest.raises(ValueError, match=r'tx must not be optax\.MultiSteps around'):
        step(create(optax.MultiSteps(optimizer(), 2)), jnp.ones(3))
    after = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    for tx in (optax.MultiSteps(optax.sgd(0.1), 2), optax.chain(vsam_jax.sam(), after)):
        state = create(tx)
        for taken in (False, True):
            state, _ = step(state, jnp.ones(3))
            assert bool(state.params.any()) == taken
    # A step of one's own may know the whole mini-batch.
    state = create(optax.MultiSteps(optimizer(), 2))
    state = state.apply_gradients(grads=jnp.ones(3), sample=False)
    state = state.apply_gradients(grads=jnp.ones(3), grad_fn=lambda p: p, sample=True)
    assert int(vsam_jax.metrics(state)['num_samples']) == 1


def stats_step(batch_stats, update, batch=None, n=1, **kwargs):
    """One step of a loss whose running statistics are made by ``update``."""
    loss_fn = lambda w, stats, batch, key: (jnp.sum(w**2), (update(stats), None))
    state = vsam_jax.linen.TrainState.create(
        apply_fn=None, params=jnp.ones(2), batch_stats=batch_stats, tx=vsam_jax.sam()
    )
    step = vsam_jax.linen.make_train_step(loss_fn, num_micro_batches=n, **kwargs)
    return step(state, jnp.ones((2, 1)) if batch is None else batch)[0].batch_stats


@pytest.mark.parametrize('n', [1, 2])
def test_running_statistics_keep_their_dtype(n):
    """Also where the model makes them in another one, as BatchNorm does."""
    widened = lambda stats: {'mean': stats['mean'].astype(jnp.float32) + 1}
    stats = stats_step({'mean': jnp.zeros((), jnp.bfloat16)}, widened, n=n)
    assert stats['mean'].dtype == jnp.bfloat16
    assert float(stats['mean']) == n


def test_a_model_may_add_running_statistics():
    assert stats_step(None, lambda stats: {'mean': jnp.ones(())}) == {'mean': 1}


def test_a_scalar_in_a_mini_batch_cannot_be_cut():
    with pytest.raises(
        ValueError, match=r'num_micro_batches must divide .* shape \(\)'
    ):
        stats_step({}, lambda stats: stats, batch=jnp.ones(()), n=2)


def test_a_new_train_state_has_an_empty_collection_of_statistics():
    state = vsam_jax.linen.TrainState.create(
        apply_fn=None, params=jnp.ones(2), tx=optax.sgd(0.1)
    )
    assert state.batch_stats == {}


def test_beside_scales_of_8_bit_floats_everything_else_works_as_ever():
    params = {'params': jnp.ones(3), OWNED: jnp.array(1.0)}
    state = vsam_jax.linen.TrainState.create(
        apply_fn=None, params=params, tx=vsam_jax.sam(), batch_stats={'mean': 0.0}
    )
    with pytest.raises(ValueError, match=r'grad_fn must be a function .* got None'):
        state.apply_gradients(grads=params)
    state = state.apply_gradients(
        grads=params, grad_fn=lambda p: p, batch_stats={'mean': 1.0}
    )
    assert state.batch_stats == {'mean': 1.0}


def test_a_loss_scale_is_not_taken_out_of_what_it_is_not_in():
    """Scales of 8-bit floats come out of the backward pass as they are."""

    def loss_fn(params, batch_stats, batch, key):
        loss = jnp.sum((in_8_bits(params['params'], params[OWNED]) - batch) ** 2)
        return loss, (batch_stats, loss)

    params = {'params': jnp.zeros(3), OWNED: jnp.array(1.0)}
    state = vsam_jax.linen.TrainState.create(
        apply_fn=None, params=params, tx=optimizer('sam'), dynamic_scale=DynamicScale()
    )
    state, _ = jax.jit(vsam_jax.linen.make_train_step(loss_fn))(state, jnp.ones(3))
    assert float(state.params[OWNED]) == 2.0
    assert float(optax.tree.norm(state.params['params'])) > 0


def test_numbers_of_python_may_stand_in_a_collection():
    assert stats_step({'n': jnp.zeros(())}, lambda stats: {'n': 3}) == {'n': 3}


def test_sizes_of_8_bit_floats_are_the_largest_of_all_micro_batches():
    @jax.custom_vjp
    def seen(x, scale):
        return x

    forward = lambda x, scale: (x, (x, scale))
    backward = lambda saved, g: (g, jnp.max(jnp.abs(saved[0])) + 0 * saved[1])
    seen.defvjp(forward, backward)

    def loss_fn(params, batch_stats, batch, key):
        x = seen(batch, params['_overwrite_with_gradient']['size'])
        return jnp.mean(x * params['params']['w']), (batch_stats, None)

    params = {
        'params': {'w': jnp.ones(())},
        '_overwrite_with_gradient': {'size': jnp.ones(())},
    }
    batch = jnp.array([1.0, 1.0, 1.0, 100.0])
    for number in (1, 4):
        state = vsam_jax.linen.TrainState(
            step=jnp.zeros((), jnp.int32),
            apply_fn=None,
            params=params,
            tx=vsam_jax.sam(0.1),
            opt_state=vsam_jax.sam(0.1).init(params['params']),
            batch_stats={},
            dropout_key=None,
            dynamic_scale=None,
        )
        step = vsam_jax.linen.make_train_step(loss_fn, num_micro_batches=number)
        new, _ = jax.jit(step)(state, batch)
        assert float(new.params['_overwrite_with_gradient']['size']) == 100.0
