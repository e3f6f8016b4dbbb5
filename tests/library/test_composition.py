"""Every method works with what a JAX user already has around the optimizer."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsam_jax
from tests import problems
from vsam_jax._state import only_state

pytestmark = pytest.mark.around


def run(tx, params, batches, driver='traced', loss=problems.toy_loss):
    """Parameters and optimizer state after one step per batch."""
    step = problems.make_step(tx, loss)
    if driver == 'planned':
        # Some optimizers keep the initial parameters: those cannot be donated.
        step = vsam_jax.PlannedStep(step, donate_state=False)
    else:
        step = jax.jit(step)
    state = (params, tx.init(params))
    for batch in batches:
        state, _ = step(state, batch)
    return state


def types(tree):
    """Shape, dtype and weak type of every leaf."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


# --- One conformance suite over methods, drivers and dtypes -------------------


def parabola(w, batch):
    del batch
    return jnp.sum((w - jnp.array([1.0, -1.0, 1.0], w.dtype)) ** 2)


@pytest.mark.parametrize(
    ('name', 'dtype'),
    [
        *itertools.product(problems.METHODS, ['bfloat16']),
        *problems.slow_but(
            itertools.product(problems.KINDS, ['float32']),
            itertools.product(problems.METHODS, ['float32']),
        ),
        *itertools.product(problems.KINDS, ['float16', 'float64']),
    ],
)
def test_states_keep_their_types_and_programs_compile_once(name, dtype):
    with jax.enable_x64(dtype == 'float64'):
        tx = optax.chain(problems.METHODS[name](0.05), optax.sgd(0.1))

        def train_step(state, _, *, sample=None):
            traces.append(sample)
            w, opt_state = state
            updates, opt_state = tx.update(
                jax.grad(parabola)(w, None),
                opt_state,
                w,
                grad_fn=lambda p: jax.grad(parabola)(p, None),
                sample=sample,
                value=jnp.zeros(()),
                an_argument_that_nobody_knows=1,
            )
            return (optax.apply_updates(w, updates), opt_state), None

        traces = []
        w = jnp.array([-1.0, 2.0, 1.0], dtype)
        planned_step = vsam_jax.PlannedStep(train_step, donate_state=False)
        first = (w, tx.init(w))
        steps = {'traced': jax.jit(train_step), 'planned': planned_step}
        # Types are known without a compilation.
        if dtype != 'float32' or name not in problems.PLANNED:
            del steps['planned']
            for sample in (True, False):
                after, _ = jax.eval_shape(planned_step.program(sample), first, None)
                assert types(after) == types(first)
        for step in steps.values():
            state = first
            for _ in range(5):
                state, _ = step(state, None)
                assert types(state) == types(first)
            assert parabola(state[0], None) < parabola(w, None)
        for sample in (True, False):
            jax.eval_shape(planned_step.program(sample), first, None)
        assert len(traces) == 3  # Of one traced and two planned programs.


TARGETS = {
    'rosenbrock': (
        jnp.zeros(2),
        jnp.ones(2),
        lambda w, _: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2,
    ),
    'mixed tensors': (
        (jnp.zeros(3), jnp.zeros((2, 2))),
        (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]])),
        lambda w, goal: optax.tree.norm(optax.tree.sub(w, goal), squared=True),
    ),
}


@pytest.mark.parametrize(
    ('name', 'target'),
    [
        *((name, 'mixed tensors') for name in problems.METHODS),
        *problems.slow_but(
            [(name, 'rosenbrock') for name in ('vsam', 'asam', 'looksam')],
            [(name, 'rosenbrock') for name in problems.KINDS],
        ),
    ],
)
def test_methods_converge(name, target):
    w, goal, loss = TARGETS[target]
    steps = 4000
    # With ρ > 0 until the end they would end up about ρ away from the minimum.
    rho = optax.linear_schedule(0.02, 0.0, steps - 1500)
    tx = optax.chain(problems.METHODS[name](rho), optax.adam(0.03))
    step = problems.make_step(tx, loss)

    @jax.jit
    def train(state):
        return jax.lax.scan(lambda s, _: (step(s, goal)[0], None), state, length=steps)

    (w, _), _ = train((w, tx.init(w)))
    problems.assert_close(w, goal, atol=0.03)


