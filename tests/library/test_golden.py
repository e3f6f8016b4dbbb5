"""The recorded trajectories of the published algorithm come out again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsam_jax
from tests import problems
from vsam_jax._state import only_state


def replay(transformation, name, samples, *, planned):
    """Yields (step, state before, params after) along a recorded trajectory."""
    data, meta = problems.load_golden(name)
    tx = optax.chain(
        transformation,
        optax.add_decayed_weights(meta['weight_decay']),
        optax.sgd(meta['lr'], momentum=meta['momentum']),
    )
    params = [jnp.asarray(data[f'init_{i}']) for i in range(6)]
    assert params[0].dtype == jnp.float64
    state = (params, tx.init(params))
    train_step = problems.make_step(tx)
    if planned:
        driver = vsam_jax.PlannedStep(train_step)
        run = lambda state, batch, sample: driver(state, batch, sample=sample)
    else:
        jitted = jax.jit(train_step)
        run = lambda state, batch, sample: jitted(
            state, batch, sample=None if sample is None else jnp.array(sample)
        )
    for t, sample in enumerate(samples):
        budget = float(only_state(state).budget)
        batch = (jnp.asarray(data['x'][t]), jnp.asarray(data['y'][t]))
        state, loss = run(state, batch, sample)
        vsam_state = only_state(state)
        yield t, budget, state[0], vsam_state, float(loss)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('planned', [True, False])
def test_vsam_follows_the_authors_implementation(planned):
    data, meta = problems.load_golden('vsam_k10')
    window = meta['window']
    transformation = vsam_jax.vsam(
        meta['rho'],
        window=window,
        segments=meta['segments'],
        warmup_steps=meta['warmup_steps'] + window - 1,
        norm_gain=meta['alpha'][0],
        variance_gain=meta['alpha'][1],
        decay=meta['beta'],
        max_rate=meta['max_rate'],
    )
    samples = [bool(s) for s in data['sampled']]
    steps = replay(transformation, 'vsam_k10', samples, planned=planned)
    for t, budget, params, vsam_state, loss in steps:
        assert budget == pytest.approx(data['budget'][t], abs=1e-6)
        for i, w in enumerate(params):
            np.testing.assert_allclose(w, data[f'params_{i}'][t], rtol=0, atol=1e-12)
        assert float(vsam_state.grad_norm) == pytest.approx(data['grad_norm'][t])
        assert float(vsam_state.psf_norm) == pytest.approx(data['psf_norm'][t])
        assert loss == pytest.approx(data['loss'][t], abs=1e-9)
    assert int(vsam_state.num_samples) == meta['sampled']
    assert float(vsam_state.budget) == meta['final_budget'] == 8


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
    ('make', 'sample', 'planned'),
    [
        (vsam_jax.sam, None, False),
        (lambda rho: vsam_jax.vsam(rho, warmup_steps=10**6), None, False),
        (lambda rho: vsam_jax.vsam(rho, window=10, warmup_steps=0), True, True),
    ],
    ids=['sam', 'vsam-warming-up', 'vsam-told-to-sample'],
)
def test_sam_is_vsam_with_every_step_sampled(make, sample, planned):
    data, meta = problems.load_golden('sam')
    samples = [sample] * meta['steps']
    steps = replay(make(meta['rho']), 'sam', samples, planned=planned)
    for t, _, params, _, _ in steps:
        for i, w in enumerate(params):
            np.testing.assert_allclose(w, data[f'params_{i}'][t], rtol=0, atol=1e-12)


@pytest.mark.usefixtures('x64')
def test_plans_are_those_that_the_authors_drew():
    data, meta = problems.load_golden('vsam_k10')
    window = meta['window']
    start = meta['warmup_steps'] + window - 1
    plan = jax.jit(vsam_jax.sampling.window_plan)
    for first in range(start, meta['steps'] - window + 1, window):
        rows = slice(first, first + window)
        budget = data['budget'][first]
        # Where the authors drew no number, none may matter.
        for filler in (np.nan, 0.0, 0.999):
            uniforms = np.nan_to_num(data['uniform'][rows], nan=filler)
            np.testing.assert_array_equal(
                plan(jnp.asarray(budget), jnp.asarray(uniforms)),
                data['sampled'][rows],
            )
