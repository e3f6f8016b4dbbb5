"""Mistakes that people make: each ends with an error that names it, or with NaN.

None of them raised anything by itself. What they trained was wrong, or no method.
"""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale

import vsam_jax
from vsam_jax import perturbation, reuse, sampling

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
BATCH = X, jnp.sum(X, axis=1, keepdims=True)
SAM = vsam_jax.sam(0.1)


def linear_loss(params, batch):
    x, y = batch
    return jnp.mean((x @ params['w'] - y) ** 2)


def start() -> dict[str, jax.Array]:
    return {'w': jnp.full((3, 1), 0.1)}


GRAD = jax.grad(linear_loss)


def grad_fn(params):
    return GRAD(params, BATCH)


def update(tx, state=None, **arguments: Any) -> Any:
    """One update, traced: nothing is compiled."""
    params = start()
    state = tx.init(params) if state is None else state
    arguments = {'grad_fn': grad_fn, **arguments}
    traced = lambda params: tx.update(grad_fn(params), state, params, **arguments)
    return jax.eval_shape(traced, params)


# --- A method in the wrong place ----------------------------------------------

SGD = optax.sgd(0.1)
OUT_OF_PLACE = {
    'clipping before': lambda: optax.chain(optax.clip_by_global_norm(1.0), SAM, SGD),
    'weight decay before': lambda: optax.chain(
        optax.chain(optax.add_decayed_weights(0.1)), optax.chain(SAM, SGD)
    ),
    'a method after the optimizer': lambda: optax.chain(SGD, SAM),
    'two methods': lambda: optax.chain(SAM, vsam_jax.asam(), SGD),
    'names': lambda: optax.named_chain(('clip', optax.clip(1.0)), ('sam', SAM)),
    'injected': lambda: optax.chain(
        optax.zero_nans(),
        optax.inject_hyperparams(lambda rho: vsam_jax.sam(rho))(rho=0.1),
        SGD,
    ),
    'inside a wrapper': lambda: optax.chain(
        optax.clip(1.0), optax.apply_if_finite(optax.chain(SAM, SGD), 5)
    ),
}


@pytest.mark.parametrize('name', OUT_OF_PLACE)
def test_what_stands_before_a_method_is_named(name):
    with pytest.raises(ValueError, match=r'must be the first transformation.*got 1'):
        update(OUT_OF_PLACE[name]())


def test_wrappers_and_chains_in_which_a_method_is_first_are_let_through():
    inner = optax.chain(optax.chain(SAM, optax.clip(1.0)), SGD)
    update(optax.apply_if_finite(inner, 5))
    update(optax.contrib.schedule_free(inner, 0.1))


def test_accumulation_around_a_method_has_to_say_which_mini_step_counts():
    tx = optax.MultiSteps(optax.chain(SAM, SGD), 2)
    with pytest.raises(ValueError, match=r'sample must be given.*sample=False on all'):
        update(tx)
    for sample in (False, None, True):  # Once it was said.
        update(tx, sample=sample)


def test_momentum_sam_must_be_last():
    tx = optax.chain(vsam_jax.msam(0.1), SGD)
    with pytest.raises(ValueError, match=r'msam must be the last.*got 1 after it'):
        update(tx)


# --- A second gradient that is none -------------------------------------------


@pytest.mark.parametrize('method', [SAM, vsam_jax.steady_vsam(0.1)])
def test_a_grad_fn_that_returns_the_first_gradient_is_noticed(method):
    params, state = start(), method.init(start())

    def step(params, state):
        grads = grad_fn(params)
        return method.update(grads, state, params, grad_fn=lambda _: grads)

    for function in (jax.jit(step), vsam_jax.PlannedStep(step)):
        with pytest.raises(ValueError, match='does not depend on them'):
            function(params, state)