# --- Base optimizers ----------------------------------------------------------

BASES = {
    'adamw': lambda: optax.adamw(0.02),
    'lion': lambda: optax.lion(0.01),
    'muon': lambda: optax.contrib.muon(0.02),
    'schedule_free': lambda: optax.contrib.schedule_free_sgd(0.5, warmup_steps=2),
    'mechanic': lambda: optax.contrib.mechanize(optax.sgd(0.1), s_init=0.1),
}


@pytest.mark.usefixtures('x64')
# One that keeps its moments, and one that wraps another.
@pytest.mark.parametrize('base', problems.slow_but(('adamw', 'mechanic'), BASES))
def test_base_optimizers_learn_planned_as_traced(base):
    tx = optax.chain(problems.METHODS['vsam'](0.05), BASES[base]())
    params = problems.toy_params(jnp.float64)
    batches = problems.toy_batches(1, jnp.float64) * 25
    traced, traced_state = run(tx, params, batches)
    planned, planned_state = run(tx, params, batches, 'planned')
    problems.assert_close(traced, planned)
    assert int(only_state(planned_state).num_samples) < 25
    if base == 'schedule_free':
        traced = optax.contrib.schedule_free_eval_params(traced_state[1], traced)
    before = problems.toy_loss(params, batches[0])
    assert problems.toy_loss(traced, batches[0]) < 0.9 * before


def test_lookahead_around_a_method_is_refused():
    tx = optax.lookahead(
        optax.chain(vsam_jax.vsam(), optax.sgd(0.1)), sync_period=2, slow_step_size=0.5
    )
    params = optax.LookaheadParams.init_synced(jnp.ones(2))
    with pytest.raises(ValueError, match=r'lookahead.* goes after this method'):
        tx.update(jnp.ones(2), tx.init(params), params)  # pyright: ignore


def test_lookahead_parameters_are_refused_with_the_way_to_write_it():
    params = optax.LookaheadParams.init_synced(jnp.ones(2))
    tx = vsam_jax.vsam()
    with pytest.raises(ValueError, match=r'got optax\.LookaheadParams.*params\.fast'):
        tx.init(params)  # pyright: ignore
    state = tx.init(params.fast)
    with pytest.raises(ValueError, match=r'got optax\.LookaheadParams'):
        tx.update(jnp.ones(2), state, params, grad_fn=jnp.sin)  # pyright: ignore


def test_lookahead_works_as_the_error_says():
    tx = vsam_jax.looksam(0.1, every=2)
    ahead = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)
    params: Any = optax.LookaheadParams.init_synced(jnp.array([1.0, 2.0]))
    sam_state, ahead_state = tx.init(params.fast), ahead.init(params)
    grad_fn = lambda w: 2 * w

    @jax.jit
    def step(params, sam_state, ahead_state):
        direction, sam_state = tx.update(
            grad_fn(params.fast), sam_state, params.fast, grad_fn=grad_fn
        )
        updates, ahead_state = ahead.update(direction, ahead_state, params)
        return optax.apply_updates(params, updates), sam_state, ahead_state

    for _ in range(20):
        params, sam_state, ahead_state = step(params, sam_state, ahead_state)
    assert int(sam_state.num_samples) == 10
    assert float(jnp.linalg.norm(params.slow)) < 0.5


# --- Parts of the parameters --------------------------------------------------


