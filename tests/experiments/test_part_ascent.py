"""Ascent on a part of the mini-batch, and amplified samples, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsam_jax
from experiments.methods.amplified import amplified
from experiments.methods.part_ascent import PartAscent
from experiments.training.state import RunState

X = np.random.default_rng(0).normal(size=(8, 3))
Y = np.random.default_rng(1).normal(size=8)
W = np.array([0.5, -1.0, 2.0])


def gradient(w, rows):
    x, y = X[rows], Y[rows]
    return 2 * x.T @ (x @ w - y) / len(y)


def loss_fn(params, batch_stats, batch, key, /):
    del key
    x, y = batch
    loss = jnp.mean((x @ params['w'] - y) ** 2)
    return loss, ({'seen': batch_stats['seen'] + len(y)}, {'loss': loss})


def state():
    return RunState.create(
        apply_fn=loss_fn,
        params={'w': jnp.asarray(W)},
        batch_stats={'seen': jnp.zeros((), jnp.int32)},
        tx=optax.sgd(1.0),
        record=jnp.zeros(()),
        memory=(),
    )


def test_the_gradient_of_all_is_taken_where_that_of_a_part_leads():
    step = PartAscent(rho=0.3, share=1 / 4).make_step(loss_fn)
    new, aux = jax.jit(step)(state(), (jnp.asarray(X), jnp.asarray(Y)))
    part = gradient(W, [0, 4])
    there = W + 0.3 * part / np.linalg.norm(part)
    np.testing.assert_allclose(
        new.params['w'], W - gradient(there, np.arange(8)), rtol=1e-4
    )
    assert int(new.batch_stats['seen']) == 8
    np.testing.assert_allclose(aux['loss'], np.mean((X @ there - Y) ** 2), rtol=1e-5)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [({'rho': -1.0}, 'rho must be'), ({'rho': 0.1, 'share': 0.3}, 'share must be')],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PartAscent(**settings)


def test_a_part_must_divide_the_mini_batch():
    step = PartAscent(rho=0.3, share=1 / 3).make_step(loss_fn)
    with pytest.raises(ValueError, match='got 1/3 of 8 examples'):
        step(state(), (jnp.asarray(X), jnp.asarray(Y)))


def test_samples_are_amplified_and_forgotten():
    tx, params = amplified(0.3, every=2), {'w': jnp.asarray(W)}
    grad = lambda w: {'w': jnp.asarray(gradient(np.asarray(w['w']), np.arange(8)))}
    opt_state, g = tx.init(params), grad(params)
    psf = vsam_jax.sam(0.3)
    sam, _ = psf.update(g, psf.init(params), params, grad_fn=grad)
    with jax.disable_jit():
        first, opt_state = tx.update(g, opt_state, params, grad_fn=grad, sample=True)
        second, _ = tx.update(g, opt_state, params, grad_fn=grad, sample=False)
    expected = g['w'] + 2 * (sam['w'] - g['w'])
    np.testing.assert_allclose(first['w'], expected, rtol=1e-4)
    np.testing.assert_allclose(second['w'], g['w'])
