"""The methods of the family: each is what its paper says, and one code runs all."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vsam_jax
from tests import problems
from tests.library.quartic import Quartic
from vsam_jax import perturbation, reuse, sampling

# --- Independent references ---------------------------------------------------


def looksam_reference(problem, *, rho, every, gain, learning_rate=0.05):
    """LookSAM from its definition, on vectors, in NumPy."""
    w, orthogonal, path = problem.start.copy(), None, []
    for step in range(len(problem.linear)):
        g = problem.grad(w, step)
        if step % every == 0:
            direction = problem.grad(w + rho * g / np.linalg.norm(g), step)
            cosine = direction @ g / np.linalg.norm(direction) / np.linalg.norm(g)
            along = np.linalg.norm(direction) * cosine * g / np.linalg.norm(g)
            orthogonal = direction - along
        else:
            ratio = np.linalg.norm(g) / np.linalg.norm(orthogonal)
            direction = g + gain * ratio * orthogonal
        w = w - learning_rate * direction
        path.append(w)
    return np.array(path)


def asam_reference(problem, *, rho, scale, learning_rate=0.05):
    """ASAM from its definition, with T = diag(scale(w))."""
    w, path = problem.start.copy(), []
    for step in range(len(problem.linear)):
        g, t = problem.grad(w, step), scale(w)
        epsilon = rho * t**2 * g / np.linalg.norm(t * g)
        w = w - learning_rate * problem.grad(w + epsilon, step)
        path.append(w)
    return np.array(path)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('every', [2, 5])
def test_looksam_is_its_definition(every):
    problem = Quartic()
    path, state = problem.run(vsam_jax.looksam(0.3, every=every, gain=0.7))
    expected = looksam_reference(problem, rho=0.3, every=every, gain=0.7)
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-12)
    assert int(state.num_samples) == -(-len(path) // every)


@pytest.mark.usefixtures('x64')
def test_looksam_on_every_step_is_sam_and_stores_nothing():
    path, state = Quartic().run(vsam_jax.looksam(0.3, every=1))
    expected, _ = Quartic().run(vsam_jax.sam(0.3))
    np.testing.assert_array_equal(path, expected)
    assert state.psf is None


@pytest.mark.usefixtures('x64')
def test_the_orthogonal_part_put_back_on_a_sampled_step_is_sam():
    rule = vsam_jax.sharpness_aware(
        perturbation.l2_ascent,
        sampling.Periodic(1),
        reuse.RescaledOrthogonal(gain=0.7),
        0.3,
    )
    expected, _ = Quartic().run(vsam_jax.sam(0.3))
    np.testing.assert_allclose(Quartic().run(rule)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
    ('kwargs', 'scale'),
    [
        ({}, np.abs),
        ({'eta': 0.01}, lambda w: np.abs(w) + 0.01),
        (
            {'eta': 0.01, 'scale_mask': perturbation.all_but_biases},
            lambda w: np.where(np.arange(7) < 4, np.abs(w) + 0.01, 1.0),
        ),
        (
            {'scale_mask': {'kernel': True, 'bias': False}},
            lambda w: np.where(np.arange(7) < 4, np.abs(w), 1.0),
        ),
    ],
    ids=['default', 'eta', 'as the authors', 'mask'],
)
def test_asam_is_its_definition(kwargs, scale):
    problem = Quartic()
    path, _ = problem.run(vsam_jax.asam(0.5, **kwargs))
    expected = asam_reference(problem, rho=0.5, scale=scale)
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('moves', [False, True])
def test_tensors_of_zeros_are_perturbed_by_the_authors_asam_alone(moves):
    kwargs = {'eta': 0.01, 'scale_mask': perturbation.all_but_biases} if moves else {}
    params = {'kernel': jnp.zeros(2), 'bias': jnp.zeros(2), 'scale': jnp.ones(2)}
    grads = jax.tree.map(jnp.ones_like, params)
    rule = perturbation.elementwise_ascent(**kwargs)
    epsilon = rule(grads, params, jnp.array(0.1))
    assert bool((epsilon['kernel'] != 0).all()) == moves
    assert bool((epsilon['bias'] != 0).all()) == moves
    assert bool((epsilon['scale'] != 0).all())


def test_asam_masks_work_beside_each_other():
    frozen = {'kernel': True, 'bias': False, 'scale': True}
    tx = vsam_jax.asam(0.1, scale_mask=perturbation.all_but_biases, perturb_mask=frozen)
    params = {'kernel': jnp.ones(2), 'bias': jnp.ones(2), 'scale': jnp.ones(2)}
    seen = []

    def grad_fn(p):
        seen.append(p)
        return jax.tree.map(jnp.ones_like, p)

    tx.update(params, tx.init(params), params, grad_fn=grad_fn)
    np.testing.assert_array_equal(seen[0]['bias'], 1.0)
    assert bool((seen[0]['kernel'] > 1).all())


def test_a_wrong_scale_mask_is_named():
    with pytest.raises(TypeError, match=r'scale_mask must be .* holds 1\.0'):
        vsam_jax.asam(scale_mask={'kernel': 1.0})
    tx = vsam_jax.asam(scale_mask={'bias': True})
    w = {'kernel': jnp.ones(2)}
    with pytest.raises(ValueError, match='scale_mask must have the structure'):
        tx.update(w, tx.init(w), w, grad_fn=lambda p: p)


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.9, 1.0])
def test_random_sam_samples_at_its_rate(rate):
    rule = sampling.AtRandom(rate=rate, window=2000, seed=0)
    plans = np.stack([rule.plan(jnp.array(0.0), jnp.array(i)) for i in range(2)])
    # Four standard deviations of a binomial share of 4,000 draws.
    tolerance = 4 * np.sqrt(rate * (1 - rate) / plans.size)
    assert abs(plans.mean() - rate) <= tolerance
    assert rate == 1 or (plans[0] != plans[1]).any()


def test_random_sam_draws_a_new_plan_for_every_window():
    tx = problems.random_sam(0.1, rate=0.4, window=5)
    step = jax.jit(problems.make_step(tx, problems.toy_loss))
    params = problems.toy_params()
    state = (params, tx.init(params))
    taken = []
    for batch in problems.toy_batches(1) * 15:
        state, _ = step(state, batch)
        taken.append(bool(state[1].sampled))
    rule = sampling.AtRandom(rate=0.4, window=5, seed=0)
    plans = [rule.plan(jnp.array(0.0), jnp.array(i)) for i in range(3)]
    np.testing.assert_array_equal(taken, np.concatenate(plans))


# --- What all of them share ---------------------------------------------------


@pytest.mark.parametrize('name', problems.METHODS)
def test_methods_that_reuse_nothing_store_no_psf(name):
    params = problems.mlp_params()
    state = problems.METHODS[name](0.1).init(params)
    reuses_nothing = name in (*problems.ALWAYS, 'random_sam_without_reuse', 'aesam')
    assert (state.psf is None) == reuses_nothing
    rest = jax.tree.leaves(state._replace(perturbation_memory=None))
    size = sum(leaf.size for leaf in rest)
    assert (size < sum(p.size for p in params)) == reuses_nothing


@pytest.mark.parametrize('name', problems.METHODS)
def test_a_gradient_of_zeros_gives_a_direction_of_zeros(name):
    tx = problems.METHODS[name](0.1)
    params = problems.toy_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    for sample in (True, False):
        direction, state = tx.update(
            zeros, state, params, grad_fn=lambda p: zeros, sample=sample
        )
        problems.assert_equal(direction, zeros)
    assert int(state.num_rejected) == 0


@pytest.mark.parametrize('size', [1, 1000])
def test_looksam_adds_nothing_where_no_orthogonal_part_exists(size):
    """On a bowl g_SAM is parallel to g: what is left is rounding error."""
    tx = vsam_jax.looksam(0.1, every=2)
    params = jax.random.normal(jax.random.key(0), (size,))
    grad_fn = lambda w: 3 * w
    grads = grad_fn(params)
    _, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn, sample=True)
    direction, _ = tx.update(grads, state, params, sample=False)
    np.testing.assert_array_equal(direction, grads)
    assert int(state.num_rejected) == 0


def test_the_second_gradient_of_random_sam_without_reuse_lasts_one_step():
    tx = problems.random_sam(0.1, reuse_psf=False)
    params, grad_fn = jnp.ones(2), lambda w: w**3
    _, state = tx.update(
        params**3, tx.init(params), params, grad_fn=grad_fn, sample=True
    )
    direction, _ = tx.update(params**3, state, params, sample=False)
    np.testing.assert_array_equal(direction, params**3)


@pytest.mark.parametrize('name', ['vsam', 'looksam', 'steady_vsam', 'random_sam'])
def test_every_memory_may_be_narrow(name):
    tx = problems.METHODS[name](0.1, psf_dtype=jnp.bfloat16)
    state = tx.init(problems.toy_params())
    assert {s.dtype for s in jax.tree.leaves(state.psf)} == {jnp.dtype('bfloat16')}


def test_another_seed_gives_random_sam_another_plan():
    plans = [problems.random_sam(seed=s).init(jnp.ones(2)).plan for s in range(3)]
    assert len({tuple(np.asarray(plan)) for plan in plans}) == 3


def test_the_budget_of_random_sam_is_the_expected_number_of_samples():
    state = problems.random_sam(rate=0.4, window=5).init(jnp.ones(2))
    assert float(state.budget) == pytest.approx(2)


def test_a_window_of_random_sam_may_be_one_step():
    state = problems.random_sam(window=1).init(jnp.ones(2))
    assert state.plan.shape == (1,)


@pytest.mark.parametrize('every', [64, 65, 100])
def test_samples_may_be_far_apart(every):
    plan = vsam_jax.looksam(every=every).init(jnp.ones(2)).plan
    np.testing.assert_array_equal(np.flatnonzero(plan), [0])
    assert len(plan) == every


@pytest.mark.parametrize(
    'tx',
    [vsam_jax.sam(), vsam_jax.looksam(every=1), problems.random_sam(rate=1.0)],
    ids=['sam', 'looksam', 'random_sam'],
)
def test_what_is_sampled_on_every_step_needs_no_conditional(tx):
    w = jnp.ones(2)
    update = lambda state: tx.update(w, state, w, grad_fn=jnp.sin)
    assert 'cond[' not in str(jax.make_jaxpr(update)(tx.init(w)))


def test_the_norm_of_looksam_is_taken_in_float32():
    """In float16 the squares of 1000 tens have no sum."""
    tx = vsam_jax.looksam(every=2)
    w, grads = jnp.ones(1000, jnp.float16), jnp.full(1000, 10, jnp.float16)
    direction, _ = tx.update(grads, tx.init(w), w, sample=False)
    np.testing.assert_array_equal(direction, grads)


@pytest.mark.parametrize('name', ['vsam', 'steady_vsam', 'random_sam'])
def test_at_the_first_age_nothing_is_reused(name):
    tx, w = problems.METHODS[name](0.1), jnp.ones(2)
    state = tx.init(w)._replace(psf=jnp.ones(2))
    direction, _ = tx.update(w, state, w, sample=False)
    np.testing.assert_array_equal(direction, w)


def test_asam_scales_narrow_tensors_in_float32():
    """T of one weight: ε = ρ T."""
    for dtype, w, eta in ((jnp.bfloat16, 1.0, 0.01), (jnp.float16, 300.0, 0.0)):
        w = jnp.array([w], dtype)
        epsilon = perturbation.elementwise_ascent(eta)(w, w, 1.0)
        np.testing.assert_allclose(epsilon, [float(w[0]) + eta], rtol=1e-6)


def test_a_gradient_as_long_as_the_floor_moves_half_as_far():
    g = jnp.array([1e-12])
    np.testing.assert_allclose(perturbation.l2_ascent(g, g, 1.0), [0.5], rtol=1e-6)


def test_biases_in_boxes_are_biases():
    boxed = {'bias': nn.Partitioned(jnp.ones(2), ('a',)), 'kernel': jnp.ones(2)}
    assert jax.tree.leaves(perturbation.all_but_biases(boxed)) == [False, True]
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)
    found = nnx.to_pure_dict(perturbation.all_but_biases(state))
    assert found == {'bias': False, 'kernel': True}


def test_a_scale_mask_is_made_of_all_tensors_also_where_few_are_perturbed():
    matrices = lambda params: {name: w.ndim > 1 for name, w in params.items()}
    params = problems.toy_params()
    mask = {'kernel': True, 'bias': False}
    tx = vsam_jax.asam(0.1, scale_mask=matrices, perturb_mask=mask)
    seen = []
    tx.update(params, tx.init(params), params, grad_fn=lambda p: seen.append(p) or p)
    np.testing.assert_array_equal(seen[0]['bias'], params['bias'])
    w = np.asarray(params['kernel'])
    expected = w + 0.1 * w**2 * w / np.linalg.norm(w * np.abs(w))
    np.testing.assert_allclose(seen[0]['kernel'], expected, rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rounding_is_no_direction_of_looksam(dtype):
    """On a quadratic bowl g_SAM is parallel to g."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=256), dtype)
    tx = vsam_jax.looksam(0.5, every=2)
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda w: w)
    np.testing.assert_array_equal(state.psf, jnp.zeros(256))
    direction, _ = tx.update(w, state, w, sample=False)
    np.testing.assert_array_equal(direction, w)


@pytest.mark.parametrize('name', list(problems.METHODS))
def test_no_parameters_are_a_tree_too(name):
    tx = problems.METHODS[name](0.1)
    direction, state = tx.update({}, tx.init({}), {}, grad_fn=lambda p: p)
    assert direction == {}
    assert int(state.step) == 1