def test_a_second_gradient_of_numbers_is_let_through():
    """As tests have it, which want a certain second gradient."""
    for second in (lambda _: start(), lambda _: optax.tree.scale(2.0, start())):
        update(SAM, grad_fn=second)
    overflow = lambda p: SAM.update(
        first := grad_fn(p),
        SAM.init(p),
        p,
        grad_fn=lambda _: optax.tree.scale(jnp.inf, first),
    )
    jax.eval_shape(overflow, start())


def test_a_grad_fn_through_anything_that_jax_has_is_not_taken_for_that():
    def looped(params):
        body = lambda p, _: (jax.tree.map(lambda a, b: a + b, p, params), None)
        total, _ = jax.lax.scan(body, grad_fn(params), length=2)
        return jax.lax.cond(total['w'].sum() > 0, lambda: total, lambda: params)

    def written(params):
        ref = jax.new_ref(jnp.zeros((3, 1)))
        ref[...] = params['w']
        return grad_fn({'w': ref[...]})

    for function in (
        written,
        lambda p: jax.jit(lambda: grad_fn(p))(),
        lambda p: jax.checkpoint(lambda: grad_fn(p))(),
        jax.jit(grad_fn),
        jax.checkpoint(grad_fn),
        looped,
        lambda p: jax.vmap(lambda _: grad_fn(p), out_axes=None, axis_size=2)(None),
    ):
        update(SAM, grad_fn=function)
        jax.eval_shape(jax.vmap(lambda _, f=function: update(SAM, grad_fn=f)), X)
    # Some parameters do not matter for the gradient: that is no mistake.
    loss = lambda p: p['a'].sum() + jnp.sum(p['b'] ** 2)
    params = {'a': jnp.ones(2), 'b': jnp.ones(2)}
    step = lambda p: SAM.update(
        jax.grad(loss)(p), SAM.init(p), p, grad_fn=jax.grad(loss)
    )
    jax.eval_shape(step, params)


def test_gradients_with_something_beside_them_are_named():
    loss = lambda p: (linear_loss(p, BATCH), {'accuracy': 1.0})
    with pytest.raises(TypeError, match=r'has_aux=True\)\(p, batch\)\[0\]'):
        update(SAM, grad_fn=jax.grad(loss, has_aux=True))
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    for value in (1.0, (1.0, {})):
        with pytest.raises(TypeError, match=r'got a tuple\. jax.value_and_grad'):
            update(SAM, grad_fn=value_and_grad, value=value)
    # As the errors say it.
    alone = lambda p: jax.grad(loss, has_aux=True)(p)[0]
    update(SAM, grad_fn=alone)
    update(SAM, grad_fn=lambda p: (loss(p)[0], alone(p)), value=1.0)


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (start(), 'psf_grad_fn must be a function of the parameters, got'),
        (GRAD, 'psf_grad_fn must be .* alone, got one.*psf_grad_fn=lambda p'),
        (lambda p: (grad_fn(p), {'accuracy': 1.0}), 'psf_grad_fn must return the'),
        (lambda p: None, 'the result of psf_grad_fn must have the tree structure'),
        (lambda p: (0, grad_fn(p)), 'the value that psf_grad_fn returns must be'),
        (lambda p: start(), None),
    ],
)
def test_an_error_names_the_argument_that_was_given(given, message):
    call = functools.partial(update, SAM, grad_fn=None, psf_grad_fn=given)
    if message is None:
        call()
        return
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    ('name', 'meant'),
    [('per_devices', 'per_device'), ('samples', 'sample'), ('gradfn', 'grad_fn')],
)
def test_an_argument_that_is_misspelt_is_not_ignored(name, meant):
    with pytest.raises(TypeError, match=f"no argument '{name}'.*mean '{meant}'"):
        update(SAM, **{name: False})


def test_rho_is_no_argument_of_an_update():
    with pytest.raises(TypeError, match='rho must be given where the method is made'):
        update(SAM, rho=0.3)


def test_arguments_of_other_optimizers_pass():
    update(SAM, value_fn=None, grad=None, loss=None, obj_fn=None, key=None)


