"""ESAM and SAF: each formula against plain NumPy, and what they are limits of."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsam_jax
from experiments.methods import esam, saf
from experiments.methods.esam import ESAM
from experiments.methods.saf import SAF
from experiments.training.state import RunState
from tests.library import conformance

LEARNING_RATE = 0.5
N, C = 6, 3


def problem() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameters and a mini-batch of a linear classifier."""
    rng = np.random.default_rng(0)
    params = {'w': rng.normal(size=(4, C)), 'b': rng.normal(size=C)}
    batch = {
        'image': rng.normal(size=(N, 4)),
        'label': rng.integers(0, C, N).astype(np.int32),
        'index': np.arange(N, dtype=np.int32),
    }
    return params, batch


def loss_fn(params: Any, batch_stats: Any, batch: Any, key: Any, /):
    del key
    logits = batch['image'] @ params['w'] + params['b']
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    # Counts the examples that running statistics have seen.
    seen = {'seen': batch_stats['seen'] + len(batch['label'])}
    aux = {'loss': losses.mean(), 'losses': losses, 'logits': logits}
    return losses.mean(), (seen, aux)


def state_of(params: Any, tx: Any = None, memory: Any = ()) -> RunState:
    return RunState.create(
        apply_fn=loss_fn,
        params=jax.tree.map(jnp.asarray, params),
        batch_stats={'seen': jnp.zeros((), jnp.int32)},
        tx=optax.sgd(LEARNING_RATE) if tx is None else tx,
        record=jnp.zeros(()),
        memory=memory,
    )