@pytest.mark.parametrize('name', problems.others_slow(problems.METHODS))
def test_a_frozen_backbone_is_neither_perturbed_nor_moved(name):
    mask = {'bias': True, 'kernel': False}
    frozen = optax.partition({True: optax.adam(0.1), False: optax.set_to_zero()}, mask)
    tx = optax.chain(problems.METHODS[name](0.1, perturb_mask=mask), frozen)
    params, (batch,) = problems.toy_params(), problems.toy_batches(1)

    @jax.jit
    def step(params):
        seen = []

        def grad_fn(p):
            seen.append(p)
            return jax.grad(problems.toy_loss)(p, batch)

        grads, state = jax.grad(problems.toy_loss)(params, batch), tx.init(params)
        # Some perturb from the second step on, or along what is new in the gradient.
        for scale in (1.0, 2.0):
            grads = optax.tree.scale(scale, grads)
            updates, state = tx.update(
                grads, state, params, grad_fn=grad_fn, sample=True
            )
        return seen[1], updates

    perturbed, updates = step(params)
    for key, trained in mask.items():
        assert bool((perturbed[key] == params[key]).all()) != trained
        assert bool((updates[key] == 0).all()) != trained


@pytest.mark.parametrize('wrapper', ['partition', 'masked'])
def test_inside_partition_and_masked_the_error_says_what_to_write(wrapper):
    inner = optax.chain(vsam_jax.vsam(), optax.sgd(0.1))
    if wrapper == 'partition':
        rest = optax.set_to_zero()
        tx = optax.partition({0: inner, 1: rest}, {'a': 0, 'b': 1})
    else:
        tx = optax.masked(inner, {'a': True, 'b': False})
    with pytest.raises(ValueError, match=r'chain\(vsam\(perturb_mask=\.\.\.\), optax'):
        tx.init({'a': jnp.ones(2), 'b': jnp.ones(2)})


def test_weight_decay_with_a_mask_acts_on_the_direction():
    params = problems.toy_params()
    batches = problems.toy_batches(1)
    is_matrix = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    plain, _ = run(optax.chain(vsam_jax.sam(0.1), optax.sgd(0.5)), params, batches)
    tx = optax.chain(
        vsam_jax.sam(0.1), optax.add_decayed_weights(0.2, is_matrix), optax.sgd(0.5)
    )
    decayed, _ = run(tx, params, batches)
    shrunk = plain['kernel'] - 0.5 * 0.2 * params['kernel']
    np.testing.assert_allclose(decayed['kernel'], shrunk, atol=1e-6)
    np.testing.assert_allclose(decayed['bias'], plain['bias'], atol=1e-6)


def test_clipping_after_vsam_bounds_the_update_and_leaves_the_psf_alone():
    params = problems.toy_params()
    batches = problems.toy_batches(1)
    free = optax.chain(vsam_jax.vsam(0.1), optax.sgd(1.0))
    clipped = optax.chain(
        vsam_jax.vsam(0.1), optax.clip_by_global_norm(1e-3), optax.sgd(1.0)
    )
    _, free_state = run(free, params, batches)
    after, clipped_state = run(clipped, params, batches)
    problems.assert_equal(free_state[0], clipped_state[0])
    moved = optax.tree.norm(optax.tree.sub(after, params))
    np.testing.assert_allclose(moved, 1e-3, rtol=1e-3)


# --- Accumulated gradients ----------------------------------------------------


def mean_loss(params, batch):
    return jax.vmap(problems.toy_loss, (None, 0))(params, batch).mean()


def mean_batches(n):
    """n mini-batches of four examples for :func:`mean_loss`, in float64."""
    return list(
        jnp.reshape(jnp.array(problems.toy_batches(4 * n, jnp.float64)), (n, 4))
    )