# --- A radius that is none ----------------------------------------------------


@pytest.mark.parametrize(
    ('given', 'error', 'message'),
    [
        (-0.1, ValueError, 'got -0.1'),
        (float('nan'), ValueError, 'got nan'),
        (None, TypeError, 'got None'),
        (0.1 + 1j, TypeError, r'got \(0\.1'),
        (np.array([0.1]), TypeError, r'array of shape \(1,\)'),
    ],
)
@pytest.mark.parametrize('method', [vsam_jax.sam, vsam_jax.lean_sam, vsam_jax.msam])
def test_a_schedule_that_gives_no_radius_is_named(method, given, error, message):
    tx = method(lambda count: given)
    slice_fn = {'psf_grad_fn': grad_fn} if method is vsam_jax.lean_sam else {}
    with pytest.raises(error, match=f'the result of the schedule rho must.*{message}'):
        update(tx, **slice_fn)


@pytest.mark.parametrize('way', ['schedule', 'injected'])
def test_a_radius_below_zero_that_only_the_run_knows_makes_no_step(way):
    """SAM would go down where it should climb."""
    rho = 0.1
    if way == 'schedule':
        rho = optax.linear_schedule(0.1, -0.1, 2)
    tx = vsam_jax.sam(rho)
    if way == 'injected':
        tx = optax.inject_hyperparams(lambda rho: vsam_jax.sam(rho))(rho=0.1)
    params, state, log = start(), tx.init(start()), []
    step = jax.jit(lambda s: tx.update(grad_fn(params), s, params, grad_fn=grad_fn))
    for i in range(3):
        if way == 'injected':
            state = optax.tree.set(state, rho=jnp.array((0.1, 0.0, -0.1)[i]))
        direction, state = step(state)
        log.append(bool(jnp.isfinite(direction['w']).all()))
    assert log == [True, True, False]
    assert int(vsam_jax.metrics(state)['num_rejected']) == 1


# --- States of something else -------------------------------------------------

STEADY = vsam_jax.steady_vsam(0.1, every=2)  # Its window has 64 steps, as SAM's.
OTHERS = {
    'of a method that stores nothing': (SAM, STEADY, 'its psf differs'),
    'of a method that stores a PSF': (STEADY, SAM, 'its psf differs'),
    'of another window': (vsam_jax.vsam(), vsam_jax.vsam(window=10), 'its plan'),
    'of another rule': (
        vsam_jax.vsam(window=64, segments=4),
        vsam_jax.steady_vsam(every=2),
        'its rings',
    ),
    'of another memory': (vsam_jax.vasso(), vsam_jax.asyncsam(), 'perturbation_memory'),
    'that decides': (vsam_jax.aesam(steps=5), SAM, 'its plan'),
}


@pytest.mark.parametrize('name', OTHERS)
def test_a_state_of_another_method_or_of_other_settings_is_named(name):
    of, method, message = OTHERS[name]
    with pytest.raises(ValueError, match=f'state must be that of this.*{message}') as e:
        update(method, of.init(start()))
    assert len(str(e.value)) < 300


def test_a_memory_of_other_parameters_is_named():
    state = vsam_jax.vasso().init({'w': jnp.ones(3)})
    with pytest.raises(ValueError, match=r"\['w'\] its shape is \(3,\), not \(3, 1\)"):
        update(vsam_jax.vasso(), state)


def test_a_state_in_half_precision_is_named():
    state = optax.tree.cast(SAM.init(start()), jnp.bfloat16)
    with pytest.raises(TypeError, match='float32 or wider, got bfloat16'):
        update(SAM, state)


@pytest.mark.parametrize('method', [SAM, STEADY])
def test_a_state_that_was_made_in_64_bit_mode_is_named(method):
    with jax.enable_x64(True):
        state = method.init({'w': jnp.full((3, 1), 0.1, jnp.float64)})
    with pytest.raises(TypeError, match=r'in float32, got float64: jax_enable_x64'):
        update(method, state)