# --- The same in NumPy --------------------------------------------------------


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def forward(params: Any, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits and the loss of each example."""
    logits = batch['image'] @ params['w'] + params['b']
    return logits, -log_softmax(logits)[np.arange(len(logits)), batch['label']]


def backward(batch: Any, by_logits: np.ndarray) -> dict[str, np.ndarray]:
    return {'w': batch['image'].T @ by_logits, 'b': by_logits.sum(0)}


def gradient(params: Any, batch: Any) -> dict[str, np.ndarray]:
    """Of the mean cross entropy."""
    logits, _ = forward(params, batch)
    error = np.exp(log_softmax(logits)) - np.eye(C)[batch['label']]
    return backward(batch, error / len(logits))


def rows_of(batch: Any, rows: np.ndarray) -> Any:
    return {name: array[rows] for name, array in batch.items()}


def assert_trees_close(actual: Any, expected: Any) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-10, atol=1e-12)


# --- ESAM ---------------------------------------------------------------------


@pytest.mark.parametrize('seed', range(4))
def test_a_step_of_esam_is_what_numpy_makes_of_the_same_tensors(x64, seed):
    params, batch = problem()
    method = ESAM(rho=0.7, beta=0.5, gamma=0.4, seed=seed)
    key = jax.random.fold_in(jax.random.key(seed), 0)
    drawn = esam.draw_tensors(key, params, method.beta)

    grads = gradient(params, batch)
    chosen = [name for name in params if drawn[name]]
    norm = np.sqrt(sum(np.sum(grads[name] ** 2) for name in chosen))
    perturbed = dict(params)
    for name in chosen:
        perturbed[name] = params[name] + 0.7 / 0.5 * grads[name] / (norm + 1e-12)
    rise = forward(perturbed, batch)[1] - forward(params, batch)[1]
    # ⌈0.4 · 6⌉
    rows = np.argsort(-rise)[:3] if chosen else np.arange(3)
    direction = gradient(perturbed, rows_of(batch, rows))
    expected = {name: params[name] - LEARNING_RATE * direction[name] for name in params}

    new, aux = jax.jit(method.make_step(loss_fn))(state_of(params), batch)
    assert_trees_close(new.params, expected)
    # Of the first pass: of all examples, at the parameters themselves.
    assert int(new.batch_stats['seen']) == N
    np.testing.assert_allclose(aux['losses'], forward(params, batch)[1])


def test_the_tensors_that_esam_moves_differ_from_step_to_step_with_share_beta():
    params = {str(number): jnp.zeros(()) for number in range(50)}
    drawn = np.array(
        [
            jax.tree.leaves(esam.draw_tensors(jax.random.key(step), params, 0.6))
            for step in range(40)
        ]
    )
    assert len(np.unique(drawn, axis=0)) == 40
    # The standard deviation of this mean is 0.011.
    assert abs(drawn.mean() - 0.6) < 0.05
    assert np.ptp(drawn.mean(axis=0)) > 0


def test_esam_of_all_tensors_and_examples_is_sam(x64):
    params, batch = problem()
    sam = optax.chain(vsam_jax.sam(rho=0.3), optax.sgd(LEARNING_RATE))
    sam_step = jax.jit(vsam_jax.linen.make_train_step(loss_fn))
    esam_step = jax.jit(ESAM(rho=0.3, beta=1.0, gamma=1.0).make_step(loss_fn))
    state, sam_state = state_of(params), state_of(params, sam)
    for _ in range(3):
        state, _ = esam_step(state, batch)
        sam_state, _ = sam_step(sam_state, batch)
    assert_trees_close(state.params, sam_state.params)


@pytest.mark.parametrize(
    ('gamma', 'batch_size', 'count'),
    [(0.5, 6, 3), (0.5, 7, 4), (0.07, 100, 7), (1.0, 6, 6), (0.01, 6, 1)],
)
def test_the_number_of_examples_of_the_second_gradient_is_rounded_up(
    gamma, batch_size, count
):
    rise = np.random.default_rng(0).normal(size=batch_size)
    rows = np.asarray(esam.steepest(jnp.asarray(rise), gamma))
    assert sorted(rows) == sorted(np.argsort(-rise)[:count])


def test_the_second_gradient_of_esam_costs_what_its_examples_cost():
    width, batch_size = 64, 128
    params = {'w': jnp.zeros((width, C)), 'b': jnp.zeros(C)}
    batch = {
        'image': jnp.zeros((batch_size, width)),
        'label': jnp.zeros(batch_size, jnp.int32),
    }
    flops = {}
    for gamma in (0.25, 1.0):
        step = jax.jit(ESAM(rho=0.1, gamma=gamma).make_step(loss_fn))
        analysis = step.lower(state_of(params), batch).compile().cost_analysis()
        flops[gamma] = analysis['flops']
    # One product forward and one for the kernel, 2 · B · width · C each.
    saved = 0.75 * 2 * (2 * batch_size * width * C)
    assert flops[1.0] - flops[0.25] == pytest.approx(saved, rel=0.2)


# --- SAF ----------------------------------------------------------------------


def test_the_divergence_is_that_of_softened_outputs(x64):
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(2, N, C))
    log_p, log_q = log_softmax(old / 5), log_softmax(new / 5)
    expected = 25 * np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    np.testing.assert_allclose(saf.divergence(old, new, 5.0), expected, rtol=1e-10)
    np.testing.assert_allclose(saf.divergence(old, old, 5.0), 0, atol=1e-12)


def test_steps_of_saf_are_what_numpy_makes_of_them(x64):
    # Epochs of two mini-batches out of five of six examples, another one of which
    # is left out in each epoch.
    params, data = problem()
    method = SAF(
        num_examples=N,
        num_classes=C,
        steps_per_epoch=2,
        weight=0.8,
        temperature=2.0,
        lag=2,
        start=3,
    )
    step = jax.jit(method.make_step(loss_fn))
    state = state_of(params, memory=method.init_memory())
    history: dict[tuple[int, int], np.ndarray] = {}
    rng, terms = np.random.default_rng(1), 0
    for epoch in range(7):
        order = np.delete(np.arange(N), epoch % N)
        order = rng.permutation(order)[:4].reshape(2, 2)
        for rows in order:
            batch = rows_of(data, rows)
            logits, _ = forward(params, batch)
            error = np.exp(log_softmax(logits)) - np.eye(C)[batch['label']]
            for place, row in enumerate(rows):
                old = history.get((epoch - 2, row))
                if epoch >= 3 and old is not None:
                    # The derivative of τ² KL by the logits.
                    soft = [np.exp(log_softmax(x / 2)) for x in (logits[place], old)]
                    error[place] += 0.8 * 2 * (soft[0] - soft[1])
                    terms += 1
                history[epoch, row] = logits[place].astype(np.float32)
            grads = backward(batch, error / 2)
            params = {k: v - LEARNING_RATE * grads[k] for k, v in params.items()}
            state, _ = step(state, batch)
            np.testing.assert_allclose(state.params['w'], params['w'], atol=1e-6)
            np.testing.assert_allclose(state.params['b'], params['b'], atol=1e-6)
    assert 0 < terms < 4 * 4  # Some took part, some could not.


def test_saf_is_sgd_before_its_first_epoch_and_not_from_then_on():
    params, batch = problem()
    method = SAF(N, C, steps_per_epoch=1, lag=1, start=3)
    saf_step = jax.jit(method.make_step(loss_fn))
    sgd_step = jax.jit(vsam_jax.linen.make_train_step(loss_fn))
    state = state_of(params, memory=method.init_memory())
    sgd_state = state_of(params)
    for epoch in range(5):
        state, _ = saf_step(state, batch)
        sgd_state, _ = sgd_step(sgd_state, batch)
        same = np.allclose(state.params['w'], sgd_state.params['w'], rtol=1e-5)
        assert same == (epoch < 3)


# --- Arguments ----------------------------------------------------------------


@pytest.mark.parametrize(
    ('method', 'settings', 'message'),
    [
        (ESAM, {'rho': -1.0}, 'rho must be a finite number >= 0, got -1.0'),
        (ESAM, {'rho': 0.1, 'beta': 0.0}, r'beta must be a share in \(0, 1\], got 0'),
        (ESAM, {'rho': 0.1, 'gamma': 1.5}, r'gamma must be a share .* got 1.5'),
        (SAF, {'lag': 0}, 'lag must be an integer >= 1, got 0'),
        (SAF, {'start': 2.5}, 'start must be an integer >= 0, got 2.5'),
        (SAF, {'temperature': 0.0}, 'temperature must be a finite number > 0, got 0.0'),
        (SAF, {'weight': -0.1}, 'weight must be a finite number >= 0, got -0.1'),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(method, settings, message):
    task = {'num_examples': N, 'num_classes': C, 'steps_per_epoch': 1}
    with pytest.raises(ValueError, match=message):
        method(**settings, **(task if method is SAF else {}))


# --- Runs that the authors' program recorded ----------------------------------


@pytest.mark.parametrize('name', ['esam', 'esam_2', 'esam_3'])
def test_esam_follows_the_program_of_its_authors(name):
    """Given which tensors were perturbed: those are drawn from another generator."""
    with jax.enable_x64(True):
        data, meta = conformance.load(name)
        count = len(meta['order'])
        of_arrays = lambda arrays: conformance.tree(meta, list(arrays))
        params = of_arrays(jnp.asarray(data[f'init_{i}']) for i in range(count))
        tx = optax.chain(
            optax.add_decayed_weights(meta['weight_decay']),
            optax.sgd(meta['lr'], momentum=meta['momentum']),
        )
        loss = conformance.loss_of(meta)
        losses = jax.vmap(
            lambda p, x, y: loss(p, (x[None], y[None])), in_axes=(None, 0, 0)
        )
        # The program keeps what rose more than the k-th largest rise: one fewer.
        kept = 32 if meta['gamma'] == 1 else int(meta['gamma'] * 32) - 1

        @jax.jit
        def step(params, opt_state, x, y, active):
            perturbed = esam.perturb_some(
                params,
                jax.grad(loss)(params, (x, y)),
                of_arrays(active),
                meta['rho'] / meta['beta'],
            )
            rise = losses(perturbed, x, y) - losses(params, x, y)
            rows = esam.steepest(rise, meta['gamma'])[:kept]
            grads = jax.grad(loss)(perturbed, (x[rows], y[rows]))
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, rows

        opt_state = tx.init(params)
        for t in range(meta['steps']):
            batch = jnp.asarray(data['x'][t]), jnp.asarray(data['y'][t])
            params, opt_state, rows = step(
                params, opt_state, *batch, jnp.asarray(data['active'][t])
            )
            assert set(np.asarray(rows)) == set(np.flatnonzero(data['selected'][t]))
            for row in np.flatnonzero(data['at'] == t):
                expected = of_arrays(data[f'params_{i}'][row] for i in range(count))
                # The program divides by the norm and 1e-7.
                chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-6)
