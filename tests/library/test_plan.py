"""Statistics, controller and plan as pure functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import problems
from vsam_jax import sampling, statistics

# One window length, so that the plan compiles once.
K = 12
_jitted_plan = jax.jit(sampling.window_plan)
unit = st.floats(0, 1, exclude_max=True, width=32)


@given(
    budget=st.floats(1, K, width=32),
    uniforms=st.lists(unit, min_size=K, max_size=K),
)
def test_plan_has_exactly_the_budgeted_samples_and_matches_the_loop(budget, uniforms):
    uniforms = np.array(uniforms, np.float32)
    plan = np.asarray(_jitted_plan(jnp.float32(budget), jnp.asarray(uniforms)))
    assert plan.sum() == int(np.floor(np.float32(budget)))
    assert plan.tolist() == problems.step_by_step_plan(budget, uniforms)


@pytest.mark.parametrize('window', [2, 3, 50])
def test_plan_of_every_budget_at_the_extremes_of_the_uniforms(window):
    for budget in range(1, window + 1):
        for u in (0.0, 1 - 2**-24):
            plan = sampling.window_plan(
                jnp.float32(budget), jnp.full((window,), u, jnp.float32)
            )
            assert int(plan.sum()) == budget


def test_uniforms_are_a_function_of_seed_and_window_alone():
    draw = lambda seed, index: np.asarray(
        sampling.window_uniforms(seed, jnp.int32(index), 50)
    )
    assert draw(0, 3).dtype == np.float32
    np.testing.assert_array_equal(draw(0, 3), draw(0, 3))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(draw(0, 3), draw(0, 3))
        in_64_bit = draw(0, 3)
    np.testing.assert_array_equal(draw(0, 3), in_64_bit)
    before = draw(0, 3)
    with jax.default_prng_impl('rbg'):
        np.testing.assert_array_equal(draw(0, 3), before)
    assert not np.array_equal(draw(0, 3), draw(0, 4))
    assert not np.array_equal(draw(0, 3), draw(1, 3))
    many = np.concatenate([draw(0, i) for i in range(40)])
    assert 0 <= many.min() <= many.max() < 1
    assert abs(many.mean() - 0.5) < 0.03


finite_norm = st.floats(0, float(np.finfo(np.float32).max), width=32)
_push = jax.jit(statistics.push_sample, static_argnames='segments')
_next_budget = jax.jit(
    sampling.next_budget,
    static_argnames=('norm_gain', 'variance_gain', 'max_budget'),
)


@given(
    samples=st.lists(st.tuples(finite_norm, finite_norm), max_size=2 * K),
    budget=st.floats(1, 9, width=32),
)
def test_budget_stays_finite_and_in_bounds_for_any_norms(samples, budget):
    rings = statistics.init_rings(K, jnp.float32)
    for g, s in samples:
        rings = _push(rings, jnp.float32(g), jnp.float32(s), segments=4)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(rings))
    assert int(rings.filled) == min(len(samples), K)
    for gain in (0.13, 1e38):
        new = float(
            _next_budget(
                jnp.float32(budget),
                rings,
                norm_gain=gain,
                variance_gain=gain,
                max_budget=9,
            )
        )
        assert 1 <= new <= 9


@given(
    st.lists(st.floats(0.1, 100), min_size=K, max_size=K),
    st.integers(0, K),
)
def test_relative_change_is_the_mean_over_the_pairs_that_exist(values, filled):
    values = np.array(values, np.float32)
    kept = values[K - filled :].astype(np.float64)
    want = np.mean(np.diff(kept) / kept[:-1]) if filled > 1 else 0.0
    got = statistics.relative_change(jnp.asarray(values), jnp.int32(filled))
    assert float(got) == pytest.approx(np.clip(want, -1, 1), abs=1e-5)


def test_relative_change_leaves_out_pairs_that_start_at_zero():
    ring = jnp.array([1.0, 0.0, 2.0, 3.0])
    got = statistics.relative_change(ring, jnp.int32(4))
    assert float(got) == pytest.approx((-1.0 + 0.5) / 2)
    assert float(statistics.relative_change(jnp.zeros(4), jnp.int32(4))) == 0


def test_segment_variance_is_that_of_numpy():
    norms = np.random.default_rng(0).normal(size=50) ** 2
    groups = np.sort(norms).reshape(5, 10)
    want = np.mean([group.var(ddof=1) for group in groups])
    got = statistics.segment_variance(jnp.asarray(norms, jnp.float32), 5)
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_rings_hold_the_last_samples_oldest_first():
    rings = statistics.init_rings(4, jnp.float32)
    for i in range(1, 7):
        rings = _push(rings, jnp.float32(2.0), jnp.float32(i), segments=2)
    assert rings.norms.tolist() == [3, 4, 5, 6]
    assert rings.ratios.tolist() == [1.5, 2, 2.5, 3]
    assert rings.variances[-1] == statistics.segment_variance(rings.norms, 2)
    assert int(rings.filled) == 4


def test_a_rising_ratio_raises_the_budget_and_a_falling_one_lowers_it():
    rings = statistics.init_rings(4, jnp.float32)._replace(filled=jnp.int32(4))
    controller = lambda ratios, variances: float(
        sampling.next_budget(
            jnp.float32(2),
            rings._replace(ratios=jnp.array(ratios), variances=jnp.array(variances)),
            norm_gain=0.1,
            variance_gain=0.2,
            max_budget=3,
        )
    )
    ones, doubling, halving = [1.0] * 4, [1.0, 2, 4, 8], [8.0, 4, 2, 1]
    assert controller(ones, ones) == 2
    assert controller(doubling, ones) == pytest.approx(2 * 1.1)
    assert controller(ones, doubling) == pytest.approx(2 * 1.2)
    assert controller(halving, ones) == pytest.approx(2 * (1 - 0.05))
    assert controller([1.0, 1e6, 1e12, 1e18], doubling) == pytest.approx(2.6)
    assert controller([1.0, 0, 0, 0], [1.0, 0, 0, 0]) == pytest.approx(2 * 0.7)


def test_a_number_on_the_threshold_is_a_sample():
    plan = sampling.window_plan(jnp.float32(2), jnp.array([0.5, 0.1, 0.1, 0.6]))
    assert plan.tolist() == [True, False, False, True]


def test_plans_are_drawn_from_seed_and_window_as_ever():
    """Else a run that another version resumes would have other plans."""
    uniforms = sampling.window_uniforms(1, jnp.int32(2), 3)
    expected = [0.68284010887146, 0.421869158744812, 0.4913320541381836]
    np.testing.assert_array_equal(uniforms, np.float32(expected))