@pytest.mark.usefixtures('x64')
def test_microbatched_gradients_are_those_of_the_whole_batch():
    """The way to accumulate: inside one update, for both gradients alike."""
    grad = optax.microbatching.microbatch(
        jax.grad(mean_loss),
        argnums=1,
        microbatch_size=2,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    tx = optax.chain(problems.METHODS['vsam'](0.1), optax.sgd(0.01, momentum=0.9))

    def train_step(state, batch, *, sample=None):
        params, opt_state = state
        updates, opt_state = tx.update(
            grad(params, batch),
            opt_state,
            params,
            grad_fn=lambda p: (mean_loss(p, batch), grad(p, batch)),
            sample=sample,
            value=mean_loss(params, batch),
        )
        return (optax.apply_updates(params, updates), opt_state), None

    params = problems.toy_params(jnp.float64)
    step = vsam_jax.PlannedStep(train_step, donate_state=False)
    state = (params, tx.init(params))
    for batch in mean_batches(8):
        state, _ = step(state, batch)
    expected = run(tx, params, mean_batches(8), loss=mean_loss)
    problems.assert_close(state, expected)


@pytest.mark.usefixtures('x64')
def test_multi_steps_around_a_method_is_right_if_told_which_mini_step_counts():
    """The last mini-step brings the whole batch's gradient, the others no sample."""
    inner = optax.chain(problems.METHODS['vsam'](0.1), optax.sgd(0.01))
    tx = optax.MultiSteps(inner, every_k_schedule=2, accumulator_dtype=jnp.float64)
    calls = []

    @functools.partial(jax.jit, static_argnames='last')
    def mini_step(params, state, batch, *, last):
        def grad_fn(p):
            jax.debug.callback(lambda: calls.append(1))
            return jax.grad(mean_loss)(p, batch)

        half = batch[2:] if last else batch[:2]
        updates, state = tx.update(
            jax.grad(mean_loss)(params, half),
            state,
            params,
            grad_fn=grad_fn,
            sample=None if last else False,
        )
        return optax.apply_updates(params, updates), state

    params = start = problems.toy_params(jnp.float64)
    state = tx.init(params)
    for batch in mean_batches(8):
        params, state = mini_step(params, state, batch, last=False)
        params, state = mini_step(params, state, batch, last=True)
    jax.effects_barrier()
    expected, expected_state = run(inner, start, mean_batches(8), loss=mean_loss)
    problems.assert_close(params, expected)
    samples = int(only_state(expected_state).num_samples)
    assert len(calls) == samples < 8


@pytest.mark.usefixtures('x64')
def test_multi_steps_after_a_method_averages_directions():
    params, (batch,) = problems.toy_params(jnp.float64), mean_batches(1)
    late = optax.MultiSteps(optax.sgd(0.1), 2, accumulator_dtype=jnp.float64)
    tx = optax.chain(vsam_jax.sam(0.1), late.gradient_transformation())
    halves = [batch[:2], batch[2:]]
    moved, _ = run(tx, params, halves, 'planned', mean_loss)
    alone = optax.chain(vsam_jax.sam(0.1), optax.sgd(0.1))
    each = [run(alone, params, [half], loss=mean_loss)[0] for half in halves]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *each)
    problems.assert_close(moved, mean)


# --- Hyperparameters ----------------------------------------------------------


@pytest.mark.parametrize('driver', ['traced', 'planned'])
@pytest.mark.parametrize('name', problems.others_slow(problems.METHODS))
def test_rho_is_a_hyperparameter(name, driver):
    if driver == 'planned' and name not in problems.PLANNED:
        pytest.skip('It has no plan.')
    method = problems.METHODS[name]
    injected = optax.inject_hyperparams(lambda rho: method(rho))
    tx = optax.chain(injected(rho=0.1), optax.sgd(0.1))
    params, (batch,) = problems.toy_params(), problems.toy_batches(1)
    train_step = functools.partial(
        problems.make_step(tx, problems.toy_loss), sample=True
    )
    step: Any = jax.jit(train_step)
    if driver == 'planned':
        step = vsam_jax.PlannedStep(train_step)
    moved = []
    for rho in (0.1, 0.0):
        # Copies, because a planned step takes its state's buffers.
        state = jax.tree.map(jnp.copy, (params, tx.init(params)))
        state = (state[0], optax.tree.set(state[1], rho=jnp.array(rho)))
        moved.append(step(state, batch)[0])
    grads = jax.grad(problems.toy_loss)(params, batch)
    direction, _ = method(0.1).update(
        grads,
        method(0.1).init(params),
        params,
        grad_fn=lambda p: jax.grad(problems.toy_loss)(p, batch),
        sample=True,
    )
    for after, expected in zip(moved, (direction, grads), strict=True):
        expected = optax.tree.add_scale(params, -0.1, expected)
        problems.assert_close(after[0], expected, atol=1e-6)


