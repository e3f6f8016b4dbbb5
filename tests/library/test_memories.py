"""Rules with a memory of their own, updated on every step, sampled or not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import vsam_jax
from tests import problems
from vsam_jax import perturbation, reuse, sampling
from vsam_jax._state import only_state

GRADS = [jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])]


def sparse(perturbation, every=3):
    """A second gradient on every third step, reused in between."""
    return vsam_jax.sharpness_aware(
        perturbation,
        sampling.Periodic(every),
        reuse.DecayedDifference(decay=0.5, reuse_steps=every),
        rho=0.1,
    )


# --- Perturbations ------------------------------------------------------------


def test_the_average_goes_on_where_no_second_gradient_is_taken():
    tx = sparse(perturbation.Along(perturbation.running_mean(0.5)))
    w, seen = jnp.zeros(2), []
    state = tx.init(w)
    for g in (*GRADS, GRADS[0]):
        _, state = tx.update(g, state, w, grad_fn=lambda p: seen.append(p) or p)
    first, second = (np.asarray(p) for p in seen)
    np.testing.assert_allclose(first, 0.1 * GRADS[0] / 5, rtol=1e-6)
    mean = 0.5 * (0.5 * (0.5 * (GRADS[0] + GRADS[1]) + GRADS[2]) + GRADS[0])
    np.testing.assert_allclose(second, 0.1 * mean / jnp.linalg.norm(mean), rtol=1e-6)
    np.testing.assert_allclose(state.perturbation_memory.mean, mean, rtol=1e-6)


def test_the_psf_is_what_the_perturbation_changes_of_the_gradient_itself():
    tx = vsam_jax.sharpness_aware(
        perturbation.Along(perturbation.without_mean(1.0, 0.9)),
        sampling.Periodic(2),
        reuse.DecayedDifference(decay=1.0, reuse_steps=1),
        rho=0.1,
    )
    w, grad_fn = jnp.array([1.0, -2.0]), lambda w: 4 * w**3
    state = tx.init(w)
    for _ in range(3):
        _, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    # The gradient is the same at every step: nothing is left of it but rounding.
    np.testing.assert_allclose(state.psf, 0, atol=1e-4)
    _, state = tx.update(
        grad_fn(w) + jnp.array([1.0, 0.0]), state, w, grad_fn=grad_fn, sample=True
    )
    e = jnp.array([0.1, 0.0])
    expected = grad_fn(w + e) - grad_fn(w) - jnp.array([1.0, 0.0])
    np.testing.assert_allclose(state.psf, expected, atol=1e-4)


@pytest.mark.parametrize('sample', [True, False])
def test_a_gradient_that_is_not_finite_leaves_the_average_as_it_was(sample):
    tx = vsam_jax.fsam(0.1)
    w = jnp.ones(2)
    _, state = tx.update(GRADS[0], tx.init(w), w, grad_fn=lambda p: p)
    bad = jnp.array([jnp.nan, 1.0])
    _, after = tx.update(bad, state, w, grad_fn=lambda p: p, sample=sample)
    problems.assert_equal(after.perturbation_memory, state.perturbation_memory)


def test_a_frozen_tensor_is_no_part_of_the_average():
    mask = {'a': True, 'b': False}
    tx = vsam_jax.fsam(0.1, sigma=0.5, perturb_mask=mask)
    w = {'a': jnp.ones(2), 'b': jnp.ones(2)}
    grads, seen = {'a': GRADS[0], 'b': 100 * GRADS[1]}, []
    state = tx.init(w)
    for _ in range(2):
        _, state = tx.update(grads, state, w, grad_fn=lambda p: seen.append(p) or p)
    problems.assert_equal(state.perturbation_memory.mean['b'], jnp.zeros(2))
    # Half of g is left, its length is ρ all the same.
    np.testing.assert_allclose(seen[1]['a'], 1 + 0.1 * GRADS[0] / 5, rtol=1e-6)
    problems.assert_equal(seen[1]['b'], w['b'])


def test_averages_of_small_dtypes_are_kept_in_float32():
    tx = vsam_jax.vasso(0.1, theta=0.01)
    w = jnp.ones(2, jnp.bfloat16)
    state = tx.init(w)
    for _ in range(2):
        _, state = tx.update(w, state, w, grad_fn=lambda p: p)
    assert state.perturbation_memory.mean.dtype == jnp.float32


def test_memories_lie_like_the_parameters():
    mesh = jax.make_mesh((8,), ('data',))
    split = NamedSharding(mesh, P('data'))
    params = {'w': jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=split)}
    shapes = jax.eval_shape(vsam_jax.vasso(0.1).init, params)
    shardings = vsam_jax.sharding.state_shardings(shapes, params)
    assert shardings.perturbation_memory.mean['w'] == split
    assert shardings.perturbation_memory.started.is_fully_replicated


def test_a_rule_without_a_memory_keeps_none():
    state = vsam_jax.vsam().init(jnp.ones(2))
    assert state.perturbation_memory is None
    assert state.sampling_memory is None


# --- Decisions from the gradient ----------------------------------------------


def ae_run(tx, norms, **arguments):
    """Which steps are sampled where the gradients have these norms."""
    w, taken = jnp.ones(2), []
    state = tx.init(w)

    @jax.jit
    def step(state, g):
        return tx.update(g, state, w, grad_fn=lambda p: p, **arguments)[1]

    for norm in norms:
        state = step(state, jnp.array([norm, 0.0]))
        taken.append(bool(state.sampled))
    return taken, state


def test_large_gradients_are_sampled():
    taken, state = ae_run(vsam_jax.aesam(steps=100), [1, 1, 1, 1, 5, 1, 1])
    assert taken == [True, True, True, True, True, False, False]
    mean = 0.0
    for norm in [1, 1, 1, 1, 5, 1, 1]:
        mean = 0.9 * mean + 0.1 * norm**2
    np.testing.assert_allclose(state.sampling_memory.mean, mean, rtol=1e-5)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_not_sampled(bad):
    before = ae_run(vsam_jax.aesam(steps=100), [1, 1])[1]
    taken, state = ae_run(vsam_jax.aesam(steps=100), [1, 1, bad])
    assert taken == [True, True, False]
    problems.assert_equal(state.sampling_memory, before.sampling_memory)
    assert int(state.num_rejected) == 0


@pytest.mark.parametrize('sample', [True, False])
def test_who_says_whether_to_sample_is_followed_and_the_averages_go_on(sample):
    free = ae_run(vsam_jax.aesam(steps=100), [1, 3, 2])[1]
    taken, state = ae_run(vsam_jax.aesam(steps=100), [1, 3, 2], sample=sample)
    assert taken == [sample] * 3
    problems.assert_equal(state.sampling_memory, free.sampling_memory)


def test_a_planned_driver_says_what_to_do():
    tx = optax.chain(vsam_jax.aesam(steps=9), optax.sgd(0.1))
    params = problems.toy_params()
    step = vsam_jax.PlannedStep(problems.make_step(tx, problems.toy_loss))
    with pytest.raises(ValueError, match=r'decides from the gradient.*jax\.jit'):
        step((params, tx.init(params)), jnp.array(0.5))


def test_without_jit_the_decision_is_made_on_the_host():
    tx, w, calls = vsam_jax.aesam(steps=100), jnp.ones(2), []
    state = tx.init(w)
    for norm in (1.0, 9.0, 0.1, 9.0):
        g = jnp.array([norm, 0.0])
        _, state = tx.update(g, state, w, grad_fn=lambda p: calls.append(1) or p)
    assert len(calls) == int(state.num_samples) == 3


@pytest.mark.parametrize(
    ('settings', 'match'),
    [
        ({'steps': 0}, 'steps must be'),
        ({'steps': 5, 'delta': 1.5}, 'delta must be'),
        ({'steps': 5, 'lambda1': np.inf}, 'lambda1 must be a finite number'),
    ],
)
def test_settings_that_cannot_be_meant_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        vsam_jax.aesam(**settings)


# --- Normalization layers -----------------------------------------------------


class OfLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=False, use_scale=False)(x)
        return nn.LayerNorm(name='after')(nn.Dense(2)(x))


class OfNNX(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.after = nnx.LayerNorm(4, rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, use_scale=False, rngs=rngs)


def test_normalization_layers_of_linen_and_nnx_are_found():
    params = OfLinen().init(jax.random.key(0), jnp.ones((2, 3)))['params']
    mask = perturbation.normalization_layers(params)
    found = {layer for layer, flags in mask.items() if any(flags.values())}
    assert found == {'BatchNorm_0', 'after'}
    assert all(mask['after'].values())
    state = nnx.state(OfNNX(nnx.Rngs(0)), nnx.Param)
    mask = perturbation.normalization_layers(state)
    flags = {
        jax.tree_util.keystr(path, simple=True, separator='.'): flag
        for path, flag in jax.tree_util.tree_leaves_with_path(mask)
    }
    assert {name.split('.')[0] for name, flag in flags.items() if flag} == {
        'after',
        'bn1',
    }


def test_where_there_is_no_normalization_layer_that_is_said():
    tx = vsam_jax.sam(perturb_mask=perturbation.normalization_layers)
    with pytest.raises(ValueError, match='perturb_mask'):
        tx.init({'dense': {'kernel': jnp.ones(2)}})


# --- What is made of both gradients -------------------------------------------


def test_gamma_one_half_is_sam_and_alpha_zero_is_sam():
    w, grad_fn = jnp.array([1.0, -2.0]), lambda w: 4 * w**3
    directions = [
        tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]
        for tx in (vsam_jax.sam(0.1), vsam_jax.wsam(0.1, 0.5), vsam_jax.gsam(0.1, 0.0))
    ]
    for direction in directions[1:]:
        np.testing.assert_allclose(direction, directions[0], rtol=1e-6)


def test_gamma_one_would_leave_nothing_of_the_gradient():
    with pytest.raises(ValueError, match=r'gamma must be a number in \[0, 1\), got 1'):
        vsam_jax.wsam(gamma=1.0)


def test_stable_sam_has_the_length_of_the_gradient():
    tx = vsam_jax.sharpness_aware(
        perturbation.l2_ascent, sampling.Periodic(1), reuse.Renormalized(), 0.1
    )
    w, grad_fn = jnp.array([1.0, -2.0]), lambda w: 4 * w**3
    direction, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    np.testing.assert_allclose(
        jnp.linalg.norm(direction), jnp.linalg.norm(grad_fn(w)), rtol=1e-6
    )
    assert not np.allclose(direction, grad_fn(w))


# --- Radius and learning rate -------------------------------------------------


def test_the_radius_follows_the_learning_rate_within_its_bounds():
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)
    rho = vsam_jax.rho_schedule(rate, max_rho=0.4, min_rho=0.1, max_rate=0.1)
    for step in (0, 5, 10, 55, 100):
        expected = 0.1 + 0.3 * float(rate(step)) / 0.1
        np.testing.assert_allclose(rho(step), expected, rtol=1e-5)
    tx = optax.chain(vsam_jax.gsam(rho), optax.sgd(rate))
    w = jnp.ones(2)
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda p: p**3)
    assert only_state(state).num_samples == 1


@pytest.mark.parametrize(
    ('settings', 'error', 'match'),
    [
        ({'learning_rate': 0.1}, TypeError, 'learning_rate must be a schedule'),
        ({'max_rho': 0.05}, ValueError, r'max_rho \(from min_rho on\) must be'),
        ({'max_rate': 0.0}, ValueError, r'max_rate \(above min_rate\) must be'),
    ],
)
def test_bounds_out_of_order_are_named(settings, error, match):
    given = {
        'learning_rate': optax.constant_schedule(0.1),
        'max_rho': 0.4,
        'min_rho': 0.1,
        'max_rate': 0.1,
    }
    with pytest.raises(error, match=match):
        vsam_jax.rho_schedule(**(given | settings))


# --- Rules of one's own -------------------------------------------------------


class Plan(sampling.SamplingRule):
    window = 10

    def __init__(self, plan=None, **settings):
        self.made = plan
        vars(self).update(settings)

    def plan(self, budget, window_index) -> Any:
        return self.made


class Decides(sampling.SamplingRule):
    window = 1
    warmup_steps = 2

    def decide(self, memory, grad_norm):
        return grad_norm > 100, memory


class DecidesWithMemory(Decides):
    def init_memory(self, dtype):
        return ()


@pytest.mark.parametrize(
    ('rule', 'match'),
    [
        (
            Plan(jnp.ones(5, bool)),
            r'plan of sampling \(Plan\) .* \[10\].* shape \(5,\)',
        ),
        (Plan(jnp.array(True)), r'plan of sampling \(Plan\) must give a bool array'),
        (Plan(jnp.ones(10)), r'got float32 of shape \(10,\)'),
        (Plan(window=0), r'window of sampling \(Plan\) must be'),
        (Decides(), r'must have a method init_memory where it has decide'),
    ],
)
def test_a_rule_that_cannot_be_meant_is_named_before_the_first_step(rule, match):
    tx = vsam_jax.sharpness_aware(
        perturbation.l2_ascent, rule, reuse.NoReuse(), rho=0.1
    )
    with pytest.raises(ValueError, match=match):
        tx.init(jnp.ones(2))


def test_a_plan_that_is_none_is_named_after_a_warm_up_too():
    rule = Plan(jnp.ones(5, bool), warmup_steps=3)
    tx = vsam_jax.sharpness_aware(
        perturbation.l2_ascent, rule, reuse.NoReuse(), rho=0.1
    )
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=r'plan of sampling .* shape \(5,\)'):
        tx.update(w, tx.init(w), w, grad_fn=lambda p: p)


def test_warm_up_steps_are_sampled_whatever_a_rule_decides():
    tx = vsam_jax.sharpness_aware(
        perturbation.l2_ascent, DecidesWithMemory(), reuse.NoReuse(), rho=0.1
    )
    assert ae_run(tx, [1, 1, 1, 101])[0] == [True, True, False, True]


def test_a_weight_may_be_a_python_number():
    class Half(reuse.Difference):
        def weight(self, age, norms):
            return 0.5

    tx = vsam_jax.sharpness_aware(
        perturbation.l2_ascent, sampling.Periodic(2), Half(), rho=0.1
    )
    w = jnp.ones(())
    state = tx.init(w)
    for expected in (1.1, 1.05):
        direction, state = tx.update(w, state, w, grad_fn=lambda p: p)
        np.testing.assert_allclose(direction, expected, rtol=1e-6)


def test_a_direction_of_another_dtype_is_named():
    class Wide(reuse.Combination):
        def combine(self, grads, sam_grads):
            return sam_grads.astype(jnp.float32)

    tx = vsam_jax.sharpness_aware(
        perturbation.l2_ascent, sampling.Periodic(1), Wide(), rho=0.1
    )
    w = jnp.ones(2, jnp.bfloat16)
    with pytest.raises(TypeError, match=r'result of Wide\.combine'):
        tx.update(w, tx.init(w), w, grad_fn=lambda p: p)


@pytest.mark.parametrize(
    'wrong', [perturbation.Along, perturbation.running_mean(0.5), 'l2']
)
def test_what_is_no_perturbation_is_named(wrong):
    with pytest.raises(TypeError, match='perturbation must be a function'):
        vsam_jax.sharpness_aware(wrong, sampling.Periodic(1), reuse.NoReuse(), 0.1)


def test_what_is_no_transformation_is_named():
    with pytest.raises(TypeError, match='transformation must be'):
        perturbation.Along(perturbation.running_mean)


def test_a_transformation_may_want_the_parameters():
    tx = sparse(perturbation.Along(optax.add_decayed_weights(1.0)))
    w, seen = jnp.array([3.0, 4.0]), []
    tx.update(jnp.zeros(2), tx.init(w), w, grad_fn=lambda p: seen.append(p) or p)
    np.testing.assert_allclose(seen[0], w * (1 + 0.1 / 5), rtol=1e-6)


@pytest.mark.parametrize('first', ['sam', 'fsam', 'aesam'])
@pytest.mark.parametrize('second', ['sam', 'fsam', 'aesam'])
def test_the_state_of_another_method_is_named(first, second):
    w = jnp.ones(2)
    state = problems.METHODS[first](0.1).init(w)
    update = lambda: problems.METHODS[second](0.1).update(
        w, state, w, grad_fn=lambda p: p
    )
    if first == second:
        update()
        return
    with pytest.raises(ValueError, match='state must be that of this method'):
        update()


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', ['fsam', 'vasso', 'asyncsam', 'aesam'])
def test_gradients_wider_than_the_parameters_change_no_types(name):
    tx, w = problems.METHODS[name](0.1), jnp.ones(3, jnp.float32)

    def body(state, g):
        _, state = tx.update(g, state, w, grad_fn=lambda p: g)
        return state, None

    jax.lax.scan(body, tx.init(w), jnp.ones((3, 3), jnp.float64))


def test_a_perturbation_of_the_step_before_is_none_of_each_device():
    tx, w = vsam_jax.asyncsam(0.1), jnp.ones(2)
    with pytest.raises(ValueError, match=r'per_device must be False.*asyncsam'):
        jax.vmap(
            lambda g: tx.update(
                g,
                tx.init(w),
                w,
                grad_fn=lambda p: p,
                axis_name='data',
                per_device=True,
            ),
            axis_name='data',
        )(jnp.ones((2, 2)))


def test_names_that_only_sound_like_a_normalization_are_none():
    tree = {'normal_head': {'w': 1.0}, 'denormalize': {'w': 1.0}, 'kernel': 1.0}
    mask = perturbation.normalization_layers({**tree, 'scale': 1.0})
    assert not any(jax.tree.leaves(mask))
    tree = {name: {'w': 1.0} for name in ('norm1', 'LayerNorm_0', 'bn_2', 'post_ln')}
    assert all(jax.tree.leaves(perturbation.normalization_layers(tree)))
