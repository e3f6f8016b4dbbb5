"""vSAM at a steady rate: a weight that depends on the norms of the sample alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsam_jax
from tests import problems
from tests.library.quartic import Quartic
from vsam_jax import reuse
from vsam_jax._state import only_state


def noise_power(norms, weights):
    """Of directions that have gradients of their own and share one PSF."""
    grad_norm, psf_norm = norms
    return len(weights) * grad_norm**2 + sum(weights) ** 2 * psf_norm**2


def steady_reference(problem, *, rho, every, tolerance, learning_rate=0.05):
    """The method from its definition, on vectors, in NumPy."""
    w, psf, weight, path = problem.start.copy(), None, None, []
    for step in range(len(problem.linear)):
        g = problem.grad(w, step)
        if step % every == 0:
            psf = problem.grad(w + rho * g / np.linalg.norm(g), step) - g
            # The largest weight that is allowed, looked for instead of solved for.
            norms = np.linalg.norm(g), np.linalg.norm(psf)
            sam = every * (norms[0] ** 2 + norms[1] ** 2)
            low, high = 0.0, 1.0
            for _ in range(60):
                middle = (low + high) / 2
                power = noise_power(norms, [1.0] + [middle] * (every - 1))
                allowed = power <= (1 + tolerance) * sam
                low, high = (middle, high) if allowed else (low, middle)
            weight = high
        w = w - learning_rate * (g + (psf if step % every == 0 else weight * psf))
        path.append(w)
    return np.array(path)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(('rho', 'every', 'tolerance'), [(0.3, 3, 0.3), (1.0, 5, 0.1)])
def test_steady_vsam_is_its_definition(rho, every, tolerance):
    problem = Quartic()
    method = vsam_jax.steady_vsam(rho, every=every, tolerance=tolerance)
    path, state = problem.run(method)
    expected = steady_reference(problem, rho=rho, every=every, tolerance=tolerance)
    problems.assert_close(path, expected)
    assert int(state.num_samples) == -(-len(path) // every)


@pytest.mark.parametrize('every', [2, 3, 7])
@pytest.mark.parametrize('ratio', [1e-30, 0.1, 0.7, 1.0, 10.0, 1e30])
@pytest.mark.parametrize('tolerance', [0.0, 0.3, 2.0])
def test_the_weight_is_the_largest_within_the_tolerance(every, ratio, tolerance):
    norms = reuse.SampleNorms(jnp.float32(1e-5), jnp.float32(1e-5) * ratio)
    weight = float(reuse.steady_weight(norms, every=every, tolerance=tolerance))
    assert 0 < weight <= 1
    scaled = 1.0, float(norms.psf_norm) / float(norms.grad_norm)
    sam = every * (1 + scaled[1] ** 2)
    power = noise_power(scaled, [1] + [weight] * (every - 1))
    assert power <= (1 + tolerance) * sam * (1 + 1e-5)
    if weight < 1:
        np.testing.assert_allclose(power, (1 + tolerance) * sam, rtol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
@pytest.mark.parametrize('tolerance', [0.0, 0.3])
def test_the_weight_is_finite_whatever_the_norms_are(dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        limits = jnp.finfo(dtype)
        values = [0.0, float(limits.smallest_subnormal), float(limits.tiny), 1.0]
        values += [float(limits.max)]
        for grad_norm in values:
            for psf_norm in values:
                norms = reuse.SampleNorms(
                    jnp.asarray(grad_norm, dtype), jnp.asarray(psf_norm, dtype)
                )
                weight = reuse.steady_weight(norms, every=3, tolerance=tolerance)
                assert weight.dtype == dtype
                assert 0 < float(weight) <= 1


def test_every_third_step_is_planned_from_the_first_to_the_last():
    """The plan of a window is there a window ahead, in `init` already."""
    tx = vsam_jax.steady_vsam(0.1)
    step = jax.jit(problems.make_step(tx, problems.toy_loss))
    params = problems.toy_params()
    state = (params, tx.init(params))
    taken, plan = [], []
    for batch in problems.toy_batches(140):
        opt_state = only_state(state)
        if int(opt_state.position) == 0:
            plan.extend(np.asarray(opt_state.plan))
        state, _ = step(state, batch)
        taken.append(bool(only_state(state).sampled))
    np.testing.assert_array_equal(taken, np.arange(140) % 3 == 0)
    np.testing.assert_array_equal(taken, plan[:140])
    assert float(only_state(state).budget) * 3 == len(opt_state.plan)


def test_reuse_ends_when_two_samples_in_a_row_are_missing():
    tx = vsam_jax.steady_vsam(0.1, every=3)
    params = problems.toy_params()
    grad_fn = lambda p: jax.tree.map(lambda x: x**3, p)
    broken = lambda p: jax.tree.map(lambda x: x * jnp.nan, p)
    grads = grad_fn(params)
    update = jax.jit(
        lambda state, sample, good: tx.update(
            grads,
            state,
            params,
            grad_fn=lambda p: jax.tree.map(
                lambda a, b: jnp.where(good, a, b), grad_fn(p), broken(p)
            ),
            sample=sample,
        )
    )
    state = tx.init(params)
    direction, state = update(state, False, True)
    problems.assert_equal(direction, grads)  # Nothing to reuse yet.
    _, state = update(state, True, True)
    reused = []
    for step in range(1, 8):
        direction, state = update(state, step % 3 == 0, False)
        if step % 3:
            reused.append(not np.array_equal(direction['bias'], grads['bias']))
    assert reused == [True, True, True, True, False]  # Steps 1, 2, 4, 5 and 7.
    assert int(state.num_rejected) == 2


@pytest.mark.usefixtures('x64')
def test_on_every_step_it_is_sam_and_stores_nothing():
    path, state = Quartic().run(vsam_jax.steady_vsam(0.3, every=1))
    expected, _ = Quartic().run(vsam_jax.sam(0.3))
    np.testing.assert_array_equal(path, expected)
    assert state.psf is None


@pytest.mark.usefixtures('x64')
def test_under_scan_and_vmap_each_run_is_what_it_is_alone():
    tx = optax.chain(vsam_jax.steady_vsam(0.2), optax.sgd(0.001, momentum=0.9))
    step = problems.make_step(tx, problems.toy_loss)
    batches = jnp.stack(problems.toy_batches(7, jnp.float64))

    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), batches)[0]

    starts = [
        jax.tree.map(lambda w, s=scale: w * s, problems.toy_params(jnp.float64))
        for scale in (0.5, 1.5)
    ]
    together = jax.jit(jax.vmap(train))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    )
    for i, start in enumerate(starts):
        problems.assert_close(jax.tree.map(lambda x, i=i: x[i], together), train(start))


def test_norms_of_the_picked_tensors_decide_the_weight():
    params = {'small': jnp.ones(2), 'large': jnp.full(2, 10.0)}
    grad_fn = lambda p: jax.tree.map(lambda x: x**3, p)
    grads = grad_fn(params)
    for mask in (None, {'small': True, 'large': False}):
        tx = vsam_jax.steady_vsam(5.0, stats_mask=mask)
        _, state = tx.update(
            grads, tx.init(params), params, grad_fn=grad_fn, sample=True
        )
        direction, _ = tx.update(grads, state, params, sample=False)
        picked = 'small' if mask else 'large'  # Which of them dominates the norms.
        norms = reuse.SampleNorms(
            *(optax.tree.norm(tree[picked]) for tree in (grads, state.psf))
        )
        weight = reuse.steady_weight(norms, every=3, tolerance=0.3)
        expected = optax.tree.add_scale(grads, weight, state.psf)
        problems.assert_close(direction, expected, atol=0, rtol=1e-4)


@pytest.mark.parametrize(
    ('settings', 'error', 'message'),
    [
        ({'every': 0}, ValueError, r'every must be .* got 0'),
        ({'every': 2.5}, TypeError, r'every must be .* got 2\.5'),
        ({'tolerance': -0.1}, ValueError, r'tolerance must be .* got -0\.1'),
        ({'tolerance': None}, TypeError, r'tolerance must be .* got None'),
        ({'every': 1, 'tolerance': np.nan}, ValueError, r'tolerance must be'),
        ({'rho': -1.0}, ValueError, r'rho must be .* got -1'),
    ],
)
def test_steady_vsam_refuses(settings, error, message):
    with pytest.raises(error, match=message):
        vsam_jax.steady_vsam(**settings)


def test_a_psf_serves_two_periods_less_one_step():
    tx = vsam_jax.steady_vsam(0.1, every=3)
    w = jnp.array([1.0, 2.0])
    _, state = tx.update(w**3, tx.init(w), w, grad_fn=lambda p: p**3, sample=True)
    reused = []
    for _ in range(6):
        direction, state = tx.update(w**3, state, w, sample=False)
        reused.append(not np.array_equal(direction, w**3))
    assert reused == [True] * 5 + [False]
