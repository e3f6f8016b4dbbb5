"""Edges that users meet: parts put together by hand, shared buffers, bare arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import vsam_jax
from tests import problems
from vsam_jax import checkpoint, perturbation, reuse, sampling


@pytest.mark.parametrize(
    ('make', 'error', 'message'),
    [
        (lambda: sampling.Periodic(0), ValueError, r'every must be .*\[1, .* got 0'),
        (lambda: sampling.Periodic(-2), ValueError, 'every must be .* got -2'),
        (lambda: sampling.AtRandom(3.0, 10, 0), ValueError, 'rate must be .* got 3.0'),
        (lambda: sampling.AtRandom(0.5, 2**33, 0), ValueError, 'window must be'),
        (lambda: reuse.DecayedDifference(5.0, 6), ValueError, 'decay must be'),
        (lambda: reuse.DecayedDifference(0.5, -3), ValueError, 'reuse_steps must be'),
        (lambda: reuse.RescaledOrthogonal(-1.0), ValueError, 'gain must be'),
        (lambda: perturbation.elementwise_ascent(-1.0), ValueError, 'eta must be'),
        (lambda: vsam_jax.vsam(warmup_steps=2**31), ValueError, 'warmup_steps must'),
        (lambda: vsam_jax.vsam(window=2**33), ValueError, 'window must be'),
        (lambda: vsam_jax.vsam(1e300), ValueError, r'rho must be .* got 1e\+300'),
        (lambda: vsam_jax.vsam(psf_dtype=jnp.float8_e4m3fn), TypeError, 'psf_dtype'),
        (
            lambda: vsam_jax.vsam().init(jnp.ones(2, jnp.float8_e4m3fn)),
            TypeError,
            'params must hold .* float8_e4m3fn',
        ),
    ],
)
def test_rules_and_methods_refuse_what_cannot_be_meant(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_parts_in_the_wrong_places_are_named():
    parts = [perturbation.l2_ascent, sampling.Periodic(2), reuse.NoReuse()]
    for name, wrong in (
        ('perturbation', [3, parts[1], parts[2]]),
        ('sampling', [parts[0], parts[2], parts[2]]),
        ('reuse', [parts[0], parts[1], parts[1]]),
    ):
        with pytest.raises(TypeError, match=f'{name} must be'):
            vsam_jax.sharpness_aware(*wrong, 0.1)


@pytest.mark.parametrize('rho', [np.array(0.1), np.float64(0.1), jnp.array(1)])
def test_rho_may_be_a_scalar_array_of_any_kind(rho):
    w = jnp.ones(2)
    tx = vsam_jax.vsam(rho)
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda p: p, sample=True)
    assert float(state.psf_norm) == pytest.approx(float(rho), rel=1e-5)


@pytest.mark.parametrize('sample', ['no', 1, jnp.array(True), [True]])
def test_a_planned_step_takes_python_bools_alone(sample):
    tx = vsam_jax.vsam()
    step = vsam_jax.PlannedStep(problems.make_step(tx))
    params = problems.mlp_params()
    state = (params, tx.init(params))
    with pytest.raises(TypeError, match='sample must be None or a Python bool'):
        step(state, problems.mlp_batches(1)[0], sample=sample)
    with pytest.raises(TypeError, match='sample must be None or a Python bool'):
        step.program(sample)


def test_optimizers_that_keep_the_first_parameters_can_be_donated():
    tx = optax.chain(vsam_jax.vsam(), optax.contrib.mechanize(optax.sgd(0.1)))
    batches = problems.mlp_batches(3)
    ends = []
    for donate in (True, False):
        step = vsam_jax.PlannedStep(problems.make_step(tx), donate_state=donate)
        params = problems.mlp_params()
        state = (params, tx.init(params))
        for batch in batches:
            state, _ = step(state, batch)
        ends.append(state)
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_a_new_train_state_holds_no_buffer_twice():
    params = problems.mlp_params()
    state = vsam_jax.linen.TrainState.create(
        apply_fn=lambda: None,
        params=params,
        tx=optax.chain(vsam_jax.vsam(), optax.contrib.mechanize(optax.sgd(0.1))),
    )
    leaves = jax.tree.leaves(state)
    assert len({id(leaf) for leaf in leaves}) == len(leaves)


def test_plan_and_rings_are_replicated_although_they_have_the_shape_of_the_parameter():
    mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P('data'))
    tx = vsam_jax.vsam()  # The window is 50 steps.
    w = jax.device_put(jnp.ones(50), split)
    shardings = vsam_jax.sharding.state_shardings(jax.eval_shape(tx.init, w), w)
    assert shardings.psf == split
    for leaf in jax.tree.leaves(shardings._replace(psf=None)):
        assert leaf == NamedSharding(mesh, P())


def test_a_counter_that_starts_as_a_python_number_is_restored(tmp_path):
    like = {'step': 0, 'w': jnp.zeros(2)}
    saved = {'step': jnp.array(3), 'w': jnp.ones(2)}
    config = {'x': float('nan')}
    with ocp.CheckpointManager(tmp_path) as manager:
        checkpoint.save(manager, 3, saved, config=config)
        manager.wait_until_finished()
        restored = checkpoint.restore(manager, like, config=config)
    assert int(restored['step']) == 3
    np.testing.assert_array_equal(restored['w'], 1)


def test_asam_may_scale_none_of_the_tensors_that_it_perturbs():
    params = {'a': jnp.ones(2), 'bias': jnp.full(2, 3.0)}
    mask = {'a': False, 'bias': True}
    asam = vsam_jax.asam(0.1, scale_mask=perturbation.all_but_biases, perturb_mask=mask)
    sam = vsam_jax.sam(0.1, perturb_mask=mask)
    grad_fn = lambda p: jax.tree.map(lambda x: x**2, p)
    (a, _), (b, _) = (
        tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        for tx in (asam, sam)
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_nnx_steps_run_optimizers_that_take_no_extra_arguments():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.scale(-0.1), wrt=nnx.Param)
    step = vsam_jax.nnx.make_train_step(
        lambda model, x: (jnp.mean(model(x) ** 2), None)
    )
    before = jnp.copy(model.kernel[...])
    nnx.jit(step)(model, optimizer, jnp.ones((4, 3)))
    assert float(jnp.abs(model.kernel[...] - before).max()) > 0
