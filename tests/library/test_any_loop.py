"""One driver for any loop: what a traced step looks like decides nothing."""

import functools
import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import vsam_jax
from tests import problems, processes

pytestmark = pytest.mark.around

TX = optax.chain(problems.METHODS['vsam'](0.1), optax.sgd(0.05, momentum=0.9))
NUMBER = 14


def start() -> tuple[jax.Array, Any]:
    w = jnp.array([1.0, -1.0, 0.5])
    return w, TX.init(w)


def loss(w, x):
    return jnp.sum((w - x) ** 2 * (1 + 0.1 * w**2))


def plain_step(w, opt_state, x):
    """As people write it: no `sample`, arguments and results in any order."""
    value, grads = jax.value_and_grad(loss)(w, x)
    grad_fn = lambda w: jax.grad(loss)(w, x)
    updates, opt_state = TX.update(grads, opt_state, w, grad_fn=grad_fn)
    return value, optax.apply_updates(w, updates), opt_state


@pytest.fixture(scope='module')
def xs():
    return list(np.random.default_rng(0).normal(size=(NUMBER, 3)).astype(np.float32))


@pytest.fixture(scope='module')
def traced(xs):
    """Parameters and state after a traced run."""
    step, (w, opt_state) = jax.jit(plain_step), start()
    for x in xs:
        _, w, opt_state = step(w, opt_state, x)
    assert 0 < int(opt_state[0].num_samples) < NUMBER
    return w, opt_state


def assert_same_run(actual, expected):
    problems.assert_close(actual, expected, atol=1e-6)


@functools.cache
def inner():
    return jax.jit(plain_step)


PLANNED = {
    'a function': lambda: vsam_jax.PlannedStep(plain_step),
    'jitted': lambda: vsam_jax.PlannedStep(jax.jit(plain_step)),
    'jitted and donating': lambda: vsam_jax.PlannedStep(
        jax.jit(plain_step, donate_argnums=(0, 1))
    ),
    'jitted inside': lambda: vsam_jax.PlannedStep(lambda *args: inner()(*args)),
    'nothing donated': lambda: vsam_jax.PlannedStep(plain_step, donate_state=False),
    'all donated': lambda: vsam_jax.PlannedStep(plain_step, donate_argnums=0),
    'equinox': lambda: vsam_jax.PlannedStep(plain_step, jit=eqx.filter_jit),
    'equinox, jitted': lambda: vsam_jax.PlannedStep(eqx.filter_jit(plain_step)),
}


@pytest.mark.parametrize('name', PLANNED)
def test_a_step_is_planned_as_it_is(name, xs, traced):
    step, (w, opt_state) = PLANNED[name](), start()
    for x in xs:
        _, w, opt_state = step(w, opt_state, x)
    assert_same_run((w, opt_state), traced)
    # The warm-up's rest of a window, and two windows of six.
    assert step.num_reads == 3


@pytest.mark.parametrize('name', PLANNED)
def test_no_program_of_a_plan_holds_a_conditional(name):
    step, (w, opt_state) = PLANNED[name](), start()
    for sample in (True, False):
        lowered = step.program(sample).lower(w, opt_state, jnp.ones(3))
        assert 'stablehlo.case' not in lowered.as_text()
    traced = jax.jit(plain_step).lower(w, opt_state, jnp.ones(3))
    assert 'stablehlo.case' in traced.as_text()


def test_keyword_and_static_arguments_pass(xs, traced):
    def step(params, *, batch, optimizer, mode):
        assert mode == 'train'
        value, params, optimizer = plain_step(params, optimizer, batch)
        return {'loss': value, 'new': [params, optimizer]}

    planned = vsam_jax.PlannedStep(step, static_argnames='mode')
    w, opt_state = start()
    for x in xs:
        out = planned(w, batch=x, optimizer=opt_state, mode='train')
        w, opt_state = out['new']
    assert_same_run((w, opt_state), traced)


