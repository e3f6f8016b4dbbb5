"""Wrong arguments: the message names the argument, the value and what is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsam_jax
from tests import problems
from vsam_jax import checkpoint, perturbation, reuse, sampling

NAN, INF = float('nan'), float('inf')

WRONG = [
    ('rho', -0.1, ValueError, 'got -0.1'),
    ('rho', NAN, ValueError, 'got nan'),
    ('rho', INF, ValueError, 'got inf'),
    ('rho', '0.1', TypeError, "got '0.1'"),
    ('rho', None, TypeError, 'got None'),
    ('rho', True, TypeError, 'got True'),
    ('rho', jnp.ones(2), TypeError, 'got an array of shape (2,) and dtype float32'),
    ('rho', jnp.array(-1.0), ValueError, 'got Array(-1.'),
    ('window', 1, ValueError, 'got 1'),
    ('window', 10.0, TypeError, 'got 10.0'),
    ('window', True, TypeError, 'got True'),
    ('window', None, TypeError, 'got None'),
    ('window', jnp.array(10), TypeError, 'got Array(10'),
    ('segments', 0, ValueError, 'got 0'),
    ('segments', 7, ValueError, 'got segments=7 for window=50'),
    ('segments', 50, ValueError, 'got segments=50 for window=50'),
    ('segments', 5.0, TypeError, 'got 5.0'),
    ('warmup_steps', -1, ValueError, 'got -1'),
    ('warmup_steps', 1.5, TypeError, 'got 1.5'),
    ('norm_gain', -0.1, ValueError, 'got -0.1'),
    ('norm_gain', NAN, ValueError, 'got nan'),
    ('norm_gain', 1e39, ValueError, 'got 1e+39'),
    ('norm_gain', 'a', TypeError, "got 'a'"),
    ('variance_gain', -0.1, ValueError, 'got -0.1'),
    ('variance_gain', INF, ValueError, 'got inf'),
    ('variance_gain', 1j, TypeError, 'got 1j'),
    ('decay', -0.1, ValueError, 'got -0.1'),
    ('decay', 1.1, ValueError, 'got 1.1'),
    ('decay', None, TypeError, 'got None'),
    ('reuse_steps', -1, ValueError, 'got -1'),
    ('reuse_steps', 2.5, TypeError, 'got 2.5'),
    ('max_rate', 0.0, ValueError, 'got 0.0'),
    ('max_rate', 1.01, ValueError, 'got 1.01'),
    ('max_rate', 0.01, ValueError, 'got max_rate=0.01 for window=50'),
    ('max_rate', False, TypeError, 'got False'),
    ('stats_mask', 3, TypeError, 'holds 3'),
    ('stats_mask', {'a': 1}, TypeError, 'holds 1'),
    ('perturb_mask', 'a', TypeError, "holds 'a'"),
    ('psf_dtype', jnp.int8, TypeError, "got <class 'jax.numpy.int8'>"),
    ('psf_dtype', 'float33', TypeError, "got 'float33'"),
    ('seed', -1, ValueError, 'got -1'),
    ('seed', 2**32, ValueError, 'got 4294967296'),
    ('seed', 0.5, TypeError, 'got 0.5'),
]


@pytest.mark.parametrize(('name', 'value', 'error', 'received'), WRONG)
def test_vsam_refuses(name, value, error, received):
    with pytest.raises(error) as info:
        vsam_jax.vsam(**{name: value})
    message = str(info.value)
    assert message.startswith((name, 'segments must divide window'))
    assert received in message
    assert 'must' in message


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('rho', np.float32(0.1)),
        ('rho', jnp.array(0.1)),
        ('rho', 1),
        ('window', np.int64(10)),
        ('warmup_steps', 0),
        ('decay', 0),
        ('decay', 1),
        ('reuse_steps', 0),
        ('max_rate', 1),
        ('psf_dtype', 'bfloat16'),
        ('stats_mask', np.True_),
        ('seed', 2**32 - 1),
    ],
)
def test_vsam_accepts_what_it_allows(name, value):
    tx = vsam_jax.vsam(**{name: value})
    w = jnp.ones(2)
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda p: p, sample=True)
    assert int(state.num_samples) == 1


def test_max_rate_is_not_rounded_down_by_binary_fractions():
    rule = vsam_jax.sampling.ByVariation(100, 5, 0, 0.1, 0.1, 0.29, 0)
    assert rule.max_budget == 29


PARAMS = {'a': jnp.ones(2), 'b': jnp.ones((2, 2))}


def update(
    grads=None, params=PARAMS, grad_fn=lambda p: p, sample=True, tx=None, value=None
):
    tx = vsam_jax.vsam() if tx is None else tx
    grads = PARAMS if grads is None else grads
    told = {'grad_fn': grad_fn, 'sample': sample, 'value': value}
    return tx.update(grads, tx.init(PARAMS), params, **told)


@pytest.mark.parametrize('sample', [True, None], ids=['planned', 'traced'])
@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'params': None}, ValueError, r'params must be .* got None'),
        ({'grad_fn': None}, ValueError, r'grad_fn must be .* got None'),
        ({'grad_fn': None}, ValueError, r'not passed on.* vsam_jax.linen.TrainState'),
        ({'grad_fn': 3}, TypeError, r'grad_fn must be .* got 3'),
        (
            {'grad_fn': lambda p: p['a']},
            ValueError,
            r'result of grad_fn must have the tree structure',
        ),
        (
            {'grad_fn': lambda p: (1.0, p)},
            ValueError,
            r'value must be the loss of the first pass where grad_fn returns',
        ),
        (
            {'grad_fn': lambda p: (p, {'accuracy': 1.0})},
            TypeError,
            r'grad_fn must return the gradient, .* has_aux=True.* batch\)\[0\]',
        ),
        (
            {'grad_fn': lambda p: ((1.0, {'accuracy': 1.0}), p), 'value': 1.0},
            TypeError,
            r'value that grad_fn returns must be .* got a tuple.*has_aux',
        ),
        (
            {'grad_fn': lambda p: {'a': p['a'], 'b': p['a']}},
            ValueError,
            r"result of grad_fn .* \['b'\] it must be \(2, 2\), got \(2,\)",
        ),
        (
            {'grad_fn': lambda p: {'a': p['a'], 'b': p['b'].astype(jnp.bfloat16)}},
            TypeError,
            r"result of grad_fn .* \['b'\] it must be float32, got bfloat16",
        ),
        ({'grads': {'a': jnp.ones(2)}}, ValueError, r'updates must have the tree'),
        (
            {'grads': {'a': jnp.ones(2), 'b': jnp.ones(2)}},
            ValueError,
            r"updates must have the shapes of params: at \['b'\]",
        ),
        (
            {'params': {'a': jnp.ones(2)}, 'grads': {'a': jnp.ones(2)}},
            ValueError,
            r'PSF of state must have the tree structure',
        ),
    ],
)
def test_update_refuses(arguments, error, message, sample):
    with pytest.raises(error, match=message):
        update(**arguments, sample=sample)


@pytest.mark.parametrize(
    ('sample', 'error'),
    [
        (1, TypeError),
        ('yes', TypeError),
        (jnp.array(1), TypeError),
        (jnp.array([True]), ValueError),
    ],
)
def test_update_refuses_a_wrong_sample(sample, error):
    with pytest.raises(error, match='sample must be None, a Python bool'):
        update(sample=sample)


@pytest.mark.parametrize(
    ('params', 'error', 'message'),
    [
        ({'a': jnp.arange(3)}, TypeError, r"params must hold real .*\['a'\].*int32"),
        ({'a': jnp.ones(2, complex)}, TypeError, 'leaves of the real and the imag'),
        ({'a': jnp.ones(2, jnp.float8_e4m3fn)}, TypeError, r'16 bits .* float8_e4m3fn'),
        ({'a': 1.0}, TypeError, r"params must hold arrays; at \['a'\] it holds 1.0"),
        ({'a': jnp.tanh}, TypeError, r'leave them out, .*eqx.is_inexact_array'),
        ({'a': jnp.ones(2, int)}, TypeError, r'leave them out, .*eqx.is_inexact_array'),
        ({'a': optax.MaskedNode()}, ValueError, 'outside optax.masked'),
    ],
)
def test_init_refuses(params, error, message):
    with pytest.raises(error, match=message):
        vsam_jax.vsam().init(params)


@pytest.mark.parametrize('name', ['stats_mask', 'perturb_mask'])
@pytest.mark.parametrize(
    ('mask', 'error', 'message'),
    [
        ({'a': True, 'c': True}, ValueError, 'must have the structure'),
        (lambda p: [True], ValueError, 'must have the structure'),
        (lambda p: 0.5, TypeError, 'pytree of booleans'),
        (False, ValueError, 'must pick at least one tensor'),
    ],
)
def test_masks_that_do_not_fit_are_refused_at_init(name, mask, error, message):
    with pytest.raises(error, match=message) as info:
        vsam_jax.vsam(**{name: mask}).init(PARAMS)
    assert str(info.value).startswith(name)


def test_a_static_argument_that_is_traced_is_refused_with_the_way_out():
    tx = optax.inject_hyperparams(vsam_jax.vsam)(rho=0.1, window=10)
    with pytest.raises(TypeError, match='inject ρ alone'):
        tx.init(PARAMS)


def test_nothing_is_lost_when_an_update_is_refused():
    tx = vsam_jax.vsam()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match='grad_fn'):
        tx.update(PARAMS, state, PARAMS)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


def test_gradients_that_are_no_floating_point_numbers_are_refused():
    tx = vsam_jax.vsam()
    grads = jax.tree.map(lambda p: p.astype(jnp.int32), PARAMS)
    with pytest.raises(TypeError, match=r"updates must hold real .*\['a'\].* int32"):
        tx.update(grads, tx.init(PARAMS), PARAMS, sample=False)


def test_a_traced_rho_must_be_a_scalar_too():
    init = lambda rho: vsam_jax.sam(rho).init(jnp.ones(2))
    with pytest.raises(TypeError, match=r'rho must be .* array of shape \(2,\)'):
        jax.eval_shape(init, jnp.ones(2))


def test_masks_of_no_parameters_need_not_pick_any():
    tx = vsam_jax.vsam(stats_mask=True, perturb_mask=True)
    _, state = tx.update({}, tx.init({}), {}, grad_fn=lambda p: p, sample=True)
    assert float(state.grad_norm) == 0


def test_what_is_no_tree_is_named_by_its_root():
    with pytest.raises(TypeError, match=r'params must hold real .* at its root'):
        vsam_jax.vsam().init(jnp.arange(3))


def test_every_name_of_an_axis_must_be_a_string():
    tx, w = vsam_jax.vsam(), jnp.ones(2)
    with pytest.raises(TypeError, match=r"axis_name must be .* got \('data', 3\)"):
        tx.update(w, tx.init(w), w, grad_fn=jnp.sin, axis_name=('data', 3))


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: vsam_jax.vsam(reuse_steps=2**31 - 1), 'reuse_steps must be'),
        (lambda: reuse.SteadyDifference(1, 0.3), 'every must be .* got 1'),
        (lambda: problems.random_sam(seed=2**32), 'seed must be .* got 4294967296'),
        (lambda: problems.random_sam(rate=0.0), r'rate must be .* got 0\.0'),
        (lambda: vsam_jax.looksam(every=1, gain=-1.0), 'gain must be .* got -1'),
    ],
)
def test_rules_and_methods_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ('method', 'defaults'),
    [
        (
            vsam_jax.vsam,
            {
                'rho': 0.05,
                'window': 50,
                'segments': 5,
                'norm_gain': 0.13,
                'variance_gain': 0.13,
                'decay': 0.7,
                'reuse_steps': 6,
                'max_rate': 0.8,
            },
        ),
        (vsam_jax.steady_vsam, {'rho': 0.05, 'every': 3, 'tolerance': 0.3}),
        (vsam_jax.sam, {'rho': 0.05}),
        (vsam_jax.asam, {'rho': 0.5, 'eta': 0.0}),
        (vsam_jax.looksam, {'rho': 0.05, 'every': 5, 'gain': 0.7}),
    ],
)
def test_defaults_are_the_published_ones(method, defaults):
    settings = checkpoint.settings_of(method)
    assert {name: settings[name] for name in defaults} == defaults


def test_a_class_is_no_rule():
    parts = perturbation.l2_ascent, sampling.Periodic, reuse.NoReuse()
    with pytest.raises(TypeError, match='sampling must be a SamplingRule'):
        vsam_jax.sharpness_aware(*parts, 0.1)  # pyright: ignore


def test_arrays_of_numpy_make_no_warnings(recwarn):
    params = {'a': np.ones(2), 'b': np.ones(2, np.float32)}
    state = vsam_jax.vsam().init(params)
    assert not recwarn.list
    assert {s.dtype for s in jax.tree.leaves(state.psf)} == {jnp.dtype('float32')}


@pytest.mark.parametrize('method', [vsam_jax.vsam, vsam_jax.steady_vsam, vsam_jax.asam])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float64])
def test_dtypes_are_promoted_by_nobody(method, dtype):
    with jax.enable_x64(dtype == jnp.float64), jax.numpy_dtype_promotion('strict'):
        tx, w = method(), jnp.ones(2, dtype)
        state = tx.init(w)
        for sample in (True, False):
            update = lambda s, sample=sample: tx.update(
                w, s, w, grad_fn=jnp.sin, sample=sample
            )
            jax.eval_shape(update, state)
