"""One update: its arguments, masks, transformations of JAX, types and buffers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsam_jax
from tests import problems
from vsam_jax import perturbation, reuse, sampling
from vsam_jax._state import only_state


def small_vsam(**kwargs):
    defaults = {'window': 6, 'segments': 3, 'warmup_steps': 4, 'norm_gain': 1.0}
    return vsam_jax.vsam(0.1, **(defaults | kwargs))


def run(tx, params, batches):
    step = jax.jit(problems.make_step(tx))
    state = (params, tx.init(params))
    for batch in batches:
        state, _ = step(state, batch)
    return state


def test_grad_fn_is_called_at_most_once():
    calls = []

    def grad_fn(p):
        calls.append(p)
        return p

    tx = small_vsam()
    w = jnp.ones(3)
    for sample, expected in ((True, 1), (False, 0), (None, 1), (jnp.array(True), 1)):
        calls.clear()
        tx.update(w, tx.init(w), w, grad_fn=grad_fn, sample=sample)
        assert len(calls) == expected


def test_a_decision_from_outside_overrides_the_plan_and_keeps_the_rest():
    tx = small_vsam()
    w = jnp.ones(3)
    grad_fn = lambda p: 2 * p
    skipped, state = tx.update(w, tx.init(w), w, sample=False)
    np.testing.assert_array_equal(skipped, w)
    assert (int(state.step), int(state.num_samples)) == (1, 0)
    assert not state.sampled
    for sample in (True, jnp.array(True), np.bool_(True)):
        taken, state = tx.update(w, tx.init(w), w, grad_fn=grad_fn, sample=sample)
        assert float(jnp.abs(taken - w).max()) > 0
        assert int(state.rings.filled) == int(state.num_samples) == 1


def test_rho_may_be_a_schedule_of_the_update_count():
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    tx = vsam_jax.vsam(schedule)
    w = jnp.array([3.0, 4.0])
    state = tx.init(w)
    norms = []
    for _ in range(5):
        _, state = tx.update(w, state, w, grad_fn=lambda p: p)
        norms.append(float(state.psf_norm))
    np.testing.assert_allclose(norms, [0, 0.25, 0.5, 0.75, 1.0], atol=1e-6)


def test_a_frozen_part_keeps_epsilon_at_zero_and_counts_in_no_norm():
    params = {'backbone': {'w': jnp.full(3, 2.0)}, 'head': jnp.array([3.0, 4.0])}
    seen = []

    def grad_fn(p):
        seen.append(p)
        return p

    for mask in (
        {'backbone': False, 'head': True},
        lambda p: {'backbone': {'w': False}, 'head': True},
    ):
        seen.clear()
        tx = vsam_jax.vsam(0.5, perturb_mask=mask)
        tx.update(params, tx.init(params), params, grad_fn=grad_fn, sample=True)
        np.testing.assert_array_equal(seen[0]['backbone']['w'], 2.0)
        np.testing.assert_allclose(seen[0]['head'], [3.3, 4.4], rtol=1e-6)


def test_stats_mask_picks_the_tensors_of_the_norms():
    params = {'a': jnp.array([3.0, 4.0]), 'b': jnp.full(2, 100.0)}
    for mask in ({'a': True, 'b': False}, lambda p: {'a': True, 'b': False}):
        tx = vsam_jax.vsam(0.5, stats_mask=mask)
        grads = {'a': jnp.array([3.0, 4.0]), 'b': jnp.zeros(2)}
        g_sam = {'a': jnp.array([6.0, 8.0]), 'b': jnp.full(2, 7.0)}
        direction, state = tx.update(
            grads, tx.init(params), params, grad_fn=lambda p, g_sam=g_sam: g_sam
        )
        assert float(state.grad_norm) == float(state.psf_norm) == 5
        problems.assert_equal(direction, g_sam)
    # What the statistics do not see must be finite all the same.
    g_bad = {'a': jnp.array([6.0, 8.0]), 'b': jnp.full(2, jnp.nan)}
    _, state = tx.update(grads, tx.init(params), params, grad_fn=lambda p: g_bad)
    assert int(state.num_rejected) == 1


def test_first_window_starts_right_after_warm_up():
    w = jnp.ones(2)
    for warmup in (0, 5, 12, 13):
        tx = small_vsam(warmup_steps=warmup)
        state = tx.init(w)
        update = jax.jit(
            lambda state, tx=tx: tx.update(w, state, w, grad_fn=lambda p: 2 * p)
        )
        plans = []
        for step in range(warmup + 12):
            position = int(state.position)
            assert position == (step - warmup) % 6
            plans.append(bool(state.plan[position]))
            _, state = update(state)
            assert bool(state.sampled) == plans[-1]
        assert all(plans[:warmup])
        # b = 1 in the first window; constant norms leave it there.
        assert sum(plans[warmup : warmup + 6]) == 1


def test_by_default_the_rings_are_filled_before_the_first_planned_window():
    """Warm-up is 2K - 1 steps; the next K steps hold floor(b) samples, not all."""
    window = 6
    tx = vsam_jax.vsam(window=window, segments=3, norm_gain=1.5, variance_gain=0.0)
    w = jnp.ones(2)

    @jax.jit
    def update(state):
        # Each PSF is twice the one before: rel(Q) = 1, so b = 1 + 1.5.
        return tx.update(w, state, w, grad_fn=lambda p: w + 2.0**state.step)

    state = tx.init(w)
    plans = []
    for _ in range(3 * window - 1):
        assert float(state.budget) == (1 if len(plans) < 2 * window - 1 else 2.5)
        plans.append(state.plan.tolist())
        _, state = update(state)
        assert bool(state.sampled) == plans[-1][(len(plans) - window) % window]
    assert all(map(all, plans[: 2 * window - 1]))
    assert plans[2 * window - 1 :] == [plans[-1]] * window
    assert sum(plans[-1]) == 2


def test_a_non_finite_sample_shows_once_and_leaves_no_trace():
    tx = optax.chain(
        small_vsam(warmup_steps=100), optax.apply_if_finite(optax.sgd(0.1), 100)
    )
    clean = lambda p: 2 * p
    w = jnp.array([1.0, 2.0])
    state = tx.init(w)
    _, state = tx.update(w, state, w, grad_fn=clean)
    kept = state[0]
    for i, bad in enumerate((jnp.nan, jnp.inf, -jnp.inf)):
        grad_fn = lambda p, bad=bad: p.at[0].set(bad)
        direction, _ = tx.update(w, state, w, grad_fn=grad_fn)
        updates, state = tx.update(w, state, w, grad_fn=grad_fn)
        np.testing.assert_array_equal(direction, 0)
        np.testing.assert_array_equal(updates, 0)  # The guard saw it and acted.
        np.testing.assert_array_equal(state[0].psf, kept.psf)
        problems.assert_equal(state[0].rings, kept.rings)
        assert int(state[0].age) == i + 1
        assert int(state[0].num_rejected) == i + 1
    # The next reuse step takes the older PSF at its own age.
    direction, after = small_vsam().update(w, state[0], w, sample=False)
    np.testing.assert_allclose(direction, w + 0.7**4 * kept.psf, rtol=1e-6)
    assert int(after.age) == 4


@pytest.mark.parametrize('sample', [None, True])
def test_a_rejected_sample_shows_in_every_tensor_of_one_direction(sample):
    params = {'a': jnp.ones(2), 'b': jnp.ones(2)}
    tx, grads = small_vsam(), params
    update = jax.jit(
        lambda state, g_sam: tx.update(
            grads, state, params, grad_fn=lambda p: g_sam, sample=sample
        )
    )
    g_sam = {'a': 3 * jnp.ones(2), 'b': jnp.array([1.0, jnp.inf])}
    direction, state = update(tx.init(params), g_sam)
    assert all(bool(jnp.isnan(x).all()) for x in jax.tree.leaves(direction))
    problems.assert_equal(state.psf, tx.init(params).psf)
    direction, state = update(state, {**g_sam, 'b': jnp.ones(2)})
    problems.assert_equal(direction, {**g_sam, 'b': jnp.ones(2)})


@pytest.mark.parametrize('method', problems.others_slow(problems.METHODS))
@pytest.mark.parametrize('size', [jnp.inf, 1e25])
def test_a_rejected_sample_shows_where_only_its_norm_is_not_finite(method, size):
    tx = problems.METHODS[method](0.1)
    w = {'a': jnp.ones(2), 'b': jnp.ones(2)}
    g_sam = {'a': jnp.ones(2), 'b': jnp.array([1.0, size])}
    update = jax.jit(
        lambda state: tx.update(w, state, w, grad_fn=lambda p: g_sam, sample=True)
    )
    direction, state = update(tx.init(w))
    assert int(state.num_rejected) == 1
    assert all(bool(jnp.isnan(x).all()) for x in jax.tree.leaves(direction))


def test_a_non_finite_first_gradient_is_rejected_too():
    tx = small_vsam()
    w = jnp.array([1.0, 2.0])
    bad = w.at[0].set(jnp.nan)
    direction, state = tx.update(bad, tx.init(w), w, grad_fn=lambda p: p)
    assert bool(jnp.isnan(direction).any())
    assert int(state.num_rejected) == 1
    problems.assert_finite(state)


def test_zero_gradients_give_a_zero_psf_and_a_steady_budget():
    tx = small_vsam()
    w = jnp.ones(3)
    state = tx.init(w)
    update = jax.jit(
        lambda state: tx.update(jnp.zeros(3), state, w, grad_fn=lambda p: 0 * p)
    )
    for _ in range(30):
        direction, state = update(state)
        np.testing.assert_array_equal(direction, 0)
    assert float(state.budget) == 1
    assert int(state.num_rejected) == 0


@pytest.mark.usefixtures('x64')
def test_scan_equals_a_python_loop():
    tx = optax.chain(small_vsam(), optax.sgd(0.1, momentum=0.9))
    params = problems.mlp_params(dtype=jnp.float64)
    batches = problems.mlp_batches(30, dtype=jnp.float64)
    looped = run(tx, params, batches)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
    scanned, _ = jax.lax.scan(
        problems.make_step(tx), (params, tx.init(params)), stacked
    )
    problems.assert_close(looped, scanned)


@pytest.mark.usefixtures('x64')
def test_vmap_equals_a_loop_over_the_members():
    tx = optax.chain(small_vsam(), optax.sgd(0.1))
    members = [problems.mlp_params(seed, jnp.float64) for seed in range(3)]
    batches = problems.mlp_batches(14, dtype=jnp.float64)
    alone, apart = jax.jit(problems.make_step(tx)), []
    for params in members:
        state = (params, tx.init(params))
        for batch in batches:
            state, _ = alone(state, batch)
        apart.append(state)
    stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    params = stack(members)
    state = (params, jax.vmap(tx.init)(params))
    step = jax.jit(jax.vmap(problems.make_step(tx), in_axes=(0, None)))
    for batch in batches:
        state, _ = step(state, batch)
    problems.assert_close(state, stack(apart))


@pytest.mark.usefixtures('x64')
def test_gradients_flow_through_an_unrolled_run():
    batches = problems.toy_batches(4, jnp.float64)  # Warm-up and a window.
    params = problems.toy_params(jnp.float64)
    loss = problems.toy_loss

    def final(rho):
        tx = optax.chain(
            vsam_jax.vsam(rho, window=2, segments=1, warmup_steps=2), optax.sgd(0.1)
        )
        state = (params, tx.init(params))
        for batch in batches:
            state, _ = problems.make_step(tx, loss)(state, batch)
        inner = only_state(state)
        statistics = (inner.grad_norm, inner.psf_norm, inner.budget, inner.rings)
        return loss(state[0], batches[0]), statistics

    value_and_slope = jax.jit(jax.value_and_grad(lambda rho: final(rho)[0]))
    h = 1e-5
    want = (value_and_slope(0.1 + h)[0] - value_and_slope(0.1 - h)[0]) / (2 * h)
    assert float(value_and_slope(0.1)[1]) == pytest.approx(float(want), rel=1e-5)
    # At 0 the PSF vanishes, where a norm has no derivative.
    slopes = jax.jit(jax.jacfwd(final))(0.0)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(slopes))
    # There it keeps the bits of g, but a run that learns ρ must be able to leave it.
    want = (value_and_slope(h)[0] - value_and_slope(0.0)[0]) / h
    assert float(value_and_slope(0.0)[1]) == pytest.approx(float(want), rel=1e-3)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', ['steady_vsam', 'asam', 'looksam', 'fsam'])
def test_gradients_flow_where_norms_vanish(name):
    """At a minimum ‖g‖ is zero, and on a bowl the part of g_SAM across g."""
    bowl = lambda w: jnp.sum(w**2)

    def final(w, rho):
        tx = optax.chain(problems.METHODS[name](rho), optax.sgd(0.1))
        state = (w, tx.init(w))
        for _ in range(3):
            step = problems.make_step(tx, lambda w, _: bowl(w))
            state, _ = step(state, None)
        return bowl(state[0] - 1)

    value_and_slopes = jax.jit(jax.value_and_grad(final, (0, 1)))
    _, (at_minimum, _) = value_and_slopes(jnp.zeros(2), 0.1)
    assert (jnp.abs(at_minimum) < 10).all()  # Not a multiple of 10¹² either.
    w, h = jnp.array([1.0, 0.5]), 1e-6
    (below, _), (_, (_, slope)), (above, _) = (
        value_and_slopes(w, rho) for rho in (0.1 - h, 0.1, 0.1 + h)
    )
    want = (above - below) / (2 * h)
    assert float(slope) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize(
    ('dtype', 'sample'),
    [(jnp.float16, None), (jnp.float64, None), (jnp.bfloat16, True)],
)
def test_types_of_the_state_are_stable(dtype, sample):
    with jax.enable_x64(dtype == jnp.float64):
        tx = small_vsam()
        params = problems.mlp_params(dtype=dtype)
        batch = problems.mlp_batches(1, dtype=dtype)[0]
        step = jax.jit(lambda s, b: problems.make_step(tx)(s, b, sample=sample)[0])
        before = (params, tx.init(params))
        after = step(before, batch)
        types = lambda tree: [
            (x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)
        ]
        assert types(before) == types(after)
        assert jax.tree.structure(before) == jax.tree.structure(after)
        step(after, batch)
        assert step._cache_size() == 1
        assert after[1].budget.dtype == jnp.promote_types(dtype, jnp.float32)
        problems.assert_finite(after)


@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['eager', 'jit'])
def test_no_two_fields_share_a_buffer(transform):
    tx = small_vsam(warmup_steps=0)
    state = transform(tx.init)(problems.mlp_params())
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


def test_donated_states_run_on():
    tx = optax.chain(small_vsam(), optax.sgd(0.1, momentum=0.9))
    params = problems.mlp_params()
    batches = problems.mlp_batches(20)
    kept = run(tx, params, batches)
    step = jax.jit(problems.make_step(tx), donate_argnums=0)
    state = (jax.tree.map(jnp.copy, params), tx.init(params))
    for batch in batches:
        old = state
        state, _ = step(state, batch)
        reused = (old[0], only_state(old).psf)
        assert all(x.is_deleted() for x in jax.tree.leaves(reused))
    problems.assert_equal(state, kept)


def test_stacked_and_nested_trees_give_the_same_numbers_as_a_flat_vector():
    """Invariance under the shape of the parameter tree."""
    flat = jnp.arange(1.0, 7.0)
    nested = {'a': [flat[:1].reshape(1, 1), (flat[1:4],)], 'b': flat[4:].reshape(2, 1)}
    grad_of = lambda p: jax.tree.map(lambda x: x**2, p)
    results = []
    for params in (flat, nested):
        tx = small_vsam()
        state = tx.init(params)
        update = jax.jit(
            lambda state, params, tx=tx: tx.update(
                grad_of(params), state, params, grad_fn=grad_of
            )
        )
        for _ in range(12):
            direction, state = update(state, params)
            params = optax.tree.add_scale(params, -0.01, direction)
        parts = [x.ravel() for x in jax.tree.leaves(params)]
        results.append((np.concatenate(parts), float(state.budget)))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


def test_a_first_gradient_whose_norm_overflows_is_rejected():
    tx = vsam_jax.vsam(0.1)
    w = jnp.ones(2)
    huge = jnp.full(2, 1e30)  # The same in both passes: s is zero.
    _, state = tx.update(huge, tx.init(w), w, grad_fn=lambda p: huge, sample=True)
    assert int(state.num_rejected) == 1
    assert float(state.grad_norm) == 0


def test_rejected_samples_count_as_samples():
    tx = vsam_jax.vsam()
    w = jnp.ones(2)
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda p: p * jnp.nan, sample=True)
    assert int(state.num_samples) == int(state.num_rejected) == 1


def test_counters_stop_at_the_largest_number():
    tx = vsam_jax.vsam(window=2, segments=1, warmup_steps=0, reuse_steps=2**31 - 2)
    w, last = jnp.ones(2), 2**31 - 1
    state = tx.init(w)
    assert int(state.age) == last
    state = state._replace(step=jnp.array(last, jnp.int32))
    direction, state = tx.update(w, state, w, sample=False)
    np.testing.assert_array_equal(direction, w)
    assert int(state.age) == int(state.step) == last


def test_a_decision_may_be_an_array_of_numpy():
    tx = vsam_jax.vsam()
    w = jnp.ones(2)
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda p: p, sample=np.array(True))
    assert bool(state.sampled)


def test_statistics_have_the_widest_dtype_of_all_parameters():
    with jax.enable_x64(True):
        params = {'a': jnp.ones(2, jnp.bfloat16), 'b': jnp.ones(2, jnp.float64)}
        state = vsam_jax.vsam().init(params)
    assert state.budget.dtype == state.rings.norms.dtype == jnp.float64


def test_without_warm_up_the_first_window_has_a_budget_of_its_own():
    class Doubling(sampling.Periodic):
        def init_budget(self, dtype):
            return jnp.ones((), dtype)

        def next_budget(self, budget, rings):
            return 2 * budget

    parts = perturbation.l2_ascent, Doubling(2), reuse.NoReuse()
    state = vsam_jax.sharpness_aware(*parts, 0.1).init(jnp.ones(2))
    assert float(state.budget) == 2