def test_states_that_were_restored_without_a_target_are_named():
    for tx in (SAM, vsam_jax.msam()):
        state: Any = tx.init(start())
        with pytest.raises(TypeError, match=r'got a dict\. A checkpoint.*tx\.init'):
            update(tx, state._asdict())
    with pytest.raises(
        TypeError, match=r'VSAMState of the transformation, got a tuple'
    ):
        update(SAM, optax.chain(SAM, SGD).init(start()))
    with pytest.raises(TypeError, match=r'jax\.eval_shape makes: run tx\.init'):
        update(SAM, jax.eval_shape(SAM.init, start()))


# --- Planned steps ------------------------------------------------------------


def planned_run() -> tuple[Any, Any, Any]:
    """A driver, parameters and state after one step; the next is not sampled."""
    tx = optax.chain(STEADY, SGD)
    step = vsam_jax.PlannedStep(_step(tx), donate_argnums=0)
    return step, *step(start(), tx.init(start()), jnp.zeros(()))


@functools.cache
def _step(tx) -> Any:
    def step(params, opt_state, number):
        updates, opt_state = tx.update(
            grad_fn(params), opt_state, params, grad_fn=grad_fn
        )
        seen = jax.ShapeDtypeStruct((), number.dtype)
        offset = jax.pure_callback(_fail, seen, number)
        return optax.apply_updates(
            params, optax.tree.add(updates, {'w': offset})
        ), opt_state

    return step


def _fail(number):
    if number > 0:
        raise RuntimeError('The data ended.')
    return number


@pytest.mark.parametrize('field', ['plan', 'position'])
def test_a_plan_that_was_set_by_hand_is_followed(field):
    step, params, state = planned_run()
    new = {'plan': jnp.ones(64, bool), 'position': jnp.array(0)}[field]
    _, state = step(params, optax.tree.set(state, **{field: new}), jnp.zeros(()))
    assert bool(state[0].sampled)


def test_what_is_gone_is_named_wherever_it_stands():
    step, params, state = planned_run()
    after = step(jax.tree.map(jnp.copy, params), state, jnp.zeros(()))
    with pytest.raises(RuntimeError, match='The state was consumed'):
        vsam_jax.metrics(state)
    step(params, after[1], jnp.zeros(()))
    # The new state beside the parameters of before.
    fresh = optax.chain(STEADY, SGD).init(start())
    with pytest.raises(RuntimeError, match=r"argument \[0\], at \['w'\], was consumed"):
        step(params, fresh, jnp.zeros(()))


def test_after_a_step_that_failed_the_error_says_what_is_gone():
    step, params, state = planned_run()
    with pytest.raises(Exception, match='The data ended'):
        jax.block_until_ready(step(params, state, jnp.ones(())))
    with pytest.raises(
        RuntimeError, match='consumed by an earlier call, perhaps one that fail'
    ):
        step(params, state, jnp.zeros(()))


# --- Loss functions of the builders -------------------------------------------


def linen_step(loss_fn, batch=BATCH, batch_stats=None, **settings: Any) -> Any:
    state = vsam_jax.linen.TrainState.create(
        apply_fn=None,
        params=start(),
        tx=optax.chain(SAM, SGD),
        batch_stats=batch_stats,
    )
    step = vsam_jax.linen.make_train_step(loss_fn, **settings)
    return jax.eval_shape(step, state, batch)


LOSS = jnp.ones(())
RETURNED = {
    'the loss alone': (LOSS, 'result of loss_fn must be a pair.*array of shape'),
    'three': ((LOSS, {}, None), 'result of loss_fn must be a pair.*got 3 values'),
    'no statistics': ((LOSS, None), 'second value of loss_fn must be a pair.*got None'),
    'aux alone': (
        (LOSS, {'loss': LOSS, 'accuracy': LOSS}),
        'second value of loss_fn must be a pair.*got a dict',
    ),
    'aux first': ((LOSS, ({'loss': LOSS}, {'m': LOSS})), r"it lacks \['m'\]"),
    'one level more': ((LOSS, ({'batch_stats': {'m': LOSS}}, None)), 'lacks'),
    'lost': ((LOSS, (None, None)), r"lacks \['m'\], which the state has"),
}


