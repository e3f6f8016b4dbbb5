"""What holds for every method of problems.METHODS, in every framework.

Types, wrappers and hyperparameters: test_composition. Devices: test_devices. Samples
that are rejected: test_update and test_family.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale

import vsam_jax
from tests import problems
from vsam_jax import checkpoint

STEPS = 8


def mean_loss(params, batch):
    return jax.vmap(problems.toy_loss, (None, 0))(params, batch).mean()


def optimizer(name: str) -> optax.GradientTransformationExtraArgs:
    return optax.chain(problems.METHODS[name](0.1), optax.sgd(0.05, momentum=0.9))


@functools.cache
def batches() -> list[np.ndarray]:
    return list(np.random.default_rng(1).normal(size=(STEPS, 4)) * 0.5)


@functools.cache
def by_hand(name: str) -> tuple[Any, Any]:
    """Parameters and optimizer state after a traced run without a framework."""
    step = jax.jit(problems.make_step(optimizer(name), mean_loss))
    params = problems.toy_params(jnp.float64)
    state = params, optimizer(name).init(params)
    for batch in batches():
        state, _ = step(state, batch)
    return state


def run_linen(name: str, planned: bool, scaled: bool, **options: Any) -> Any:
    def loss_fn(params, batch_stats, batch, key):
        del key
        return mean_loss(params, batch), (batch_stats, None)

    state = vsam_jax.linen.TrainState.create(
        apply_fn=None,
        params=problems.toy_params(jnp.float64),
        tx=optimizer(name),
        dynamic_scale=DynamicScale() if scaled else None,
    )
    train_step = vsam_jax.linen.make_train_step(loss_fn, **options)
    step = (vsam_jax.PlannedStep if planned else jax.jit)(train_step)
    for batch in batches():
        state, _ = step(state, batch)
    return state.params, state.opt_state


class Weights(nnx.Module):
    def __init__(self):
        for name, value in problems.toy_params(jnp.float64).items():
            setattr(self, name, nnx.Param(value))


def run_nnx(name: str, planned: bool, scaled: bool, **options: Any) -> Any:
    def loss_fn(model, batch):
        params = {'bias': model.bias[...], 'kernel': model.kernel[...]}
        return mean_loss(params, batch), None

    model = Weights()
    scale = DynamicScale() if scaled else None
    optim = vsam_jax.nnx.Optimizer(
        model, optimizer(name), wrt=nnx.Param, dynamic_scale=scale
    )
    step = nnx.jit(vsam_jax.nnx.make_train_step(loss_fn, **options))
    step = vsam_jax.PlannedStep(step) if planned else step
    for batch in batches():
        step(model, optim, batch)
    params = {'bias': model.bias[...], 'kernel': model.kernel[...]}
    return params, nnx.as_pure(optim.opt_state)


def assert_same_run(actual: Any, expected: Any, atol: float) -> None:
    # NNX has states of its own where optax has trees like the parameters.
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, e, atol=atol, rtol=0)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('framework', [run_linen, run_nnx])
@pytest.mark.parametrize('name', problems.METHODS)
class TestBuiltSteps:
    def test_micro_batches_are_the_whole_mini_batch_traced(self, name, framework):
        run = framework(name, planned=False, scaled=False, num_micro_batches=2)
        assert_same_run(run, by_hand(name), atol=1e-12)

    def test_a_loss_scale_does_not_show_planned(self, name, framework):
        run = framework(name, planned=True, scaled=True)
        # Flax gives what it divides the scale out of in float32.
        assert_same_run(run, by_hand(name), atol=1e-5)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', problems.METHODS)
def test_planned_is_traced(name):
    step = vsam_jax.PlannedStep(problems.make_step(optimizer(name), mean_loss))
    params = problems.toy_params(jnp.float64)
    state = params, optimizer(name).init(params)
    for batch in batches():
        state, _ = step(state, batch)
    assert_same_run(state, by_hand(name), atol=1e-12)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', problems.METHODS)
def test_a_restored_run_goes_on_as_the_uninterrupted_one(name, tmp_path):
    tx = optimizer(name)
    step = jax.jit(problems.make_step(tx, mean_loss))
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
@pytest.mark.parametrize('name', problems.METHODS)
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
