"""Wrong arguments: the message names the argument, the value and what is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsam_jax

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


def update(grads=None, params=PARAMS, grad_fn=lambda p: p, sample=True, tx=None):
    tx = vsam_jax.vsam() if tx is None else tx
    grads = PARAMS if grads is None else grads
    return tx.update(grads, tx.init(PARAMS), params, grad_fn=grad_fn, sample=sample)


@pytest.mark.parametrize('sample', [True, None], ids=['planned', 'traced'])
@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'params': None}, ValueError, r'params must be .* got None'),
        ({'grad_fn': None}, ValueError, r'grad_fn must be .* got None'),
        ({'grad_fn': 3}, TypeError, r'grad_fn must be .* got 3'),
        (
            {'grad_fn': lambda p: p['a']},
            ValueError,
            r'result of grad_fn must have the tree structure',
        ),
        (
            {'grad_fn': lambda p: (1.0, p)},
            ValueError,
            r'result of grad_fn must have the tree structure',
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
        ({'a': jnp.ones(2, complex)}, TypeError, 'split_real_and_imaginary'),
        ({'a': 1.0}, TypeError, r"params must hold arrays; at \['a'\] it holds 1.0"),
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
    with pytest.raises(TypeError, match='name it in static_args'):
        tx.init(PARAMS)


def test_nothing_is_lost_when_an_update_is_refused():
    tx = vsam_jax.vsam()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match='grad_fn'):
        tx.update(PARAMS, state, PARAMS)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
