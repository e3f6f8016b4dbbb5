"""Planned and traced runs, and the driver that follows a plan on the host."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import vsam_jax
from tests import problems
from vsam_jax._buffers import with_own_buffers
from vsam_jax._state import only_state

pytestmark = pytest.mark.around

WINDOW = 6


def optimizer(seed=0, **kwargs):
    return optax.chain(
        vsam_jax.vsam(
            0.1,
            window=WINDOW,
            segments=3,
            warmup_steps=8,
            norm_gain=1.5,
            variance_gain=1.5,
            seed=seed,
            **kwargs,
        ),
        optax.add_decayed_weights(1e-3),
        optax.sgd(0.1, momentum=0.9),
    )


def start(tx, dtype=jnp.float32):
    params = problems.mlp_params(dtype=dtype)
    return params, tx.init(params)


def replicated(tree):
    """The same arrays on two devices."""
    mesh = jax.make_mesh((2,), ('data',))
    return jax.device_put(tree, NamedSharding(mesh, P()))


@pytest.fixture
def batches():
    return problems.mlp_batches(40)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('seed', [0, 1])
def test_planned_and_traced_give_the_same_run(seed):
    batches = problems.mlp_batches(60, dtype=jnp.float64)
    tx = optimizer(seed)
    traced_step = jax.jit(problems.make_step(tx))
    planned_step = vsam_jax.PlannedStep(problems.make_step(tx))
    traced, planned = start(tx, jnp.float64), start(tx, jnp.float64)
    for batch in batches:
        traced, _ = traced_step(traced, batch)
        planned, _ = planned_step(planned, batch)
        problems.assert_close(traced, planned)
        np.testing.assert_array_equal(traced[1][0].plan, planned[1][0].plan)
    assert float(planned[1][0].budget) > 1
    assert 14 < int(planned[1][0].num_samples) < 40


def test_another_seed_gives_another_plan():
    w = jnp.ones(2)
    plans = [vsam_jax.vsam(warmup_steps=0, seed=s).init(w).plan for s in range(3)]
    assert len({tuple(np.asarray(plan)) for plan in plans}) > 1


def conditionals(compiled) -> int:
    return compiled.as_text().count(' conditional(')


def test_planned_programs_hold_no_conditional_and_the_traced_one_does(batches):
    tx = optimizer()
    train_step = problems.make_step(tx)
    driver = vsam_jax.PlannedStep(train_step)
    state = start(tx)
    counts = {
        sample: conditionals(driver.program(sample).lower(state, batches[0]).compile())
        for sample in (True, False)
    }
    assert counts == {True: 0, False: 0}
    traced = jax.jit(train_step).lower(state, batches[0]).compile()
    assert conditionals(traced) > 0
    told = lambda state, batch, sample: train_step(state, batch, sample=sample)
    told = jax.jit(told).lower(state, batches[0], jnp.array(True)).compile()
    assert conditionals(told) > 0


@pytest.mark.parametrize('sample', [True, None])
@pytest.mark.parametrize('psf_dtype', [None, jnp.bfloat16])
@pytest.mark.parametrize('name', ['vsam', 'looksam', 'steady_vsam'])
def test_no_tensor_of_the_size_of_the_parameters_is_copied(name, psf_dtype, sample):
    method = problems.METHODS[name](0.1, psf_dtype=psf_dtype)
    tx = optax.chain(method, optax.sgd(0.1, momentum=0.9))
    step = problems.make_step(tx, lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2))
    step = functools.partial(step, sample=sample)
    state = jax.eval_shape(lambda w: (w, tx.init(w)), jnp.ones((96, 96)))
    lowered = jax.jit(step, donate_argnums=0).lower(state, jnp.ones((8, 96)))
    compiled = lowered.compile()
    assert (conditionals(compiled) > 0) == (sample is None)
    assert not re.search(r'= \w+\[96,96\]\S* copy(-start)?\(', compiled.as_text())


def test_the_reuse_program_evaluates_one_gradient_and_the_sampled_one_two():
    calls = []

    def loss(params, batch):
        calls.append(1)
        return problems.mlp_loss(params, batch)

    tx = optimizer()
    driver = vsam_jax.PlannedStep(problems.make_step(tx, loss))
    state, batch = start(tx), problems.mlp_batches(1)[0]
    for sample, expected in ((True, 2), (False, 1)):
        calls.clear()
        driver.program(sample).lower(state, batch)
        assert len(calls) == expected


@pytest.fixture
def host_reads(monkeypatch):
    """The shapes of the arrays whose values reached the host, if on two devices.

    From one device of a CPU, NumPy takes the memory without asking JAX.
    """
    shapes = []
    array_type = type(jnp.zeros(()))
    value = array_type._value
    monkeypatch.setattr(
        array_type,
        '_value',
        property(lambda array: shapes.append(array.shape) or value.fget(array)),
    )
    return shapes


@pytest.mark.parametrize('read', [bool, int, np.asarray, jax.device_get])
def test_every_way_to_read_an_array_counts_as_one(read, host_reads):
    read(replicated(jnp.int32(1)))
    assert host_reads == [()]


def test_the_plan_is_read_once_a_window_and_nothing_else(batches, host_reads):
    tx = optimizer()
    driver = vsam_jax.PlannedStep(problems.make_step(tx))
    batches = replicated(batches)
    for sample in (True, False):  # To compile may read constants.
        driver(replicated(start(tx)), batches[0], sample=sample)
    state = replicated(start(tx))
    reads_at = []
    for i, batch in enumerate(batches):
        before = driver.num_reads
        host_reads.clear()
        state, _ = driver(state, batch)
        if driver.num_reads > before:
            reads_at.append(i)
        # Plan, position and step.
        assert host_reads == ([(WINDOW,), (), ()] if driver.num_reads > before else [])
    # Warm-up is 8 steps: its first window is cut to 2, then every 6th step.
    assert reads_at == [0, *range(2, 40, WINDOW)]


def test_a_state_restored_in_the_middle_of_a_window_runs_on_as_planned(batches):
    tx = optimizer()
    train_step = problems.make_step(tx)
    whole = vsam_jax.PlannedStep(train_step, donate_state=False)
    state = start(tx)
    for i, batch in enumerate(batches):
        if i == 17:
            saved = jax.tree.map(np.asarray, state)
        state, _ = whole(state, batch)
    end = state
    # A fresh driver, and one that is in the middle of something else.
    for driver in (vsam_jax.PlannedStep(train_step), whole):
        state = jax.tree.map(jnp.asarray, saved)
        for batch in batches[17:]:
            state, _ = driver(state, batch)
        problems.assert_equal(state, end)


def test_two_runs_may_share_a_driver(batches):
    tx = optimizer()
    driver = vsam_jax.PlannedStep(problems.make_step(tx))
    alone = start(tx)
    for batch in batches[:20]:
        alone, _ = driver(alone, batch)
    a, b = start(tx), (problems.mlp_params(5), tx.init(problems.mlp_params(5)))
    for batch in batches[:20]:
        a, _ = driver(a, batch)
        b, _ = driver(b, batch)
    problems.assert_equal(a, alone)


def test_buffers_are_donated_unless_asked_not_to(batches):
    tx = optimizer()
    for donate in (True, False):
        driver = vsam_jax.PlannedStep(problems.make_step(tx), donate_state=donate)
        state = start(tx)
        driver(state, batches[0])
        assert state[0][0].is_deleted() is donate


def test_an_outside_decision_overrides_one_step_and_the_plan_goes_on(batches):
    tx = optimizer()
    driver = vsam_jax.PlannedStep(problems.make_step(tx))
    state = start(tx)
    state, _ = driver(state, batches[0], sample=False)
    assert not state[1][0].sampled
    for batch in batches[1:12]:
        state, _ = driver(state, batch)
    assert int(state[1][0].step) == 12


def test_drift_between_host_and_state_is_an_error_at_the_next_window(batches):
    tx = optimizer()
    train_step = problems.make_step(tx)

    def freezing_step(state, batch, *, sample=None):
        new_state, loss = train_step(state, batch, sample=sample)
        # A guard around the whole optimizer, which the contract forbids.
        bad = state[1][0].step == 3
        frozen = jax.tree.map(
            lambda new, old: jnp.where(bad, old, new), new_state, state
        )
        return frozen, loss

    driver = vsam_jax.PlannedStep(freezing_step)
    state = start(tx)
    for batch in batches[:8]:
        state, _ = driver(state, batch)
    with pytest.raises(RuntimeError, match=r'at step 3 of vsam, but .* at step 8:'):
        driver(state, batches[8])


def test_several_plans_are_an_error(batches):
    tx = optimizer()
    driver = vsam_jax.PlannedStep(problems.make_step(tx))
    params, opt_state = start(tx)
    with pytest.raises(ValueError, match=r'one VSAMState each, got 2 in one of them'):
        driver((params, (opt_state, opt_state)), batches[0])
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (params, opt_state))
    with pytest.raises(ValueError, match=r'one plan.*shape \(2, 6\)'):
        driver(stacked, batches[0])


def test_a_driver_inside_jit_is_an_error(batches):
    tx = optimizer()
    driver = vsam_jax.PlannedStep(problems.make_step(tx))
    with pytest.raises(TypeError, match='concrete arrays'):
        jax.jit(lambda state: driver(state, batches[0]))(start(tx))


def test_wrong_train_steps_are_errors(batches):
    with pytest.raises(TypeError, match='train_step must be a function'):
        vsam_jax.PlannedStep(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings('ignore:Some donated buffers were not usable')
@pytest.mark.parametrize('donate_state', [True, False])
def test_a_batch_may_be_donated_beside_the_state(donate_state):
    tx = optimizer()
    step = problems.make_step(tx)
    driver = vsam_jax.PlannedStep(step, donate_state=donate_state, donate_argnums=1)
    state = start(tx)
    batch = jax.tree.map(jnp.asarray, problems.mlp_batches(1)[0])
    lowered = driver.program(True).lower(state, batch).args_info[0]
    assert all(x.donated == donate_state for x in jax.tree.leaves(lowered[0]))
    assert all(x.donated for x in jax.tree.leaves(lowered[1]))


def test_an_exception_in_a_step_leaves_the_driver_usable(batches):
    tx = optimizer()
    driver = vsam_jax.PlannedStep(problems.make_step(tx))
    state = start(tx)
    state, _ = driver(state, batches[0])
    with pytest.raises(TypeError):
        driver(state, 'no batch')
    for batch in batches[1:12]:
        state, _ = driver(state, batch)
    assert int(state[1][0].step) == 12


@pytest.mark.parametrize('result', ['nothing', 'the old state', 'two states'])
def test_a_result_without_the_new_state_is_an_error_before_anything_is_lost(result):
    tx = optimizer()
    train_step = problems.make_step(tx)

    def losing_step(state, batch):
        new, value = train_step(state, batch)
        results = {'nothing': value, 'the old state': state, 'two states': (new, new)}
        return results[result]

    driver = vsam_jax.PlannedStep(losing_step)
    state, (batch,) = start(tx), problems.mlp_batches(1)
    with pytest.raises((TypeError, ValueError), match='VSAMState'):
        driver(state, batch)
    assert int(state[1][0].step) == 0


def test_a_driver_takes_several_first_states_that_hold_buffers_twice():
    tx = optax.chain(vsam_jax.vsam(), optax.contrib.mechanize(optax.sgd(0.1)))
    driver = vsam_jax.PlannedStep(problems.make_step(tx))
    (batch,) = problems.mlp_batches(1)
    for seed in range(2):
        params = problems.mlp_params(seed)
        state, _ = driver((params, tx.init(params)), batch)
        assert int(only_state(state).step) == 1


def test_python_numbers_in_a_state_stay_what_they_are():
    kept = with_own_buffers({'a': 1, 'b': 1})
    assert [type(x) for x in kept.values()] == [int, int]


def test_programs_are_called_what_they_are():
    driver = vsam_jax.PlannedStep(problems.make_step(vsam_jax.vsam()))
    names = [driver.program(sample).__name__ for sample in (True, False)]
    assert names == ['sampled_step', 'reuse_step']


def test_buffers_are_donated_by_default():
    tx = vsam_jax.vsam()
    driver = vsam_jax.PlannedStep(problems.make_step(tx))
    params = problems.mlp_params()
    driver((params, tx.init(params)), problems.mlp_batches(1)[0])
    assert params[0].is_deleted()


def shared_buffers(tx, placed):
    """A first state whose parameters stand in the optimizer's state too."""
    params = problems.mlp_params()
    state = (params, tx.init(params))
    # Other objects, but the same buffers.
    return jax.device_put(state, jax.devices()[0]) if placed else state


