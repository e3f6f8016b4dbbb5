"""Flax NNX: mutable modules, and the second pass leaves no trace in them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import vsam_jax
from tests import problems


class Model(nnx.Module):
    """BatchNorm, dropout and two layers that share a kernel."""

    def __init__(self, rngs, dtype=jnp.float32):
        linear = functools.partial(nnx.Linear, rngs=rngs, param_dtype=dtype)
        self.hidden = linear(3, 3)
        self.tied = linear(3, 3)
        self.tied.kernel = self.hidden.kernel
        self.norm = nnx.BatchNorm(3, rngs=rngs, momentum=0.5, param_dtype=dtype)
        # Flax starts them in float32 and then goes on in the wider dtype.
        self.norm.mean = nnx.BatchStat(jnp.zeros(3, dtype))
        self.norm.var = nnx.BatchStat(jnp.ones(3, dtype))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = linear(3, 1)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.tied(jnp.tanh(self.hidden(x)))))
        return self.out(self.dropout(x))


def loss_fn(model, batch):
    x, y = batch
    loss = jnp.mean((model(x) - y) ** 2)
    return loss, {'loss': loss}


def data(dtype=jnp.float32):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), dtype)
    return x, jnp.sum(x, axis=1, keepdims=True)


def create(method, dtype=jnp.float32):
    model = Model(nnx.Rngs(0), dtype)
    tx = optax.chain(method, optax.sgd(0.05, momentum=0.9))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def driver_of(name, train_step):
    if name == 'planned':
        return vsam_jax.PlannedStep(train_step, jit=nnx.jit)
    return nnx.jit(train_step)


def values(modules):
    """All arrays of modules; keys as numbers, which NumPy can read."""
    state = nnx.as_pure(nnx.state(modules))
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    read = lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x)
    return jax.tree.map(read, state)


@pytest.mark.usefixtures('x64')
def test_planned_and_traced_give_the_same_run():
    runs = []
    for driver in ('traced', 'planned'):
        model, optimizer = create(problems.METHODS['vsam'](0.1), jnp.float64)
        step = driver_of(driver, vsam_jax.nnx.make_train_step(loss_fn))
        losses = [step(model, optimizer, data(jnp.float64))['loss'] for _ in range(9)]
        runs.append((values((model, optimizer)), losses))
        assert int(optimizer.step[...]) == 9
        assert model.tied.kernel is model.hidden.kernel
    problems.assert_close(*runs)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('driver', ['traced', 'planned'])
def test_one_step_is_the_gradient_at_perturbed_weights_on_the_same_mask(driver):
    """Written out with NNX's own transforms on copies of the model."""
    model, optimizer = create(vsam_jax.sam(0.1), jnp.float64)
    grad = nnx.grad(loss_fn, has_aux=True)
    first, second, batch = nnx.clone(model), nnx.clone(model), data(jnp.float64)
    grads, _ = grad(first, batch)
    params = nnx.state(model, nnx.Param)
    scale = 0.1 / optax.tree.norm(grads)
    perturbed = jax.tree.map(lambda p, g: p + scale * g, params, grads)
    nnx.update(second, perturbed)
    direction, _ = grad(second, batch)
    expected = jax.tree.map(lambda p, d: p - 0.05 * d, params, direction)
    step = vsam_jax.nnx.make_train_step(loss_fn)
    if driver == 'traced':
        nnx.jit(step)(model, optimizer, batch)
    else:  # The copies share buffers with the model.
        vsam_jax.PlannedStep(step, donate_state=False, jit=nnx.jit)(
            model, optimizer, batch
        )
    problems.assert_close(values(nnx.state(model, nnx.Param)), values(expected))
    # Running statistics and counters are those that the first pass left alone.
    others = nnx.Not(nnx.Param)
    problems.assert_close(
        values(nnx.state(model, others)), values(nnx.state(first, others))
    )


