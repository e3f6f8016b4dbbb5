"""What holds for every method of problems.METHODS, in every framework.

Types, wrappers and hyperparameters: test_composition. Devices: test_devices. Samples
that are rejected: test_update and test_family.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import vsam_jax
from tests import problems
from tests.library.built_runs import (
    assert_same_run,
    mean_loss,
    optimizer,
    run_linen,
    run_nnx,
)
from vsam_jax import checkpoint
from vsam_jax._state import only_state

STEPS = 8


@functools.cache
def batches() -> list[np.ndarray]:
    return list(np.random.default_rng(1).normal(size=(STEPS, 4)) * 0.5)


@functools.cache
def traced(name: str) -> tuple[Any, Any]:
    """A transformation and its step, jitted."""
    tx = optimizer(name)
    return tx, jax.jit(problems.make_step(tx, mean_loss))


@functools.cache
def by_hand(name: str) -> tuple[Any, Any]:
    """Parameters and optimizer state after a traced run without a framework."""
    tx, step = traced(name)
    params = problems.toy_params(jnp.float64)
    state = params, tx.init(params)
    for batch in batches():
        state, _ = step(state, batch)
    return state


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('framework', [run_linen, run_nnx])
class TestBuiltSteps:
    @pytest.mark.parametrize('name', problems.others_slow(problems.METHODS))
    def test_micro_batches_are_the_whole_mini_batch_traced(self, name, framework):
        run = framework(
            name, batches(), planned=False, scaled=False, num_micro_batches=2
        )
        assert_same_run(run, by_hand(name), atol=1e-12)

    # One with a plan, one that decides from the gradient.
    @pytest.mark.parametrize(
        'name', problems.slow_but(('vsam', 'aesam'), problems.METHODS)
    )
    def test_a_loss_scale_does_not_show(self, name, framework):
        planned = name in problems.PLANNED
        run = framework(name, batches(), planned=planned, scaled=True)
        # Flax gives what it divides the scale out of in float32.
        assert_same_run(run, by_hand(name), atol=1e-5)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', problems.PLANNED)
def test_planned_is_traced(name):
    step = vsam_jax.PlannedStep(problems.make_step(optimizer(name), mean_loss))
    params = problems.toy_params(jnp.float64)
    state = params, optimizer(name).init(params)
    for batch in batches():
        state, _ = step(state, batch)
    assert_same_run(state, by_hand(name), atol=1e-12)
    taken = int(only_state(state).num_samples)
    assert (taken == STEPS) == (name in problems.ALWAYS)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', problems.others_slow(problems.METHODS))
def test_a_restored_run_goes_on_as_the_uninterrupted_one(name, tmp_path):
    tx, step = traced(name)
    params = problems.toy_params(jnp.float64)
    state = params, tx.init(params)
    for batch in batches()[:5]:
        state, _ = step(state, batch)
    with ocp.CheckpointManager(tmp_path) as manager:
        checkpoint.save(manager, 5, state, config={'method': name})
        manager.wait_until_finished()
        like = jax.tree.map(jnp.zeros_like, state)
        state = checkpoint.restore(manager, like, config={'method': name})
    for batch in batches()[5:]:
        state, _ = step(state, batch)
    problems.assert_equal(state, by_hand(name))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', problems.others_slow(problems.METHODS))
def test_a_sample_that_is_not_finite_leaves_no_trace(name):
    """All goes on as if that step had not been sampled, but for the counters."""
    tx = problems.METHODS[name](0.1)
    params = problems.toy_params(jnp.float64)
    grad = jax.grad(mean_loss)

    @functools.partial(jax.jit, static_argnames='bad')
    def update(state, batch, sample, *, bad=False):
        grads = grad(params, batch)
        nan = lambda p: jax.tree.map(lambda g: g * jnp.nan, grad(p, batch))
        grad_fn = nan if bad else lambda p: grad(p, batch)
        return tx.update(grads, state, params, grad_fn=grad_fn, sample=sample)

    first = tx.init(params)
    _, first = update(first, batches()[0], jnp.array(True))
    lost, with_bad = update(first, batches()[1], jnp.array(True), bad=True)
    _, without = update(first, batches()[1], jnp.array(False))
    assert all(np.isnan(x).all() for x in jax.tree.leaves(lost))
    assert int(with_bad.num_rejected) == 1
    counters = {'sampled': None, 'num_samples': None, 'num_rejected': None}
    problems.assert_equal(with_bad._replace(**counters), without._replace(**counters))
    for batch in batches()[2:4]:
        expected, without = update(without, batch, jnp.array(False))
        direction, with_bad = update(with_bad, batch, jnp.array(False))
        problems.assert_equal(direction, expected)