@pytest.mark.parametrize('method', [vsam_jax.vsam, vsam_jax.looksam])
def test_a_traced_static_argument_says_how_to_inject_rho_alone(method):
    tx = optax.inject_hyperparams(method)(rho=0.1)
    with pytest.raises(TypeError, match=r'must be a Python number.*lambda rho: vsam'):
        tx.init(jnp.ones(2))


def test_a_schedule_for_rho_follows_the_update_count():
    schedule = optax.piecewise_constant_schedule(0.2, {2: 0.0})  # 0 from step 2 on
    tx = optax.chain(vsam_jax.sam(schedule), optax.sgd(0.1))
    params, batches = problems.toy_params(), problems.toy_batches(4)
    scheduled, _ = run(tx, params, batches)
    expected, _ = run(
        optax.chain(vsam_jax.sam(0.2), optax.sgd(0.1)), params, batches[:2]
    )
    expected, _ = run(optax.sgd(0.1), expected, batches[2:])
    problems.assert_close(scheduled, expected, atol=1e-6)


# --- Guards, averages, utilities ----------------------------------------------


@pytest.mark.parametrize('name', problems.others_slow(problems.PLANNED))
def test_a_guard_after_a_method_skips_the_update_while_the_state_advances(name):
    tx = optax.chain(
        problems.METHODS[name](0.1),
        optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 5),
    )
    params = problems.toy_params()
    good, bad = problems.toy_batches(2)
    bad = bad * jnp.nan
    step = vsam_jax.PlannedStep(
        problems.make_step(tx, problems.toy_loss), donate_state=False
    )
    state, _ = step((params, tx.init(params)), good)
    after, _ = step(state, bad, sample=True)
    problems.assert_equal(after[0], state[0])
    base_before, base_after = state[1][1].inner_state, after[1][1].inner_state
    problems.assert_equal(base_after, base_before)
    assert int(after[1][0].step) == 2
    assert int(after[1][0].num_rejected) == 1
    for _ in range(12):  # Past the next window: the driver finds no drift.
        after, loss = step(after, good)
    assert bool(jnp.isfinite(loss))
    assert not np.array_equal(after[0]['bias'], state[0]['bias'])


@pytest.mark.parametrize('driver', ['traced', 'planned'])
def test_averaged_parameters_ride_along_in_the_state(driver):
    tx = optax.chain(problems.METHODS['vsam'](0.1), optax.sgd(0.1))
    train_step = problems.make_step(tx, problems.toy_loss)

    def step_with_average(state, batch, *, sample=None):
        inner, average = state
        inner, loss = train_step(inner, batch, sample=sample)
        return (inner, optax.incremental_update(inner[0], average, 0.1)), loss

    params, batches = problems.toy_params(), problems.toy_batches(9)
    step: Any = jax.jit(step_with_average)
    if driver == 'planned':
        step = vsam_jax.PlannedStep(step_with_average)
    state = jax.tree.map(jnp.copy, ((params, tx.init(params)), params))
    average = params
    for batch in batches:
        state, _ = step(state, batch)
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, state[0][0])
        average = jax.tree.map(jnp.copy, average)
    problems.assert_close(state[1], average, atol=1e-6)