@pytest.mark.parametrize('name', RETURNED)
def test_what_a_loss_function_returns_in_the_wrong_place_is_named(name):
    result, message = RETURNED[name]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        linen_step(lambda *_: result, batch_stats={'m': LOSS})
    assert '(loss, (batch_stats, aux))' in str(caught.value)


def test_aux_is_not_taken_for_statistics_where_there_are_none():
    swapped = lambda p, stats, b, k: (linear_loss(p, b), ({'loss': LOSS}, stats))
    with pytest.raises(ValueError, match='in this order'):
        linen_step(swapped)


@pytest.mark.parametrize('result', [LOSS, (LOSS, None, None)])
def test_loss_functions_of_nnx_return_a_pair(result):
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(SAM, SGD), wrt=nnx.Param)
    step = vsam_jax.nnx.make_train_step(lambda model, batch: result)
    with pytest.raises(TypeError, match=r'must be a pair, \(loss, aux\)'):
        step(model, optimizer, X)
    with pytest.raises(
        TypeError, match=r'optimizer must be an nnx.Optimizer.*a Linear'
    ):
        step(optimizer, model, X)


def test_a_loss_function_that_is_none_is_named_at_once():
    for framework in (vsam_jax.linen, vsam_jax.nnx):
        with pytest.raises(TypeError, match='loss_fn must be a function, got None'):
            framework.make_train_step(None)


UNLIKE = {
    'weights of four classes': jnp.arange(4.0),
    'a temperature': jnp.ones(()),
    'a key': jax.random.key(0),
    'an old key': jax.random.PRNGKey(0),
}


@pytest.mark.parametrize('settings', [{'num_micro_batches': 2}, {'psf_share': 1 / 2}])
@pytest.mark.parametrize('name', UNLIKE)
def test_what_has_no_axis_of_examples_is_not_cut(name, settings):
    """Weights of four classes would be those of two, in silence."""
    loss_fn = lambda p, s, b, k: (linear_loss(p, b[:2]) * b[2].shape[0], (s, None))
    match = rf'{next(iter(settings))} must divide.*at \[2\] is an array of shape'
    with pytest.raises(ValueError, match=match):
        linen_step(loss_fn, (*BATCH, UNLIKE[name]), **settings)
    # As the error says it.
    closed = lambda p, s, b, k: (linear_loss(p, b), (s, UNLIKE[name]))
    linen_step(closed, **settings)


def test_a_mini_batch_that_is_not_cut_may_hold_anything():
    loss_fn = lambda p, s, b, k: (linear_loss(p, b[:2]) * b[2], (s, None))
    linen_step(loss_fn, (*BATCH, jnp.ones(())))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'dropout_key': 0}, 'dropout_key must be a key.*got 0'),
        ({'dropout_key': jnp.ones(2)}, r'dropout_key must be .* array of shape \(2,\)'),
        ({'dynamic_scale': True}, 'dynamic_scale must be a DynamicScale.*got True'),
        ({'dynamic_scale': DynamicScale}, 'dynamic_scale must be a DynamicScale'),
    ],
)
def test_fields_of_a_train_state_that_are_none_are_named(fields, message):
    create = functools.partial(vsam_jax.linen.TrainState.create, apply_fn=None)
    with pytest.raises(TypeError, match=message):
        create(params=start(), tx=optax.chain(SAM, SGD), **fields)


class Dropping(vsam_jax.linen.TrainState):
    """Hands the arguments of the optimizer on, but not the fields."""

    def apply_gradients(self, *, grads, batch_stats, **kwargs):
        return super().apply_gradients(grads=grads, **kwargs)


