"""The report on radii, against quadratics and against NumPy."""

import builtins
import itertools

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import vsam_jax
from vsam_jax import perturbation

pytestmark = pytest.mark.around

RHOS = (0.02, 0.3, 2.0)
CURVATURE = np.array([1.0, 4.0, 10.0])


def bowl(w, center):
    """A loss whose Hessian is the same for all mini-batches."""
    return jnp.sum(jnp.asarray(CURVATURE, w.dtype) * (w - center) ** 2) / 2


def centers(n=12, dtype=np.float64):
    return np.random.default_rng(0).normal(size=(n, 3)).astype(dtype)


def share_of_noise(vectors):
    """One less what products of different mini-batches have in common."""
    pairs = [a @ b for a, b in itertools.permutations(vectors, 2)]
    share = 1 - np.mean(pairs) / np.mean((vectors**2).sum(axis=1))
    return np.clip(share, 0, 1)


def expected(w, batches, rho):
    """g, s and the rise of the loss on the quadratic, a row per mini-batch."""
    g = CURVATURE * (w - batches)
    norms = np.linalg.norm(g, axis=1)
    e = rho * g / norms[:, None]
    s = CURVATURE * e
    return g, s, (g * e).sum(axis=1) + (e * s).sum(axis=1) / 2


def test_on_a_quadratic_all_is_known(x64):
    w, batches = np.array([0.9, -0.3, 0.6]), centers()
    found = vsam_jax.diagnose(jax.value_and_grad(bowl), w, batches, RHOS)
    np.testing.assert_array_equal(found.rhos, RHOS)
    assert found.num_batches == 12
    for i, rho in enumerate(RHOS):
        g, s, rise = expected(w, batches, rho)
        ratios = np.linalg.norm(s, axis=1) / np.linalg.norm(g, axis=1)
        h = g + s
        cosines = (g * h).sum(1) / np.linalg.norm(g, axis=1) / np.linalg.norm(h, axis=1)
        near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9)
        near(found.ratio[i], np.median(ratios))
        near(found.ratio_quartiles[:, i], np.quantile(ratios, (0.25, 0.75)))
        near(found.cosine[i], np.median(cosines))
        near(found.sharpness[i], rise.mean())
        near(found.psf_noise[i], share_of_noise(s))
    near(found.grad_noise, share_of_noise(g))
    near(found.grad_norm, np.median(np.linalg.norm(g, axis=1)))
    assert 0.01 < found.psf_noise[0] < 0.99


