"""Wrong arguments: the message names the argument, the value and what is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsam_jax

NAN, INF = float('nan'), float('inf')

WRONG = [
    ('rho', -0.1, ValueError),
    ('rho', NAN, ValueError),
    ('rho', INF, ValueError),
    ('rho', '0.1', TypeError),
    ('rho', None, TypeError),
    ('rho', True, TypeError),
    ('rho', jnp.ones(2), TypeError),
    ('rho', jnp.array(-1.0), ValueError),
    ('window', 1, ValueError),
    ('window', 10.0, TypeError),
    ('window', True, TypeError),
    ('window', None, TypeError),
    ('window', jnp.array(10), TypeError),
    ('segments', 0, ValueError),
    ('segments', 7, ValueError),
    ('segments', 50, ValueError),
    ('segments', 5.0, TypeError),
    ('warmup_steps', -1, ValueError),
    ('warmup_steps', 1.5, TypeError),
    ('norm_gain', -0.1, ValueError),
    ('norm_gain', NAN, ValueError),
    ('norm_gain', 1e39, ValueError),
    ('norm_gain', 'a', TypeError),
    ('variance_gain', -0.1, ValueError),
    ('variance_gain', INF, ValueError),
    ('variance_gain', 1j, TypeError),
    ('decay', -0.1, ValueError),
    ('decay', 1.1, ValueError),
    ('decay', None, TypeError),
    ('reuse_steps', -1, ValueError),
    ('reuse_steps', 2.5, TypeError),
    ('max_rate', 0.0, ValueError),
    ('max_rate', 1.01, ValueError),
    ('max_rate', 0.01, ValueError),
    ('max_rate', False, TypeError),
    ('stats_mask', 3, TypeError),
    ('stats_mask', {'a': 1}, TypeError),
    ('perturb_mask', 'a', TypeError),
    ('psf_dtype', jnp.int8, TypeError),
    ('psf_dtype', 'float33', TypeError),
    ('seed', -1, ValueError),
    ('seed', 2**32, ValueError),
    ('seed', 0.5, TypeError),
]


@pytest.mark.parametrize(('name', 'value', 'error'), WRONG)
def test_vsam_refuses(name, value, error):
    with pytest.raises(error) as info:
        vsam_jax.vsam(**{name: value})
    message = str(info.value)
    assert message.startswith((name, 'segments must divide window'))
    got = str(value['a']) if isinstance(value, dict) else str(value)
    assert got in message or 'dtype' in message
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