@pytest.mark.parametrize('placed', [False, True])
def test_a_first_call_that_failed_may_be_made_again(placed):
    tx = optax.chain(vsam_jax.vsam(), optax.contrib.mechanize(optax.sgd(0.1)))
    driver = vsam_jax.PlannedStep(problems.make_step(tx))
    state = shared_buffers(tx, placed)
    with pytest.raises(TypeError):
        driver(state, None)
    for batch in problems.mlp_batches(3):
        state, _ = driver(state, batch)
    assert int(only_state(state).step) == 3


def test_an_array_may_be_put_into_two_places_between_steps():
    tx = vsam_jax.vsam()

    def averaging_step(state, batch, *, sample=None):
        inner, average = state
        inner, value = problems.make_step(tx)(inner, batch, sample=sample)
        return (inner, optax.incremental_update(inner[0], average, 0.1)), value

    driver = vsam_jax.PlannedStep(averaging_step)
    params = problems.mlp_params()
    state = ((params, tx.init(params)), problems.mlp_params(1))
    for batch in problems.mlp_batches(3):
        (inner, _), _ = driver(state, batch)
        state = (inner, inner[0])  # The average starts anew.
    assert driver.num_reads == 1


def test_accumulation_around_the_method_cannot_be_planned():
    for tx in (
        optax.MultiSteps(optax.chain(vsam_jax.vsam(), optax.sgd(0.1)), 2),
        optax.chain(optax.MultiSteps(vsam_jax.vsam(), 2).gradient_transformation()),
    ):
        driver = vsam_jax.PlannedStep(problems.make_step(vsam_jax.vsam()))
        params = problems.mlp_params()
        with pytest.raises(ValueError, match=r'must not hold optax\.MultiSteps around'):
            driver((params, tx.init(params)), None)
    after = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx = optax.chain(vsam_jax.vsam(), after)
    driver = vsam_jax.PlannedStep(problems.make_step(tx))
    state, _ = driver((params, tx.init(params)), problems.mlp_batches(1)[0])
    assert int(only_state(state).step) == 1


def test_options_may_be_left_as_jit_has_them():
    options = {'donate_argnums': None, 'donate_argnames': None}
    driver = vsam_jax.PlannedStep(problems.make_step(vsam_jax.vsam()), **options)
    params = problems.mlp_params()
    driver((params, vsam_jax.vsam().init(params)), problems.mlp_batches(1)[0])
    assert params[0].is_deleted()


def test_a_state_made_inside_of_jit_has_buffers_of_its_own():
    create = lambda params: with_own_buffers((params, params))
    one, other = jax.jit(create)(jnp.ones(2))
    assert one.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()