@pytest.mark.parametrize('driver', ['traced', 'planned'])
def test_every_step_draws_a_dropout_mask_of_its_own(driver):
    model = Model(nnx.Rngs(0))
    tx = optax.chain(vsam_jax.sam(0.0), optax.sgd(0.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = driver_of(driver, vsam_jax.nnx.make_train_step(loss_fn))
    losses = {float(step(model, optimizer, data())['loss']) for _ in range(4)}
    assert len(losses) == 4


def test_the_host_reads_the_plan_once_a_window():
    model, optimizer = create(problems.METHODS['random_sam'](0.1))
    step = vsam_jax.PlannedStep(vsam_jax.nnx.make_train_step(loss_fn), jit=nnx.jit)
    taken = []
    for _ in range(10):
        step(model, optimizer, data())
        taken.append(bool(vsam_jax.metrics(optimizer)['sampled']))
    assert step.num_reads == 2
    rule = vsam_jax.sampling.AtRandom(rate=0.5, window=5, seed=0)
    plans = [rule.plan(jnp.array(0.0), jnp.array(i)) for i in range(2)]
    np.testing.assert_array_equal(taken, np.concatenate(plans))
    step(model, optimizer, data(), sample=True)
    assert bool(vsam_jax.metrics(optimizer)['sampled'])


def test_a_restored_state_is_noticed_in_the_middle_of_a_window():
    model, optimizer = create(problems.METHODS['vsam'](0.1))
    step = vsam_jax.PlannedStep(vsam_jax.nnx.make_train_step(loss_fn), jit=nnx.jit)
    for _ in range(4):
        step(model, optimizer, data())
    saved = jax.tree.map(jnp.copy, nnx.state((model, optimizer)))
    for _ in range(4):
        step(model, optimizer, data())
    expected = values((model, optimizer))
    nnx.update((model, optimizer), jax.tree.map(jnp.copy, saved))
    for _ in range(4):
        step(model, optimizer, data())
    problems.assert_close(values((model, optimizer)), expected, atol=0)


def test_a_step_written_by_hand_runs_planned():
    def train_step(model, optimizer, batch, *, sample=None):
        graphdef, others = nnx.split(model, nnx.Param, ...)[::2]
        before = jax.tree.map(lambda x: x, others)

        def grad_fn(params):
            copy = nnx.merge(graphdef, params, before)
            return nnx.as_pure(nnx.grad(loss_fn, has_aux=True)(copy, batch)[0])

        grads, aux = nnx.grad(loss_fn, has_aux=True)(model, batch)
        optimizer.update(model, grads, grad_fn=grad_fn, sample=sample)
        return aux

    runs = []
    for step in (train_step, vsam_jax.nnx.make_train_step(loss_fn)):
        model, optimizer = create(vsam_jax.sam(0.1))
        planned = vsam_jax.PlannedStep(step, jit=nnx.jit)
        for _ in range(3):
            planned(model, optimizer, data())
        runs.append(values(model))
    problems.assert_close(*runs, atol=1e-6)


@pytest.mark.usefixtures('x64')
def test_micro_batches_have_masks_of_their_own_and_one_update():
    model, optimizer = create(vsam_jax.sam(0.1), jnp.float64)
    step = nnx.jit(vsam_jax.nnx.make_train_step(loss_fn, num_micro_batches=2))
    aux = step(model, optimizer, data(jnp.float64))
    copy, _ = create(vsam_jax.sam(0.1), jnp.float64)
    halves = [
        jax.tree.map(lambda x, i=i: x[i : i + 4], data(jnp.float64)) for i in (0, 4)
    ]
    losses = [loss_fn(copy, half)[0] for half in halves]
    np.testing.assert_allclose(aux['loss'], losses, rtol=1e-12)
    others = nnx.Not(nnx.Param)
    problems.assert_close(
        values(nnx.state(model, others)), values(nnx.state(copy, others))
    )
    assert int(optimizer.step[...]) == 1


def test_metrics_are_read_from_the_optimizer_inside_a_step():
    train_step = vsam_jax.nnx.make_train_step(loss_fn)

    def logged(model, optimizer, batch, *, sample=None):
        train_step(model, optimizer, batch, sample=sample)
        return vsam_jax.metrics(optimizer)

    model, optimizer = create(vsam_jax.looksam(0.1, every=2))
    step = vsam_jax.PlannedStep(logged, jit=nnx.jit)
    for _ in range(4):
        log = step(model, optimizer, data())
    np.testing.assert_allclose(log['sampling_rate'], 0.5)
    assert float(log['psf_norm']) > 0


def test_no_second_gradient_is_taken_for_sgd():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.with_extra_args_support(optax.sgd(0.1)), wrt=nnx.Param
    )
    step = nnx.jit(vsam_jax.nnx.make_train_step(loss_fn))
    first = step(model, optimizer, data())['loss']
    for _ in range(30):
        last = step(model, optimizer, data())['loss']
    assert float(last) < float(first)


def test_accumulation_around_the_method_is_refused():
    model = Model(nnx.Rngs(0))
    step = vsam_jax.nnx.make_train_step(loss_fn)
    tx = optax.MultiSteps(vsam_jax.vsam(), 2)
    with pytest.raises(ValueError, match=r'tx must not be optax\.MultiSteps around'):
        step(model, nnx.Optimizer(model, tx, wrt=nnx.Param), data())


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match='train_step must be a function'):
        vsam_jax.PlannedStep(None, jit=nnx.jit)  # pyright: ignore
    with pytest.raises(ValueError, match='num_micro_batches must be an integer >= 1'):
        vsam_jax.nnx.make_train_step(loss_fn, num_micro_batches=0)
    with pytest.raises(ValueError, match='per_device must be False where axis_name is'):
        vsam_jax.nnx.make_train_step(loss_fn, per_device=True)
    with pytest.raises(TypeError, match='argnums must be the place of the one model'):
        vsam_jax.nnx.value_and_grad(loss_fn, argnums=(0, 1))
    with pytest.raises(TypeError, match='f must be a function of a model'):
        vsam_jax.nnx.value_and_grad(None)
    params = nnx.as_pure(nnx.state(Model(nnx.Rngs(0)), nnx.Param))
    with pytest.raises(TypeError, match=r'grad_fn must be called with the model'):
        vsam_jax.nnx.value_and_grad(loss_fn)(params)