def test_a_static_argument_by_place_passes(xs, traced):
    step = lambda mode, *args: plain_step(*args)
    planned = vsam_jax.PlannedStep(step, static_argnums=0)
    w, opt_state = start()
    for x in xs:
        _, w, opt_state = planned('train', w, opt_state, x)
    assert_same_run((w, opt_state), traced)


def test_a_jitted_method_of_an_object_is_a_step_too(xs, traced):
    class Agent:
        @functools.partial(jax.jit, static_argnums=0)
        def step(self, *args):
            return plain_step(*args)

    planned = vsam_jax.PlannedStep(Agent().step)
    w, opt_state = start()
    for x in xs:
        _, w, opt_state = planned(w, opt_state, x)
    assert_same_run((w, opt_state), traced)
    lowered = planned.program(True).lower(w, opt_state, xs[0])
    assert 'stablehlo.case' not in lowered.as_text()


def test_modules_of_equinox_pass(xs, traced):
    class Model(eqx.Module):
        w: jax.Array
        activation: Any = jnp.tanh

    def step(model, opt_state, x):
        of_model = lambda model: loss(model.w, x)
        value, grads = eqx.filter_value_and_grad(of_model)(model)
        params, static = eqx.partition(model, eqx.is_array)
        grad_fn = lambda p: jax.grad(lambda p: of_model(eqx.combine(p, static)))(p)
        updates, opt_state = TX.update(grads, opt_state, params, grad_fn=grad_fn)
        return eqx.apply_updates(model, updates), opt_state, value

    for planned in (
        vsam_jax.PlannedStep(step, jit=eqx.filter_jit),
        vsam_jax.PlannedStep(eqx.filter_jit(step)),
    ):
        model = Model(start()[0])
        opt_state = TX.init(eqx.filter(model, eqx.is_array))
        for x in xs:
            model, opt_state, _ = planned(model, opt_state, x)
        np.testing.assert_allclose(model.w, traced[0], atol=1e-6)
        assert planned.num_reads == 3