def test_noise_is_none_of_equal_mini_batches_and_all_of_opposite_ones(x64):
    grad = jax.grad(bowl)
    same = vsam_jax.diagnose(grad, np.ones(3), np.zeros((5, 3)), RHOS)
    np.testing.assert_allclose(same.psf_noise, 0, atol=1e-12)
    np.testing.assert_allclose(same.grad_noise, 0, atol=1e-12)
    opposite = np.array([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
    other = vsam_jax.diagnose(grad, np.zeros(3), opposite, RHOS)
    np.testing.assert_array_equal(other.psf_noise, 1)
    assert other.grad_noise == 1


def test_the_share_of_noise_does_not_grow_with_few_mini_batches(x64):
    """Its mean over pairs of mini-batches is what all of them together give."""
    w, batches = np.array([3.0, -1.0, 2.0]), centers(6)
    many = vsam_jax.diagnose(jax.grad(bowl), w, batches, (0.1,))
    s = expected(w, batches, 0.1)[1]
    powers, noises = [], []
    for i, j in itertools.combinations(range(6), 2):
        two = vsam_jax.diagnose(jax.grad(bowl), w, batches[[i, j]], (0.1,))
        powers.append((s[[i, j]] ** 2).sum())
        noises.append(two.psf_noise[0])
    assert 0 < min(noises) < max(noises) < 1  # None was held within its bounds.
    mean = np.average(noises, weights=powers)
    np.testing.assert_allclose(mean, many.psf_noise[0], rtol=1e-9)


def test_trees_masks_and_rules_of_perturbation(x64):
    def loss(params, batch):
        return bowl(params['a'], batch) + bowl(params['b'], -batch)

    params = {'a': jnp.array([3.0, -1.0, 2.0]), 'b': jnp.ones(3)}
    batches = centers()
    only_a = vsam_jax.diagnose(
        jax.grad(loss), params, batches, RHOS, perturb_mask={'a': True, 'b': False}
    )
    for i, rho in enumerate(RHOS):
        g, s, _ = expected(np.asarray(params['a']), batches, rho)
        g_b = CURVATURE * (1 + batches)
        ratios = np.linalg.norm(s, axis=1) / np.linalg.norm(np.hstack([g, g_b]), axis=1)
        np.testing.assert_allclose(only_a.ratio[i], np.median(ratios), rtol=1e-9)

    unnormalized = vsam_jax.diagnose(
        jax.grad(bowl), jnp.ones(3), batches, RHOS,
        perturbation=perturbation.unified_ascent(0.0),
    )  # fmt: skip
    g = CURVATURE * (1 - batches)
    ratios = np.linalg.norm(CURVATURE * g, axis=1) / np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(
        unnormalized.ratio, np.median(ratios) * np.array(RHOS), rtol=1e-9
    )


def test_a_perturbation_with_a_memory_sees_the_gradients_before(x64):
    w, batches = np.array([3.0, -1.0, 2.0]), centers(3)
    delayed = perturbation.Along(perturbation.delayed(), uses_gradient=False)
    found = vsam_jax.diagnose(jax.grad(bowl), w, batches, (0.5,), perturbation=delayed)
    g = CURVATURE * (w - batches)
    norms = np.linalg.norm(g, axis=1)
    e = 0.5 * np.vstack([np.zeros(3), g[:-1] / norms[:-1, None]])
    ratios = np.linalg.norm(CURVATURE * e, axis=1) / norms
    np.testing.assert_allclose(found.ratio, np.median(ratios), rtol=1e-9)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrow_dtypes(dtype):
    w, batches = jnp.ones(3, dtype), centers(dtype=np.float32)
    loss = lambda w, b: bowl(w.astype(jnp.float32), b)
    found = vsam_jax.diagnose(jax.value_and_grad(loss), w, batches, (1e-4, 1.0))
    # At the small radius nothing is left of ε in 16 bits; that is said.
    if dtype == jnp.float32:
        np.testing.assert_array_equal(found.rounding, 0)
        assert 'float32' not in str(found)
    else:
        assert found.rounding[0] > 0.3
        assert found.rounding[1] < 0.02
    if dtype == jnp.bfloat16:
        assert found.rounding[0] > 0.9
        assert 'ρ = 0.0001: more than half of ε is lost to rounding' in str(found)
    wide = vsam_jax.diagnose(
        jax.grad(loss), w.astype(jnp.float32), batches, (1e-4, 1.0)
    )
    np.testing.assert_allclose(found.ratio[1], wide.ratio[1], rtol=0.02)
    np.testing.assert_allclose(found.psf_noise[1], wide.psf_noise[1], atol=0.02)


def test_sums_are_not_taken_in_narrow_dtypes():
    # In bfloat16 the sum of 300 ones is 256, which would be noise.
    grad_fn = lambda w, b: w
    found = vsam_jax.diagnose(
        grad_fn, jnp.ones(3, jnp.bfloat16), np.zeros((300, 1)), (1.0,), num_batches=300
    )
    assert found.grad_noise < 1e-6


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_parameters_on_several_devices(axis_type):
    loss = lambda w, x: jnp.mean((w - x) ** 4)
    w = jnp.arange(16.0)
    batches = np.random.default_rng(0).normal(size=(4, 8, 16)).astype(np.float32)
    one = vsam_jax.diagnose(jax.grad(loss), w, batches, RHOS)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        w = jax.device_put(w, NamedSharding(mesh, PartitionSpec('data')))
        all_of_them = vsam_jax.diagnose(jax.grad(loss), w, batches, RHOS)
    for name in ('ratio', 'cosine', 'psf_noise'):
        np.testing.assert_allclose(
            getattr(all_of_them, name), getattr(one, name), rtol=1e-4
        )


def test_the_reading_follows_the_numbers():
    grad = jax.grad(lambda w, b: bowl(w, 1e-3 * b))
    found = vsam_jax.diagnose(
        grad, jnp.array([1.0, 0.0, 0.0]), centers(dtype=np.float32), (0.01, 0.2)
    )
    text = str(found)
    assert 'ρ = 0.01: s is under 10 % of g. Hardly any effect.' in text
    assert 'ρ = 0.2: s is 10 % of g or more. Try these.' in text
    assert 'L(w+ε)' not in text  # No loss was given.
    assert 'No radius' not in text
    turned = vsam_jax.diagnose(
        grad, jnp.array([1.0, 0.03, 0.03]), centers(dtype=np.float32), (3.0,)
    )
    assert 'ρ = 3: g_SAM turns from g by more than 45 degrees.' in str(turned)
    assert 'No radius is worth a trial' in str(turned)
    noisy = vsam_jax.diagnose(
        grad, jnp.zeros(3), np.vstack([centers(5), -centers(5)]), (0.2,)
    )
    assert 'ρ = 0.2: mini-batches agree on little of s.' in str(noisy)


def test_a_second_gradient_that_is_not_finite_is_a_finding():
    def loss(w, b):
        return jnp.where(jnp.max(w) > 2, jnp.nan, 1.0) * bowl(w, b)

    batches = np.zeros((4, 3), np.float32)
    found = vsam_jax.diagnose(jax.value_and_grad(loss), jnp.ones(3), batches, (0.1, 9))
    assert np.isfinite(found.ratio[0])
    assert np.isnan([found.ratio[1], found.cosine[1], found.psf_noise[1]]).all()
    assert 'ρ = 9: a second gradient is not finite. Too large.' in str(found)
    assert '  –' in str(found)


def test_where_s_is_zero_there_is_no_noise_to_tell():
    found = vsam_jax.diagnose(
        lambda w, b: jnp.ones(3), jnp.ones(3), np.zeros((4, 1)), (0.1, 0.2)
    )
    np.testing.assert_array_equal(found.ratio, 0)
    np.testing.assert_array_equal(found.cosine, np.float32(1))
    assert np.isnan(found.psf_noise).all()


def test_some_gradients_of_zero_are_left_out():
    batches = np.array([[0.0] * 3, [1.0] * 3, [1.0] * 3], np.float32)
    found = vsam_jax.diagnose(jax.grad(bowl), jnp.zeros(3), batches, (0.1,))
    one = vsam_jax.diagnose(jax.grad(bowl), jnp.zeros(3), batches[1:], (0.1,))
    assert found.ratio == one.ratio > 0
    assert found.grad_noise > one.grad_noise


def test_iterators_are_read_as_far_as_needed():
    taken = []

    def stream():
        for i in itertools.count():
            taken.append(i)
            yield np.full(3, i, np.float32)

    found = vsam_jax.diagnose(
        jax.grad(bowl), jnp.ones(3), stream(), (0.1,), num_batches=4
    )
    assert found.num_batches == 4
    assert taken == [0, 1, 2, 3]


def test_the_gradient_is_compiled_once_for_each_pass():
    traced = []

    def grad_fn(w, b):
        traced.append(1)
        return w - b

    vsam_jax.diagnose(grad_fn, jnp.ones(3), np.zeros((5, 3), np.float32), RHOS)
    assert len(traced) == 2


GRAD = jax.grad(bowl)
W = np.ones(3, np.float32)
B = np.zeros((4, 3), np.float32)


@pytest.mark.parametrize(
    ('error', 'match', 'arguments'),
    [
        (TypeError, 'grad_fn must be a function', (None, W, B)),
        (TypeError, 'params must hold real floating-point', (GRAD, np.ones(3, int), B)),
        (ValueError, 'rhos must be a sequence', (GRAD, W, B, 0.1)),
        (ValueError, 'rhos must be a sequence', (GRAD, W, B, (0.0, 1.0))),
        (ValueError, 'rhos must be a sequence', (GRAD, W, B, (np.inf,))),
        (ValueError, 'rhos must be a sequence', (GRAD, W, B, ())),
        (TypeError, 'rhos must be a sequence', (GRAD, W, B, ('a',))),
        (ValueError, 'at least two mini-batches.*got 1', (GRAD, W, B[:1])),
        (ValueError, 'at least two mini-batches.*got 0', (GRAD, W, iter(()))),
        (ValueError, r'batches\[1\].*smaller last', (GRAD, W, [B, B[:2]])),
        (ValueError, r'batches\[1\].*alike', (GRAD, W, [B[0], (B[0],)])),
        (ValueError, 'all zero', (GRAD, 0 * W, B)),
        (ValueError, 'finite gradients.*mini-batch 0', (GRAD, np.nan * W, B)),
        (ValueError, 'tree structure of params', (lambda w, b: {'a': w}, W, B)),
        (ValueError, 'shapes of params', (lambda w, b: w[:2], W, B)),
        (TypeError, 'has_aux', (lambda w, b: ((w[0], w), w), W, B)),
        (TypeError, 'has_aux', (lambda w, b: (w, w), W, B)),
    ],
)
def test_bad_arguments_are_told(error, match, arguments):
    with pytest.raises(error, match=match):
        vsam_jax.diagnose(*arguments)


def test_a_method_is_no_perturbation():
    with pytest.raises(TypeError, match='perturbation must be a function of'):
        vsam_jax.diagnose(GRAD, W, B, perturbation=vsam_jax.asam())  # pyright: ignore


def test_one_mini_batch_that_is_not_finite_is_named():
    batches = np.array([[0, 0, 0], [0, np.inf, 0]], np.float32)
    with pytest.raises(ValueError, match='mini-batch 1 of batches'):
        vsam_jax.diagnose(GRAD, W, batches)
    with pytest.raises(ValueError, match='num_batches must be an integer >= 2'):
        vsam_jax.diagnose(GRAD, W, B, num_batches=1)


def test_parameters_in_a_pair_are_no_loss_and_gradient():
    loss = lambda pair, b: bowl(pair[0], b) + bowl(pair[1], b)
    found = vsam_jax.diagnose(jax.grad(loss), (W, W), B, (0.1,))
    assert np.isnan(found.sharpness).all()
    found = vsam_jax.diagnose(jax.value_and_grad(loss), (W, W), B, (0.1,))
    assert found.sharpness > 0


def test_the_picture_shows_the_numbers():
    with mpl.rc_context({'backend': 'Agg'}):
        import matplotlib.pyplot as plt

        found = vsam_jax.diagnose(GRAD, W, B + np.arange(4.0)[:, None], RHOS)
        figure = found.plot()
        left, right = figure.axes
        np.testing.assert_allclose(left.lines[0].get_ydata(), found.ratio)
        np.testing.assert_allclose(right.lines[0].get_ydata(), found.cosine)
        np.testing.assert_allclose(right.lines[1].get_ydata(), found.psf_noise)
        assert left.get_xlabel() == 'ρ'
        figure.canvas.draw()
        plt.close(figure)


def test_without_matplotlib_the_error_says_so(monkeypatch):
    found = vsam_jax.diagnose(GRAD, W, B, (0.1,))
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match='pip install matplotlib'):
        found.plot()