def test_only_what_the_optimizer_is_for_is_trained_and_perturbed():
    model = nnx.LoRA(
        3, 2, 3, base_module=nnx.Linear(3, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)
    )
    before = jnp.copy(model.base_module.kernel[...]), jnp.copy(model.lora_b[...])
    tx = optax.chain(vsam_jax.sam(0.1), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    step = vsam_jax.nnx.make_train_step(
        lambda model, x: (jnp.mean((model(x) - 1) ** 2), None)
    )
    nnx.jit(step)(model, optimizer, jnp.ones((4, 3)))
    np.testing.assert_array_equal(model.base_module.kernel[...], before[0])
    assert not np.array_equal(model.lora_b[...], before[1])


def test_buffers_of_the_optimizer_are_donated_and_of_the_model_if_asked():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(vsam_jax.sam(), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    kernel = model.kernel.get_value()
    loss_fn = lambda model, x: (jnp.mean(model(x) ** 2), None)
    counter = vsam_jax._state.only_state(optimizer.opt_state).step.get_value()
    train_step = vsam_jax.nnx.make_train_step(loss_fn)
    vsam_jax.PlannedStep(train_step, jit=nnx.jit)(model, optimizer, jnp.ones((4, 3)))
    assert counter.is_deleted()
    assert not kernel.is_deleted()
    kernel = model.kernel.get_value()
    step = vsam_jax.PlannedStep(train_step, jit=nnx.jit, donate_argnums=0)
    step(model, optimizer, jnp.ones((4, 3)))
    assert kernel.is_deleted()


@pytest.mark.parametrize('driver', ['traced', 'planned'])
def test_modules_among_the_arguments_are_updated_too(driver):
    def train_step(model, optimizer, batch, rngs, loss, *, sample=None):
        noise = jax.random.normal(rngs.noise(), batch[0].shape)
        step = vsam_jax.nnx.make_train_step(loss_fn)
        metrics = step(model, optimizer, (batch[0] + noise, batch[1]), sample=sample)
        loss.update(values=metrics['loss'])
        model.mode = 'trained'
        return noise

    model, optimizer = create(vsam_jax.steady_vsam(0.1))
    rngs, loss = nnx.Rngs(noise=7), nnx.metrics.Average()
    step = driver_of(driver, train_step)
    noises = [step(model, optimizer, data(), rngs, loss) for _ in range(3)]
    assert len({float(noise[0, 0]) for noise in noises}) == 3
    assert int(rngs.noise.count[...]) == 3
    assert float(loss.compute()) > 0
    assert model.mode == 'trained'


@pytest.mark.parametrize('driver', ['eager', 'traced', 'planned'])
def test_variables_that_a_model_makes_are_kept(driver):
    class Counting(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

        def __call__(self, x):
            if not hasattr(self, 'calls'):
                self.calls = nnx.BatchStat(jnp.zeros(()))
            self.calls[...] += 1
            return self.linear(x)

    model = Counting()
    tx = optax.chain(vsam_jax.sam(0.1), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = vsam_jax.nnx.make_train_step(loss_fn)
    step = step if driver == 'eager' else driver_of(driver, step)
    for _ in range(3):
        step(model, optimizer, data())
    assert float(model.calls[...]) == 3
    assert isinstance(model.calls, nnx.BatchStat)


def test_what_is_no_array_may_stand_among_the_variables():
    class Named(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
            self.scale = nnx.Variable(2)

        def __call__(self, x):
            return self.scale.get_value() * self.linear(x)

    model = Named()
    tx = optax.chain(vsam_jax.sam(0.1), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    vsam_jax.nnx.make_train_step(loss_fn)(model, optimizer, data())
    assert int(optimizer.step[...]) == 1
