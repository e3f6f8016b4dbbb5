"""Momentum-SAM: last in the chain, one gradient a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import vsam_jax
from tests import problems


def make(rho=0.3, base=None):
    base = base or optax.sgd(0.1, momentum=0.9)
    return optax.chain(optax.add_decayed_weights(1e-2), base, vsam_jax.msam(rho))


def run(tx, steps=12, step=None):
    params = problems.mlp_params()
    state = (params, tx.init(params))
    step = step or jax.jit(problems.make_step(tx))
    for batch in problems.mlp_batches(steps):
        state, _ = step(state, batch)
    return state


def products(step, *arguments):
    text = str(jax.make_jaxpr(step)(*arguments))
    return text.count('dot_general')


def test_a_step_has_as_many_matrix_products_as_one_of_sgd():
    params, (batch,) = problems.mlp_params(), problems.mlp_batches(1)
    counts = []
    for tx in (optax.sgd(0.1), make(), optax.chain(vsam_jax.sam(), optax.sgd(0.1))):
        state = params, tx.init(params)
        counts.append(products(problems.make_step(tx), state, batch))
    sgd, msam, sam = counts
    assert msam == sgd < sam


def test_the_gradient_is_taken_where_the_momentum_leads():
    w, state = jnp.array([1.0, 2.0]), None
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), vsam_jax.msam(0.5))
    state = tx.init(w)
    gradients = [jnp.array([3.0, 4.0]), jnp.array([-1.0, 2.0])]
    plain, momentum = w, 0.0
    for g in gradients:
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
        momentum = 0.9 * momentum + g
        plain = plain - 0.1 * momentum
        np.testing.assert_allclose(
            w, plain - 0.5 * momentum / jnp.linalg.norm(momentum), rtol=1e-5
        )
        np.testing.assert_allclose(
            vsam_jax.msam_eval_params(state, w), plain, rtol=1e-5
        )


@pytest.mark.parametrize('base', [optax.sgd(0.1), optax.adam(1e-2), optax.lion(1e-3)])
def test_at_radius_zero_it_is_the_base_optimizer(base):
    tx = optax.chain(base, vsam_jax.msam(0.0))
    problems.assert_equal(run(tx)[0], run(base)[0])


def test_it_goes_through_every_driver_and_wrapper():
    reference = run(make())
    tx = make()
    planned = vsam_jax.PlannedStep(problems.make_step(tx), donate_state=False)
    problems.assert_close(run(tx, step=planned)[0], reference[0], 1e-6)
    guarded = optax.apply_if_finite(make(), 3)
    problems.assert_close(run(guarded)[0], reference[0], 1e-6)
    params, _ = reference
    shown = vsam_jax.msam_eval_params(run(guarded)[1], params)
    problems.assert_close(shown, vsam_jax.msam_eval_params(reference[1], params), 1e-6)


def test_an_update_of_zero_leaves_the_perturbation_as_it_is():
    """One comes from optax.MultiSteps, from a warm-up and from a skipped step."""
    half = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx = optax.chain(half, vsam_jax.msam(0.5))
    w = jnp.array([3.0, 4.0])
    state, lengths = tx.init(w), []
    for _ in range(5):
        updates, state = tx.update(w, state, w)
        w = optax.apply_updates(w, updates)
        offset = w - vsam_jax.msam_eval_params(state, w)
        lengths.append(float(jnp.linalg.norm(offset)))
    np.testing.assert_allclose(lengths, [0, 0.5, 0.5, 0.5, 0.5], atol=1e-5)


def test_updates_of_a_small_dtype_do_not_make_float32_parameters_drift():
    tx, plain = optax.chain(optax.sgd(0.1), vsam_jax.msam(0.3)), optax.sgd(0.1)
    w = v = jnp.ones(1000)
    state, base = tx.init(w), plain.init(v)
    for key in jax.random.split(jax.random.key(0), 50):
        g = jax.random.normal(key, (1000,)).astype(jnp.bfloat16)
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
        updates, base = plain.update(g, base, v)
        v = optax.apply_updates(v, updates)
    np.testing.assert_allclose(vsam_jax.msam_eval_params(state, w), v, atol=1e-4)


def test_it_works_for_a_model_of_nnx():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), vsam_jax.msam(0.3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.as_pure(nnx.state(model, nnx.Param))
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((4, 2))) ** 2))(model)
    optimizer.update(model, grads)
    shown = vsam_jax.msam_eval_params(optimizer, nnx.state(model, nnx.Param))
    expected = optax.tree.add_scale(before, -0.1, nnx.as_pure(grads))
    problems.assert_close(nnx.as_pure(shown), expected, 1e-6)


def test_masked_tensors_are_left_alone():
    tx = optax.chain(
        optax.sgd(0.1), optax.masked(vsam_jax.msam(0.5), {'a': True, 'b': False})
    )
    w = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([1.0])}
    updates, state = tx.update(w, tx.init(w), w)
    w = optax.apply_updates(w, updates)
    shown = vsam_jax.msam_eval_params(state, w)
    problems.assert_equal(shown['b'], w['b'])
    np.testing.assert_allclose(jnp.linalg.norm(w['a'] - shown['a']), 0.5, rtol=1e-5)


def test_a_schedule_of_the_radius_takes_the_old_offset_back_whole():
    tx = vsam_jax.msam(optax.piecewise_constant_schedule(0.5, {1: 0.0}))
    w = jnp.array([3.0, 4.0])
    first, state = tx.update(w, tx.init(w))
    second, _ = tx.update(w, state)
    np.testing.assert_allclose(w + first + second, 3 * w, rtol=1e-6)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_types_of_state_and_updates_are_stable(dtype):
    tx, w = vsam_jax.msam(0.1), jnp.ones(3, dtype)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    state = tx.init(w)
    updates, after = jax.jit(tx.update)(w, state)
    assert types(after) == types(state)
    assert updates.dtype == dtype


@pytest.mark.parametrize('number', [0, 2])
def test_a_state_without_it_or_with_two_is_named(number):
    tx = optax.chain(*[vsam_jax.msam() for _ in range(number)], optax.sgd(0.1))
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=f'exactly one MSAMState.*holds {number}'):
        vsam_jax.msam_eval_params(tx.init(w), w)


def test_parameters_of_another_tree_are_named():
    state = vsam_jax.msam().init({'a': jnp.ones(2)})
    with pytest.raises((TypeError, ValueError), match='params'):
        vsam_jax.msam_eval_params(state, {'b': jnp.ones(2)})