def test_a_train_state_that_drops_the_statistics_is_named():
    loss_fn = lambda p, s, b, k: (linear_loss(p, b), ({'m': s['m'] + 1}, None))
    state = Dropping.create(
        apply_fn=None,
        params=start(),
        tx=optax.chain(SAM, SGD),
        batch_stats={'m': jnp.zeros(())},
    )
    with pytest.raises(TypeError, match='apply_gradients of Dropping dropped them'):
        jax.eval_shape(vsam_jax.linen.make_train_step(loss_fn), state, BATCH)


# --- Momentum-SAM -------------------------------------------------------------


def test_a_step_that_a_guard_skips_leaves_momentum_sam_where_it_was():
    guard = optax.apply_if_finite(optax.identity(), 5)
    base = optax.sgd(0.1, momentum=0.9)
    tx: Any = optax.chain(base, vsam_jax.msam(0.1))
    params, state, skipped = start(), tx.init(start()), guard.init(start())
    grads = jax.tree.map(jnp.ones_like, params)
    for factor in (1.0, jnp.nan, 1.0):
        scaled = optax.tree.scale(factor, grads)
        if factor != factor:  # Noted by the base optimizer too: start it anew.
            updates, (_, moved) = tx.update(scaled, state, params)
            state = base.init(start()), moved
        else:
            updates, state = tx.update(scaled, state, params)
        updates, skipped = guard.update(updates, skipped, params)
        params = optax.apply_updates(params, updates)
    assert np.isnan(updates['w']).sum() == 0
    # Two steps of 0.1, whatever was skipped between them.
    expected = start()['w'] - 2 * 0.1
    evaluated = vsam_jax.msam_eval_params(state, params)
    np.testing.assert_allclose(evaluated['w'], expected, rtol=1e-5)


def test_parameters_of_another_shape_have_no_evaluation():
    state = vsam_jax.msam().init(start())
    with pytest.raises(ValueError, match=r"at 'w' their shape is \(1,\) and not"):
        vsam_jax.msam_eval_params(state, {'w': jnp.ones(1)})


# --- Rules of one's own -------------------------------------------------------


class VectorWeight(reuse.Difference):
    def weight(self, age, norms):
        return jnp.ones((1,))


class OtherMemory(perturbation.StatefulPerturbation):
    def init(self, params):
        return {'mean': params}

    def observe(self, grads, params, memory):
        return {'average': grads}

    def __call__(self, grads, params, rho, memory):
        return grads


@dataclasses.dataclass(frozen=True)
class OddBudget(sampling.SamplingRule):
    """A budget of Python, which would change the types of the state."""

    window: int = 4
    budget: Any = 3

    def init_budget(self, dtype):
        return self.budget

    def next_budget(self, budget, rings):
        return self.budget

    def plan(self, budget, window_index):
        return jnp.arange(4) < 1


class OtherDecision(OddBudget):
    def init_memory(self, dtype):
        return {'mean': jnp.zeros(2)}

    def decide(self, memory, grad_norm):
        return grad_norm > 1, {'mean': jnp.zeros(3)}


def one_number(grads, params, rho):
    return jax.tree.map(lambda g: rho * g.mean(), grads)


PARTS = perturbation.l2_ascent, sampling.Periodic(2), reuse.NoReuse()


@pytest.mark.parametrize(
    ('place', 'part', 'message'),
    [
        (0, one_number, r"tree of arrays like params: at \['w'\] its shape is \(\)"),
        (0, lambda g, p, r: g['w'], 'tree of arrays like params: at its root'),
        (0, OtherMemory(), r"observe of the perturbation .* it lacks \['mean'\]"),
        (1, OtherDecision(), r'decide of sampling \(OtherDecision\).*not \(2,\)'),
        (1, OddBudget(budget=np.ones(2)), r'budget of sampling \(OddBudget\).*scalar'),
        (2, VectorWeight(), r'VectorWeight.weight must return a scalar'),
    ],
)
def test_parts_that_return_something_else_are_named(place, part, message):
    parts = [part if i == place else known for i, known in enumerate(PARTS)]
    with pytest.raises(ValueError, match=message):
        update(vsam_jax.sharpness_aware(*parts, 0.1), sample=place != 2)


