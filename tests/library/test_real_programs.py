"""Situations of real training programs that went wrong, silently above all."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import vsam_jax
from tests import problems

pytestmark = pytest.mark.around

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
Y = jnp.sum(X, axis=1, keepdims=True)


def linear_loss(params, batch):
    x, y = batch
    return jnp.mean((x @ params['w'] - y) ** 2)


def start() -> dict[str, jax.Array]:
    return {'w': jnp.full((3, 1), 0.1)}


def linen_loss(params, batch_stats, batch, key):
    del key
    return linear_loss(params, batch), (batch_stats, None)


class Linear(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(start()['w'])

    def __call__(self, x):
        return x @ self.w[...]


def nnx_loss(model, batch):
    x, y = batch
    return jnp.mean((model(x) - y) ** 2), None


# --- The loss at the perturbed parameters -------------------------------------


def rise(params, rho, batch=(X, Y)) -> float:
    """L(w + ε) − L(w), written out."""
    grads = jax.grad(linear_loss)(params, batch)
    scale = rho / optax.tree.norm(grads)
    perturbed = optax.tree.add_scale(params, scale, grads)
    return float(linear_loss(perturbed, batch) - linear_loss(params, batch))


@pytest.mark.parametrize('planned', [False, True])
def test_who_gives_the_loss_sees_by_how_much_it_rises(planned):
    tx = optax.chain(vsam_jax.steady_vsam(0.1, every=2), optax.sgd(0.05))

    def step(params, opt_state):
        value_and_grad = lambda p: jax.value_and_grad(linear_loss)(p, (X, Y))
        value, grads = value_and_grad(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=value, grad_fn=value_and_grad
        )
        return optax.apply_updates(params, updates), opt_state

    run = vsam_jax.PlannedStep(step) if planned else jax.jit(step)
    params, opt_state = start(), tx.init(start())
    assert np.isnan(vsam_jax.metrics(opt_state)['sharpness'])
    for _ in range(4):
        if not bool(opt_state[0].step % 2):  # A sample comes.
            expected = rise(params, 0.1)
        params, opt_state = run(params, opt_state)
        sharpness = float(vsam_jax.metrics(opt_state)['sharpness'])
        np.testing.assert_allclose(sharpness, expected, rtol=1e-4)
        assert sharpness > 0


def test_a_rejected_sample_leaves_the_sharpness_of_the_one_before():
    tx, params = vsam_jax.sam(0.1), start()
    value_and_grad = lambda p: jax.value_and_grad(linear_loss)(p, (X, Y))
    value, grads = value_and_grad(params)
    update = functools.partial(tx.update, grads, params=params, value=value)
    _, state = update(state=tx.init(params), grad_fn=value_and_grad)
    overflow = lambda p: (jnp.inf, jax.tree.map(lambda g: g * jnp.inf, grads))
    _, after = update(state=state, grad_fn=overflow)
    assert int(after.num_rejected) == 1
    assert after.sharpness == state.sharpness > 0


def test_who_does_not_give_the_loss_sees_that_it_is_not_known():
    tx, params = vsam_jax.sam(0.1), start()
    grad = lambda p: jax.grad(linear_loss)(p, (X, Y))
    _, state = tx.update(grad(params), tx.init(params), params, grad_fn=grad)
    assert np.isnan(state.sharpness)


def test_parameters_that_are_a_pair_are_no_value_and_gradient():
    params = (jnp.ones(2), jnp.ones(2))
    for grad_fn in (lambda p: p, lambda p: (jnp.ones(()), p)):
        tx = vsam_jax.sam(0.1)
        _, state = tx.update(
            params, tx.init(params), params, grad_fn=grad_fn, value=jnp.zeros(())
        )
    assert float(state.sharpness) == 1.0


def test_value_and_grad_as_grad_fn_says_what_is_missing():
    tx, params = vsam_jax.sam(0.1), start()
    grads = jax.grad(linear_loss)(params, (X, Y))
    grad_fn = lambda p: jax.value_and_grad(linear_loss)(p, (X, Y))
    with pytest.raises(ValueError, match=r'value must be the loss.*pass value=loss'):
        tx.update(grads, tx.init(params), params, grad_fn=grad_fn)


def test_a_loss_that_returns_more_is_named_as_the_mistake():
    tx, params = vsam_jax.sam(0.1), start()
    grads = jax.grad(linear_loss)(params, (X, Y))
    with pytest.raises(TypeError, match=r'value must be a real scalar.*has_aux'):
        tx.update(
            grads,
            tx.init(params),
            params,
            value=jnp.zeros(2),
            grad_fn=lambda p: (jnp.zeros(2), grads),
        )


@pytest.mark.parametrize('micro', [1, 2])
@pytest.mark.parametrize('framework', ['linen', 'nnx'])
def test_builders_know_the_loss_and_give_it(framework, micro):
    tx = optax.chain(vsam_jax.sam(0.1), optax.sgd(0.05))
    if framework == 'linen':
        state = vsam_jax.linen.TrainState.create(apply_fn=None, params=start(), tx=tx)
        step = vsam_jax.linen.make_train_step(linen_loss, num_micro_batches=micro)
        opt_state = jax.jit(step)(state, (X, Y))[0].opt_state
    else:
        model = Linear()
        opt_state = nnx.Optimizer(model, tx, wrt=nnx.Param)
        step = vsam_jax.nnx.make_train_step(nnx_loss, num_micro_batches=micro)
        nnx.jit(step)(model, opt_state, (X, Y))
    sharpness = vsam_jax.metrics(opt_state)['sharpness']
    np.testing.assert_allclose(sharpness, rise(start(), 0.1), rtol=1e-4)


# --- Optimizers that want the loss --------------------------------------------

WANT_THE_LOSS = {
    'line search': lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=9)
    ),
    'lbfgs': lambda: optax.lbfgs(),
    'polyak': lambda: optax.polyak_sgd(max_learning_rate=0.5),
    'plateau': lambda: optax.chain(
        optax.sgd(0.05), optax.contrib.reduce_on_plateau(patience=2)
    ),
}


@pytest.mark.parametrize('framework', ['linen', 'nnx'])
@pytest.mark.parametrize(
    ('name', 'method'),
    problems.slow_but(
        [('line search', None), *((name, vsam_jax.sam) for name in WANT_THE_LOSS)],
        # Before L-BFGS there is no method: its curvature wants gradients.
        [
            *((name, None) for name in WANT_THE_LOSS if name != 'lbfgs'),
            *((name, vsam_jax.sam) for name in WANT_THE_LOSS),
        ],
    ),
)
def test_optimizers_that_want_the_loss_get_it_from_builders(name, method, framework):
    tx = WANT_THE_LOSS[name]()
    if method is not None and name != 'lbfgs':  # Whose curvature wants gradients.
        tx = optax.chain(method(0.01), tx)
    if framework == 'linen':
        state = vsam_jax.linen.TrainState.create(apply_fn=None, params=start(), tx=tx)
        step = jax.jit(vsam_jax.linen.make_train_step(linen_loss))
        for _ in range(12):
            state, _ = step(state, (X, Y))
        params = state.params
    else:
        model = Linear()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        step = nnx.jit(vsam_jax.nnx.make_train_step(nnx_loss))
        for _ in range(12):
            step(model, optimizer, (X, Y))
        params = {'w': model.w[...]}
    assert linear_loss(params, (X, Y)) < 0.3 * linear_loss(start(), (X, Y))


# --- Train states and optimizers of others ------------------------------------


class Averaging(train_state.TrainState):
    """Written for Flax, as for an average of parameters."""

    average: Any = None

    def apply_gradients(self, *, grads, **kwargs):
        new = super().apply_gradients(grads=grads, **kwargs)
        average = optax.incremental_update(new.params, self.average, 0.1)
        return new.replace(average=average)


class AveragingSAM(vsam_jax.linen.TrainState):
    """The same, derived as the error says."""

    average: Any = None

    def apply_gradients(self, *, grads, **kwargs):
        new = super().apply_gradients(grads=grads, **kwargs)
        average = optax.incremental_update(new.params, self.average, 0.1)
        return new.replace(average=average)


class WithStatistics(train_state.TrainState):
    batch_stats: Any


@pytest.mark.parametrize('planned', [False, True])
def test_a_train_state_of_flax_takes_the_second_gradient_too(planned):
    tx = optax.chain(vsam_jax.steady_vsam(0.1), optax.sgd(0.05))
    runs = []
    for cls in (train_state.TrainState, vsam_jax.linen.TrainState):
        state = cls.create(apply_fn=None, params=start(), tx=tx)
        train_step = vsam_jax.linen.make_train_step(linen_loss)
        step = vsam_jax.PlannedStep(train_step) if planned else jax.jit(train_step)
        for _ in range(5):
            state, _ = step(state, (X, Y))
        assert int(vsam_jax.metrics(state)['num_samples']) == 2
        runs.append(state.params)
    problems.assert_equal(*runs)


@pytest.mark.parametrize('share', [1, 1 / 2])
def test_a_train_state_with_an_update_of_its_own_says_what_to_derive_from(share):
    tx = optax.chain(vsam_jax.sam(0.1), optax.sgd(0.05))
    create = lambda cls, tx: cls.create(
        apply_fn=None, params=start(), tx=tx, average=start()
    )
    step = vsam_jax.linen.make_train_step(linen_loss, psf_share=share)
    with pytest.raises(TypeError, match=r'Averaging has an apply_gradients of its own'):
        step(create(Averaging, tx), (X, Y))
    new, _ = step(create(AveragingSAM, tx), (X, Y))
    assert not np.array_equal(new.average['w'], start()['w'])
    # Where there is no method, nothing has to be passed on.
    new, _ = step(create(Averaging, optax.sgd(0.05)), (X, Y))
    assert not np.array_equal(new.average['w'], start()['w'])


def test_statistics_that_a_train_state_has_no_field_for_are_not_lost_in_silence():
    tx = optax.chain(vsam_jax.sam(0.1), optax.sgd(0.05))

    def loss_fn(params, batch_stats, batch, key):
        return linear_loss(params, batch), ({'mean': jnp.ones(())}, None)

    step = vsam_jax.linen.make_train_step(loss_fn)
    state = train_state.TrainState.create(apply_fn=None, params=start(), tx=tx)
    with pytest.raises(ValueError, match='state must have a field batch_stats'):
        step(state, (X, Y))
    state = WithStatistics.create(
        apply_fn=None, params=start(), tx=tx, batch_stats={'mean': jnp.zeros(())}
    )
    new, _ = step(state, (X, Y))
    assert float(new.batch_stats['mean']) == 1.0


def test_a_state_that_is_no_train_state_says_how_to_go_on():
    step = vsam_jax.linen.make_train_step(linen_loss)
    with pytest.raises(TypeError, match=r'got tuple without params.*tx\.update'):
        step((start(), None), (X, Y))


@pytest.mark.parametrize('planned', [False, True])
def test_model_and_optimizer_of_nnx_in_one(planned):
    tx = optax.chain(vsam_jax.steady_vsam(0.1), optax.sgd(0.05))
    runs = []
    for together in (True, False):
        model = Linear()
        kind = nnx.ModelAndOptimizer if together else nnx.Optimizer
        optimizer = kind(model, tx, wrt=nnx.Param)
        step = nnx.jit(vsam_jax.nnx.make_train_step(nnx_loss))
        step = vsam_jax.PlannedStep(step) if planned else step
        for _ in range(5):
            step(model, optimizer, (X, Y))
        assert int(vsam_jax.metrics(optimizer.opt_state)['num_samples']) == 2
        runs.append(model.w[...])
    np.testing.assert_array_equal(*runs)


# --- NNX objects in the mini-batch --------------------------------------------


@pytest.mark.parametrize('planned', [False, True])
def test_explicit_random_streams_in_a_mini_batch_serve_both_passes(planned):
    masks = []

    def loss_fn(model, batch):
        x, y, rngs = batch
        mask = jax.random.bernoulli(rngs.dropout(), 0.5, x.shape)
        jax.debug.callback(lambda m: masks.append(np.asarray(m)), mask)
        return jnp.mean((model(x * mask) - y) ** 2), None

    model, rngs = Linear(), nnx.Rngs(dropout=0)
    tx = optax.chain(vsam_jax.sam(0.1), optax.sgd(0.05))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(vsam_jax.nnx.make_train_step(loss_fn))
    step = vsam_jax.PlannedStep(step) if planned else step
    for _ in range(2):
        step(model, optimizer, (X, Y, rngs))
    jax.effects_barrier()
    first, second, third, fourth = masks
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(third, fourth)
    assert not np.array_equal(first, third)
    assert int(rngs.dropout.count[...]) == 2


def test_a_teacher_in_a_mini_batch_is_neither_trained_nor_perturbed():
    teacher, model = Linear(), Linear()
    teacher.w[...] = jnp.ones((3, 1))
    seen = []

    def loss_fn(model, batch):
        x, teacher = batch
        seen.append(teacher.w[...])
        return jnp.mean((model(x) - teacher(x)) ** 2), None

    tx = optax.chain(vsam_jax.sam(0.1), optax.sgd(0.05))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = vsam_jax.nnx.make_train_step(loss_fn, num_micro_batches=2)
    before = model.w[...]
    nnx.jit(step)(model, optimizer, (X, teacher))
    np.testing.assert_array_equal(teacher.w[...], jnp.ones((3, 1)))
    assert not np.array_equal(model.w[...], before)


# --- Errors that fit on a line ------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    ('grads', 'params', 'message'),
    [
        ({'a': 1.0}, {'a': 1.0, 'b': 1.0}, r"lacks \['b'\]"),
        ({'a': [1.0, 1.0]}, {'a': [1.0]}, r"in addition \['a'\]\[1\]"),
        ({'a': {'k': 1.0}}, {'a': 1.0}, r"at \['a'\] it has a dict, where an array"),
        (1.0, {'a': 1.0}, 'at its root it has an array'),
        ((1.0, 1.0), [1.0, 1.0], 'a tuple, where a list is wanted'),
        ({'a': None}, {'a': 1.0}, r"at \['a'\] it has None, where an array"),
        (Pair(1.0, {'q': 1.0}), Pair(1.0, {'r': 1.0}), r"lacks \.second\['r'\]"),
    ],
)
def test_where_trees_differ_the_first_place_is_named(grads, params, message):
    grads, params = jax.tree.map(jnp.asarray, (grads, params))
    tx = vsam_jax.vsam()
    with pytest.raises(ValueError, match=message) as caught:
        tx.update(grads, tx.init(params), params, grad_fn=lambda p: p)
    assert len(str(caught.value)) < 200


def test_a_large_tree_is_not_dumped():
    layers = {f'layer_{i}': {'kernel': jnp.ones(2)} for i in range(200)}
    other = {**layers, 'layer_7': {'kernel': jnp.ones(2), 'bias': jnp.ones(2)}}
    tx = vsam_jax.vsam(perturb_mask={**dict.fromkeys(layers, True), 'more': True})
    for call in (
        lambda: tx.init(layers),
        lambda: vsam_jax.sam().update(
            layers, vsam_jax.sam().init(other), other, grad_fn=lambda p: p
        ),
        lambda: vsam_jax.vsam().update(
            other, vsam_jax.vsam().init(layers), other, grad_fn=lambda p: p
        ),
    ):
        with pytest.raises(ValueError, match=r'layer_7|more') as caught:
            call()
        assert len(str(caught.value)) < 250


# --- What errors, docstrings and documents recommend, trains ------------------


def masked_backbone(method):
    mask = {'w': True, 'frozen': False}
    frozen = optax.partition({True: optax.sgd(0.05), False: optax.set_to_zero()}, mask)
    return optax.chain(method(0.05, perturb_mask=mask), frozen)


RECOMMENDED = {
    'clipping after': lambda method: optax.chain(
        method(0.05), optax.clip_by_global_norm(1.0), optax.sgd(0.05)
    ),
    'a guard after': lambda method: optax.chain(
        method(0.05), optax.apply_if_finite(optax.sgd(0.05), 5)
    ),
    'weight decay after': lambda method: optax.chain(
        method(0.05), optax.add_decayed_weights(1e-4), optax.sgd(0.05, momentum=0.5)
    ),
    'accumulation after': lambda method: optax.chain(
        method(0.05), optax.MultiSteps(optax.sgd(0.05), 2).gradient_transformation()
    ),
    'rho injected alone': lambda method: optax.chain(
        optax.inject_hyperparams(lambda rho: method(rho))(rho=0.05), optax.sgd(0.05)
    ),
    'masked after': lambda method: optax.chain(
        method(0.05), optax.masked(optax.sgd(0.05), {'w': True, 'frozen': False})
    ),
    'a frozen backbone': masked_backbone,
    'schedule-free after': lambda method: optax.chain(
        method(0.05), optax.contrib.schedule_free_sgd(0.2)
    ),
}


@pytest.mark.parametrize('planned', [False, True])
@pytest.mark.parametrize('name', RECOMMENDED)
def test_what_is_recommended_trains(name, planned):
    tx = RECOMMENDED[name](problems.METHODS['steady_vsam'])
    params = {'w': start()['w'], 'frozen': jnp.ones(())}
    step = problems.make_step(tx, linear_loss)
    step = vsam_jax.PlannedStep(step) if planned else jax.jit(step)
    state = jax.tree.map(jnp.copy, (params, tx.init(params)))
    for _ in range(40):
        state, loss = step(state, (X, Y))
    assert float(loss) < 0.2 * float(linear_loss(params, (X, Y)))


def test_early_stopping_keeps_a_copy_as_the_documents_say():
    tx = optax.chain(vsam_jax.steady_vsam(0.05), optax.sgd(0.05))
    step = vsam_jax.PlannedStep(problems.make_step(tx, linear_loss))
    state, best, lowest = (start(), tx.init(start())), None, np.inf
    for _ in range(6):
        state, loss = step(state, (X, Y))
        if float(loss) < lowest:
            best, lowest = jax.tree.map(jnp.copy, state), float(loss)
    assert best is not None
    _, loss = step(best, (X, Y))
    assert float(loss) <= lowest


def test_a_model_of_linen_with_a_train_state_of_flax_trains():
    model = nn.Dense(1)
    params = model.init(jax.random.key(0), X)['params']

    def loss_fn(params, batch_stats, batch, key):
        x, y = batch
        out = model.apply({'params': params}, x)
        return jnp.mean((out - y) ** 2), (batch_stats, None)

    tx = optax.chain(vsam_jax.vsam(0.05), optax.adam(0.1))
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    step = jax.jit(vsam_jax.linen.make_train_step(loss_fn))
    before = loss_fn(params, {}, (X, Y), None)[0]
    for _ in range(50):
        state, _ = step(state, (X, Y))
    assert float(loss_fn(state.params, {}, (X, Y), None)[0]) < 0.2 * float(before)