class Weights(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(start()[0])


def nnx_step(model, optimizer, x):
    grad_fn = vsam_jax.nnx.value_and_grad(lambda model, x: loss(model.w[...], x))
    value, grads = grad_fn(model, x)
    optimizer.update(model, grads, grad_fn=grad_fn)
    return value


NNX = {
    'eager': lambda: nnx_step,
    'traced': lambda: nnx.jit(nnx_step),
    'jit=': lambda: vsam_jax.PlannedStep(nnx_step, jit=nnx.jit),
    'jitted': lambda: vsam_jax.PlannedStep(nnx.jit(nnx_step)),
    'model donated': lambda: vsam_jax.PlannedStep(
        nnx_step, jit=nnx.jit, donate_argnums=0
    ),
}


@pytest.mark.parametrize('name', NNX)
def test_objects_of_nnx_are_updated_in_place(name, xs, traced):
    step, model = NNX[name](), Weights()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    for x in xs:
        step(model, optimizer, x)
    np.testing.assert_allclose(model.w[...], traced[0], atol=1e-6)
    if isinstance(step, vsam_jax.PlannedStep):
        assert step.num_reads == 3


def test_an_update_outside_of_jit_follows_the_plan(xs, traced):
    w, opt_state = start()
    for x in xs:
        _, w, opt_state = plain_step(w, opt_state, x)
    assert_same_run((w, opt_state), traced)


def test_an_update_outside_of_jit_takes_the_second_gradient_only_where_planned():
    calls, (w, opt_state) = [], start()
    for _ in range(NUMBER):
        grad_fn = lambda w: calls.append(1) or jax.grad(loss)(w, 0.0)
        updates, opt_state = TX.update(
            jax.grad(loss)(w, 0.0), opt_state, w, grad_fn=grad_fn
        )
        w = optax.apply_updates(w, updates)
    # A conditional would trace it on every step.
    assert len(calls) == int(opt_state[0].num_samples) < NUMBER


# --- Steps that update several times a call -----------------------------------


def scanned(w, opt_state, x):
    def body(carry, _):
        value, *carry = plain_step(*carry, x)
        return tuple(carry), value

    carry, values = jax.lax.scan(body, (w, opt_state), length=4)
    return values[-1], *carry


def unrolled(w, opt_state, x):
    for _ in range(2):
        value, w, opt_state = plain_step(w, opt_state, x)
    return value, w, opt_state


def while_loop(w, opt_state, x):
    body = lambda carry: plain_step(*carry[1:], x)
    running = lambda carry: carry[0] > 1e9
    return jax.lax.while_loop(running, body, plain_step(w, opt_state, x))


@pytest.mark.parametrize('step', [scanned, unrolled, while_loop])
@pytest.mark.parametrize('jit', [None, jax.jit, eqx.filter_jit])
def test_several_updates_a_call_are_noticed_at_once(step, jit):
    if jit is eqx.filter_jit and step is while_loop:
        pytest.skip('It updates once, and its program is not shown.')
    planned = vsam_jax.PlannedStep(jit(step) if jit else step)
    w, opt_state = start()
    with pytest.raises(ValueError, match=r'once a call.*Jit it as it is'):
        planned(w, opt_state, jnp.ones(3))
    if jit is not eqx.filter_jit:  # Whose program cannot be looked at before.
        assert int(opt_state[0].step) == 0


def test_a_longer_scan_in_a_later_call_is_noticed_too():
    def step(w, opt_state, xs):
        body = lambda carry, x: (plain_step(*carry, x)[1:], None)
        return jax.lax.scan(body, (w, opt_state), xs)[0]

    planned, state = vsam_jax.PlannedStep(step), start()
    for _ in range(2):
        state = planned(*state, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match='it updates 6 times'):
        planned(*state, jnp.ones((6, 3)))


@pytest.mark.parametrize('step', [scanned, unrolled])
def test_traced_every_one_of_several_updates_follows_the_plan(step, xs):
    each = 4 if step is scanned else 2
    several, single = jax.jit(step), jax.jit(plain_step)
    one, other = start(), start()
    for x in xs[:4]:
        _, *one = several(*one, x)
        for _ in range(each):
            _, *other = single(*other, x)
    assert_same_run(tuple(one), tuple(other))


def test_two_branches_that_update_are_one_update(xs):
    """As a guard has it that updates with another gradient."""

    def guarded(w, opt_state, x):
        step = lambda x: plain_step(w, opt_state, x)
        return jax.lax.cond(jnp.isfinite(x).all(), step, lambda x: step(0 * x), x)

    planned, (w, opt_state) = vsam_jax.PlannedStep(guarded), start()
    for x in xs:
        _, w, opt_state = planned(w, opt_state, x)
    assert int(opt_state[0].step) == NUMBER


def test_a_jit_that_donates_by_itself_goes_on_to():
    jit = functools.partial(jax.jit, donate_argnums=0)
    (w, opt_state), step = start(), vsam_jax.PlannedStep(plain_step, jit=jit)
    step(w, opt_state, jnp.ones(3))
    assert w.is_deleted()
    assert opt_state[0].step.is_deleted()


def test_arguments_that_would_be_donated_may_come_by_name():
    (w, opt_state), step = start(), vsam_jax.PlannedStep(plain_step, donate_argnums=0)
    step(w=w, opt_state=opt_state, x=jnp.ones(3))


def test_a_variable_in_two_arguments_is_not_copied(monkeypatch):
    model = Weights()
    optimizer = nnx.ModelAndOptimizer(model, TX, wrt=nnx.Param)
    step = vsam_jax.PlannedStep(
        lambda model, optimizer, x: nnx_both(optimizer, x), jit=nnx.jit
    )
    copies, copy = [], jnp.copy
    monkeypatch.setattr(jnp, 'copy', lambda x: copies.append(x) or copy(x))
    for _ in range(3):
        step(model, optimizer, jnp.ones(3))
    assert not copies


def nnx_both(optimizer, x):
    grad_fn = vsam_jax.nnx.value_and_grad(lambda model, x: loss(model.w[...], x))
    _, grads = grad_fn(optimizer.model, x)
    optimizer.update(grads, grad_fn=grad_fn)


def test_a_jitted_method_of_nnx_runs_as_it_is():
    class Agent(nnx.Module):
        def __init__(self):
            self.model = Weights()
            self.optimizer = nnx.Optimizer(self.model, TX, wrt=nnx.Param)

        @nnx.jit
        def step(self, x):
            return nnx_step(self.model, self.optimizer, x)

    for bound in (True, False):
        agent = Agent()
        planned = vsam_jax.PlannedStep(agent.step if bound else Agent.step)
        for _ in range(4):
            planned(*(() if bound else (agent,)), jnp.ones(3))
        assert int(vsam_jax.metrics(agent.optimizer)['num_samples']) >= 1


# --- Without a method, and other mistakes -------------------------------------


def test_a_step_without_a_method_runs_as_it_is():
    tx = optax.sgd(0.1, momentum=0.9)

    def step(w, opt_state, x):
        updates, opt_state = tx.update(jax.grad(loss)(w, x), opt_state, w)
        return optax.apply_updates(w, updates), opt_state

    planned, expected = vsam_jax.PlannedStep(step), jax.jit(step)
    one = other = (w := start()[0], tx.init(w))
    for _ in range(3):
        one, other = planned(*one, 0.5), expected(*other, 0.5)
    problems.assert_equal(one, other)


def test_a_consumed_state_says_how_to_keep_one():
    planned, state = vsam_jax.PlannedStep(plain_step), start()
    kept = jax.tree.map(jnp.copy, state)
    planned(*state, jnp.ones(3))
    with pytest.raises(RuntimeError, match=r'consumed.*jnp\.copy.*donate_state=False'):
        planned(*state, jnp.ones(3))
    planned(*kept, jnp.ones(3))


def test_options_of_a_function_that_is_jitted_already_are_refused():
    step = jax.jit(plain_step)
    for options in ({'donate_state': False}, {'static_argnums': 2}, {'jit': nnx.jit}):
        with pytest.raises(ValueError, match='train_step must not be jitted already'):
            vsam_jax.PlannedStep(step, **options)


def test_what_cannot_donate_is_not_told_to():
    with pytest.raises(ValueError, match=r'donate_state must be None or False for jit'):
        vsam_jax.PlannedStep(plain_step, jit=eqx.filter_jit, donate_state=True)


def test_the_decision_of_a_planned_step_ends_with_it():
    """A traced step right after a planned one decides for itself."""
    planned, (w, opt_state) = vsam_jax.PlannedStep(plain_step), start()
    planned(*start(), jnp.ones(3), sample=False)
    _, _, opt_state = jax.jit(plain_step)(w, opt_state, jnp.ones(3))
    assert bool(opt_state[0].sampled)


def test_what_the_caller_of_update_says_goes_before_the_driver():
    def step(w, opt_state, x):
        grad_fn = lambda w: jax.grad(loss)(w, x)
        updates, opt_state = TX.update(
            grad_fn(w), opt_state, w, grad_fn=grad_fn, sample=False
        )
        return optax.apply_updates(w, updates), opt_state

    _, opt_state = vsam_jax.PlannedStep(step)(*start(), jnp.ones(3))
    assert not bool(opt_state[0].sampled)


CORE_ALONE = """
import sys
sys.modules['flax'] = sys.modules['orbax'] = None
import jax.numpy as jnp, vsam_jax
tx, w = vsam_jax.vsam(), jnp.ones(2)
_, state = tx.update(w, tx.init(w), w, grad_fn=lambda w: w)
assert vsam_jax.metrics(state)['sampled']
assert {'vsam', 'linen', 'nnx'} <= {*dir(vsam_jax)}
try:
    vsam_jax.linen
except ImportError as error:
    assert 'flax' in str(error)
else:
    raise AssertionError('flax was imported')
"""


@pytest.mark.subprocess
def test_the_core_imports_neither_flax_nor_orbax():
    run = functools.partial(subprocess.run, cwd=processes.ROOT, check=True)
    run([sys.executable, '-W', 'error', '-c', CORE_ALONE])