def test_a_budget_of_python_leaves_the_state_its_types():
    tx = vsam_jax.sharpness_aware(PARTS[0], OddBudget(), PARTS[2], 0.1)
    _, state = update(tx)
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(
        jnp.result_type, tx.init(start())
    )


# --- Messages -----------------------------------------------------------------

PAGE = jnp.arange(1000.0)
LARGE: dict[str, Any] = {
    'rho': lambda: vsam_jax.sam(list(range(1000))),
    'window': lambda: vsam_jax.vsam(window=PAGE),
    'dtype': lambda: vsam_jax.vsam(psf_dtype=np.arange(1000)),
    'mask': lambda: vsam_jax.sam(perturb_mask={'a': np.ones((50, 50))}),
    'rule': lambda: vsam_jax.sharpness_aware(PARTS[0], PAGE, PARTS[2], 0.1),
    'grad_fn': lambda: update(SAM, grad_fn=[PAGE]),
    'sample': lambda: update(SAM, sample=[1] * 1000),
    'leaf': lambda: SAM.init({'a': 'x' * 1000}),
    'axis': lambda: vsam_jax.linen.make_train_step(lambda *_: None, axis_name=PAGE),
    'step': lambda: vsam_jax.PlannedStep({'a': PAGE}),
    'decision': lambda: vsam_jax.PlannedStep(_step)(sample=(PAGE, PAGE)),
    'loss': lambda: vsam_jax.nnx.value_and_grad(PAGE),
    'schedule': lambda: vsam_jax.rho_schedule(
        PAGE, max_rho=1.0, min_rho=0.0, max_rate=1.0
    ),
}


@pytest.mark.parametrize('name', LARGE)
def test_no_message_is_a_page_of_numbers(name):
    with pytest.raises((TypeError, ValueError)) as caught:
        LARGE[name]()
    message = str(caught.value)
    assert '\n' not in message
    assert len(message) < 400


def test_a_variable_where_an_array_is_wanted_is_called_one():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(SAM, SGD), wrt=nnx.Param)
    loss = lambda model: jnp.mean(model(X) ** 2)
    grads = nnx.grad(loss)(model)
    with pytest.raises(ValueError, match=r'it has a Param, where an array of shape'):
        optimizer.update(model, grads, grad_fn=lambda _: nnx.grad(loss)(model))


# --- What is no parameter -----------------------------------------------------


class Module(eqx.Module):
    w: jax.Array
    count: jax.Array
    activation: Any = jnp.tanh


@pytest.mark.parametrize(
    ('keep', 'message'),
    [
        (
            lambda x: not eqx.is_array(x),
            r'at \.activation it holds .*eqx\.is_inexact_array',
        ),
        (
            eqx.is_array,
            r'at \.count the dtype is int32\. .* leave them out, with None',
        ),
    ],
)
def test_what_is_not_trained_in_a_module_says_how_to_leave_it_out(keep, message):
    module = Module(jnp.full((3, 1), 0.1), jnp.zeros((), jnp.int32))
    with pytest.raises(TypeError, match=message):
        SAM.init(eqx.filter(module, keep))
    # As the errors say it.
    params, static = eqx.partition(module, eqx.is_inexact_array)
    loss = lambda p: linear_loss({'w': eqx.combine(p, static).w}, BATCH)
    step = lambda p: SAM.update(
        eqx.filter_grad(loss)(p), SAM.init(p), p, grad_fn=jax.grad(loss)
    )
    direction, _ = jax.eval_shape(step, params)
    assert direction.w.shape == (3, 1)
