"""What holds for all gradients: against an independent reference in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import vsam_jax
from tests import problems
from vsam_jax import _numerics, sampling


class Reference:
    """The algorithm step by step in NumPy, float64, one flat parameter vector."""

    def __init__(self, rho, K, S, W, a1, a2, beta, R, p_max, seed):  # noqa: N803
        self.rho, self.K, self.S, self.W = rho, K, S, W
        self.a1, self.a2, self.beta, self.R = a1, a2, beta, R
        self.max_budget, self.seed = int(np.floor(K * p_max + 1e-9)), seed
        self.t, self.b, self.psf, self.age = 0, 1.0, 0.0, R + 1
        self.N, self.Q, self.V, self.filled = np.zeros(K), np.zeros(K), np.zeros(K), 0
        if W == 0:
            self.start_window(0)

    def rel(self, x):
        first = self.K - self.filled
        changes = [
            (x[i] - x[i - 1]) / x[i - 1]
            for i in range(first + 1, self.K)
            if x[i - 1] > 0
        ]
        return np.clip(np.mean(changes), -1, 1) if changes else 0.0

    def start_window(self, index):
        growth = 1 + self.a1 * self.rel(self.Q) + self.a2 * self.rel(self.V)
        self.b = float(np.clip(self.b * growth, 1, self.max_budget))
        uniforms = sampling.window_uniforms(self.seed, jnp.int32(index), self.K)
        self.plan = problems.step_by_step_plan(self.b, np.asarray(uniforms, float))

    def update(self, g, w, grad_fn):
        sampled = self.t < self.W or self.plan[(self.t - self.W) % self.K]
        if sampled:
            norm = np.linalg.norm(g)
            s = grad_fn(w + self.rho * g / (norm + 1e-12)) - g
            direction = g + s
            n = np.linalg.norm(s)
        if sampled and np.isfinite(n) and np.isfinite(norm):
            self.psf, self.age = s, 0
            self.N = np.append(self.N[1:], n)
            self.Q = np.append(self.Q[1:], n / norm if norm > 0 else 0.0)
            groups = np.sort(self.N).reshape(self.S, -1)
            self.V = np.append(self.V[1:], groups.var(axis=1, ddof=1).mean())
            self.filled = min(self.filled + 1, self.K)
        else:
            self.age += 1
        if not sampled:
            c = self.beta**self.age if self.age <= self.R else 0.0
            direction = g + c * self.psf
        self.t += 1
        if self.t >= self.W and (self.t - self.W) % self.K == 0:
            self.start_window((self.t - self.W) // self.K)
        return direction, sampled


def rippled_grad(w):
    """The gradient of a smooth function that is neither convex nor quadratic."""
    return (
        w + np.array([3.0, -1.0, 2.0]) * np.cos(2 * w)
        if isinstance(w, np.ndarray)
        else w + jnp.array([3.0, -1.0, 2.0]) * jnp.cos(2 * w)
    )


# Every example compiles, so failing ones are not shrunk.
@settings(max_examples=8, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    segments=st.integers(1, 3),
    group=st.integers(2, 4),
    warmup=st.integers(0, 20),
    gains=st.tuples(st.floats(0, 2), st.floats(0, 2)),
    beta=st.floats(0, 1),
    reuse_steps=st.integers(0, 8),
    max_rate=st.floats(0.5, 1.0),
    # Below that, s drowns in the rounding of g.
    rho=st.just(0.0) | st.floats(0.01, 0.5),
    seed=st.integers(0, 2**32 - 1),
)
def test_update_is_the_algorithm(
    segments, group, warmup, gains, beta, reuse_steps, max_rate, rho, seed
):
    """direction = g + c(age)·s; budget, plan, age and rings as in the reference."""
    window = segments * group
    reference = Reference(
        rho, window, segments, warmup, *gains, beta, reuse_steps, max_rate, seed
    )
    with jax.enable_x64(True):
        tx = vsam_jax.vsam(
            rho,
            window=window,
            segments=segments,
            warmup_steps=warmup,
            norm_gain=gains[0],
            variance_gain=gains[1],
            decay=beta,
            reuse_steps=reuse_steps,
            max_rate=max_rate,
            seed=seed,
        )
        rng = np.random.default_rng(seed)
        w = rng.normal(size=3)
        state = jax.jit(tx.init)(jnp.asarray(w))
        update = jax.jit(lambda g, s, w: tx.update(g, s, w, grad_fn=rippled_grad))
        for _ in range(warmup + 4 * window):
            g = rippled_grad(w)
            want, sampled = reference.update(g, w, rippled_grad)
            got, state = update(jnp.asarray(g), state, jnp.asarray(w))
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
            assert bool(state.sampled) == sampled
            assert int(state.age) == reference.age
            np.testing.assert_allclose(state.rings.norms, reference.N, rtol=1e-7)
            np.testing.assert_allclose(float(state.budget), reference.b, rtol=1e-7)
            w = w - 0.05 * want + 0.05 * rng.normal(size=3)


odd_numbers = st.sampled_from(
    [0.0, 1.0, -2.0, 1e-30, 1e30, 3e38, float('nan'), float('inf'), -float('inf')]
)
_hostile = vsam_jax.vsam(0.1, window=4, segments=2, warmup_steps=4, norm_gain=2.0)
_hostile_update = jax.jit(
    lambda g, g_sam, state: _hostile.update(
        g, state, jnp.ones(2), grad_fn=lambda _: g_sam
    )
)


@given(
    st.lists(
        st.tuples(*[st.tuples(odd_numbers, odd_numbers)] * 2), min_size=1, max_size=30
    )
)
def test_state_stays_finite_and_budget_in_bounds_for_any_gradients(steps):
    state = _hostile.init(jnp.ones(2))
    for g, g_sam in steps:
        g, g_sam = jnp.array(g), jnp.array(g_sam)
        before = state
        direction, state = _hostile_update(g, g_sam, state)
        problems.assert_finite(state)
        assert 1 <= float(state.budget) <= 3
        assert int(state.step) == int(before.step) + 1
        if state.sampled and state.num_rejected > before.num_rejected:
            assert int(state.age) == int(before.age) + 1
            np.testing.assert_array_equal(state.psf, before.psf)
            np.testing.assert_array_equal(state.rings.norms, before.rings.norms)
            assert int(state.rings.filled) == int(before.rings.filled)
        if state.sampled and not jnp.isfinite(g_sam).all():
            assert not jnp.isfinite(direction).all()


@jax.jit
def psf_norm_on_a_quadratic(hessian, w, rho):
    """‖s‖ and ‖g‖ at w on ½ wᵀ H w."""
    grad_fn = lambda w: hessian @ w
    tx = vsam_jax.vsam(rho)
    _, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn, sample=True)
    return state.psf_norm, state.grad_norm


@given(
    st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    st.lists(st.floats(-1, 1), min_size=4, max_size=4),
    st.floats(1e-3, 1.0),
)
def test_psf_norm_on_a_quadratic_is_at_most_rho_times_the_leading_eigenvalue(
    eigenvalues, w, rho
):
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    hessian = rotation @ np.diag(eigenvalues) @ rotation.T
    bound = rho * max(eigenvalues)
    leading = rotation[:, int(np.argmax(eigenvalues))]
    with jax.enable_x64(True):
        psf_norm, grad_norm = psf_norm_on_a_quadratic(hessian, np.array(w), rho)
        if float(grad_norm) > 1e-6:
            assert float(psf_norm) <= bound * (1 + 1e-9)
        psf_norm, _ = psf_norm_on_a_quadratic(hessian, leading, rho)
        assert float(psf_norm) == pytest.approx(bound, rel=1e-8)


@pytest.mark.parametrize('sample', [True, False, None])
@pytest.mark.parametrize('rho', [0.0, 0, lambda step: 0.0 * step, jnp.zeros(())])
def test_rho_zero_is_the_base_optimizer_exactly(rho, sample):
    tx = vsam_jax.vsam(rho, window=4, segments=2, warmup_steps=2)
    params = problems.mlp_params()
    state = tx.init(params)

    @jax.jit
    def update(grads, state, params):
        # A second pass that rounds differently must not show either.
        rounded = lambda p: jax.tree.map(lambda g: g * (1 + 1e-6), grads)
        return tx.update(grads, state, params, grad_fn=rounded, sample=sample)

    gradient = jax.jit(jax.grad(problems.mlp_loss))
    for batch in problems.mlp_batches(8):
        grads = gradient(params, batch)
        direction, state = update(grads, state, params)
        problems.assert_equal(direction, grads)
        assert float(state.psf_norm) == 0
        params = optax.apply_updates(params, optax.tree.scale(-0.1, direction))


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_sums_of_narrow_arrays_are_rounded_once(dtype):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=500), dtype) for _ in range(2))
    # A number of Python leaves the dtype of what it is multiplied with.
    exact = x.astype(jnp.float32) + 0.3 * y.astype(jnp.float32)
    problems.assert_equal(_numerics.add_scaled(x, 0.3, y), exact.astype(dtype))


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_narrow_parameters_are_perturbed_in_float32_and_rounded_once(dtype):
    rng = np.random.default_rng(0)
    params = {'a': jnp.asarray(rng.normal(size=500), dtype)}
    # ‖g‖ = 316: its square overflows in float16.
    grads = {'a': jnp.asarray(np.full(500, 316 / 500**0.5), dtype)}
    seen = []

    def grad_fn(p):
        seen.append(p)
        return jax.tree.map(lambda g: 2 * g, grads)

    tx = vsam_jax.vsam(0.5)
    direction, state = tx.update(
        grads, tx.init(params), params, grad_fn=grad_fn, sample=True
    )
    wide = np.asarray(grads['a'], np.float32)
    norm = np.linalg.norm(wide)
    assert float(state.grad_norm) == pytest.approx(norm, rel=1e-5)
    assert float(state.psf_norm) == pytest.approx(norm, rel=1e-5)
    assert state.grad_norm.dtype == state.rings.norms.dtype == jnp.float32
    want = np.asarray(params['a'], np.float32) + np.float32(0.5) * wide / norm
    (perturbed,) = seen
    assert perturbed['a'].dtype == direction['a'].dtype == dtype
    np.testing.assert_array_equal(perturbed['a'], jnp.asarray(want).astype(dtype))
    np.testing.assert_array_equal(direction['a'], 2 * grads['a'])


def test_bfloat16_weights_of_size_one_do_not_move_and_float32_ones_do():
    """What the docstring says is lost."""
    grad_fn = lambda p: p
    moved = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        params = jnp.ones(1000, dtype)
        tx = vsam_jax.vsam(0.05)
        _, state = tx.update(params, tx.init(params), params, grad_fn=grad_fn)
        moved[dtype] = float(state.psf_norm)
    assert moved[jnp.bfloat16] == 0
    assert moved[jnp.float32] == pytest.approx(0.05, rel=1e-4)


def test_psf_dtype_halves_the_memory_and_rounds_the_psf_alone():
    params = problems.mlp_params()
    batch = problems.mlp_batches(1)[0]
    grads = jax.grad(problems.mlp_loss)(params, batch)
    grad_fn = lambda p: jax.grad(problems.mlp_loss)(p, batch)
    exact, state = (tx := vsam_jax.vsam(0.1)).update(
        grads, tx.init(params), params, grad_fn=grad_fn
    )
    tx = vsam_jax.vsam(0.1, psf_dtype=jnp.bfloat16)
    rounded, narrow = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert bytes_of(narrow.psf) * 2 == bytes_of(state.psf)
    for a, b, s in zip(exact, rounded, state.psf, strict=True):
        np.testing.assert_allclose(a, b, atol=float(jnp.abs(s).max()) * 2**-8)
    assert float(narrow.psf_norm) == pytest.approx(float(state.psf_norm), rel=1e-5)


def test_overflow_in_a_narrow_psf_dtype_is_a_rejected_sample():
    tx = vsam_jax.vsam(0.1, psf_dtype=jnp.float16)
    params = jnp.ones(2)
    _, state = tx.update(
        jnp.ones(2), tx.init(params), params, grad_fn=lambda p: jnp.full(2, 1e5)
    )
    assert int(state.num_rejected) == 1
    np.testing.assert_array_equal(state.psf, 0)