def test_a_value_goes_through_to_reduce_on_plateau():
    tx = optax.chain(
        vsam_jax.sam(0.1), optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)
    )
    params, (batch,) = problems.toy_params(), problems.toy_batches(1)
    state = tx.init(params)
    grad_fn = lambda p: jax.grad(problems.toy_loss)(p, batch)
    for _ in range(4):
        _, state = tx.update(
            grad_fn(params), state, params, grad_fn=grad_fn, value=jnp.ones(())
        )
    assert float(optax.tree.get(state, 'scale')) < 1


@pytest.mark.parametrize('method', problems.METHODS)
def test_optax_tree_utilities_work_on_the_state(method):
    tx = optax.chain(problems.METHODS[method](0.1), optax.sgd(0.1, momentum=0.9))
    params = problems.toy_params()
    state = tx.init(params)
    assert optax.tree.get(state, 'num_samples') == 0
    changed = optax.tree.set(state, budget=jnp.array(3.0))
    assert only_state(changed).budget == 3
    ones = optax.tree.map_params(tx, jnp.ones_like, state)
    assert jax.tree.structure(ones) == jax.tree.structure(state)
    of_params = ('psf', 'perturbation_memory')
    for name in of_params:
        large = [x for x in jax.tree.leaves(getattr(ones[0], name)) if x.size > 1]
        assert all(bool((x == 1).all()) for x in large)
    rest = {name: getattr(state[0], name) for name in of_params}
    problems.assert_equal(ones[0]._replace(**rest), state[0])


# --- What a training loop logs ------------------------------------------------


@pytest.mark.parametrize('name', problems.others_slow(problems.PLANNED))
def test_metrics_say_what_happened(name):
    tx = optax.chain(problems.METHODS[name](0.1), optax.sgd(0.1))
    params, batches = problems.toy_params(), problems.toy_batches(9)
    bad = batches[7] * jnp.inf
    step = vsam_jax.PlannedStep(problems.make_step(tx, problems.toy_loss))
    state = jax.tree.map(jnp.copy, (params, tx.init(params)))
    taken = []
    for batch in batches[:7]:
        state, _ = step(state, batch)
        taken.append(bool(vsam_jax.metrics(state)['sampled']))
    log = vsam_jax.metrics(state)
    state, _ = step(state, bad, sample=True)
    after = vsam_jax.metrics(state)
    state, _ = step(state, batches[8], sample=False)
    assert int(log['num_samples']) == sum(taken)
    np.testing.assert_allclose(log['sampling_rate'], sum(taken) / 7, rtol=1e-6)
    assert int(log['psf_age']) == taken[::-1].index(True)
    assert float(log['grad_norm']) > 0
    assert float(log['psf_norm']) > 0
    assert int(after['num_rejected']) == 1
    assert bool(after['sampled'])
    assert int(after['psf_age']) == int(log['psf_age']) + 1
    assert after['psf_norm'] == log['psf_norm']
    last = vsam_jax.metrics(state)
    assert not bool(last['sampled'])


def test_metrics_are_read_from_any_state_inside_jit_and_out():
    tx = optax.chain(
        optax.identity(),
        optax.inject_hyperparams(lambda rho: vsam_jax.sam(rho))(rho=0.1),
        optax.apply_if_finite(optax.sgd(0.1), 3),
    )
    state = {'optimizer': tx.init(jnp.ones(2)), 'step': 0}
    outside = vsam_jax.metrics(state)
    inside = jax.jit(vsam_jax.metrics)(state)
    problems.assert_equal(outside, inside)
    assert all(isinstance(value, jax.Array) for value in outside.values())
    stacked = jax.vmap(vsam_jax.sam().init)(jnp.ones((3, 2)))
    assert vsam_jax.metrics(stacked)['sampling_rate'].shape == (3,)


@pytest.mark.parametrize('count', [0, 2])
def test_metrics_of_no_or_several_states_are_refused(count):
    state = [vsam_jax.sam().init(jnp.ones(2)) for _ in range(count)]
    with pytest.raises(ValueError, match=f'exactly one VSAMState.* it holds {count}'):
        vsam_jax.metrics(state)
