"""What other libraries make of the same program comes out here too."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsam_jax

pytestmark = pytest.mark.around

PAGES = pathlib.Path(__file__).parents[2] / 'docs' / 'coming_from'
# By how much the parameters of both runs may differ; the pages say where it comes from.
DIFFERENCES = {
    'optax_sam': 1e-12,  # optax adds nothing to the norm.
    'davda54_sam': 1e-15,
    'pytorch_optimizer': 1e-8,  # A norm in float32.
    'composer': 1e-15,
    'keras': 1e-7,  # Hyperparameters in float32.
    'authors_vsam': 1e-12,
}
RECORDED = json.loads((PAGES / 'recorded.json').read_text())


@pytest.fixture
def in_pages(monkeypatch):
    """The folder of the pages, whose programs set the precision for themselves."""
    monkeypatch.chdir(PAGES)
    before = jax.config.read('jax_enable_x64')
    yield
    jax.config.update('jax_enable_x64', before)


@pytest.mark.usefixtures('in_pages')
@pytest.mark.parametrize('name', DIFFERENCES)
def test_a_page_makes_the_run_of_the_peer(name):
    text = (PAGES / f'{name}.md').read_text()
    assert text.startswith('---\nfile_format: mystnb\n')
    names = {}
    for cell in re.findall(r'^```\{code-cell\}\n(.*?)^```', text, re.DOTALL | re.M):
        exec(compile(cell, name, 'exec'), names)
    assert jax.tree.leaves(names['params'])[0].dtype == jnp.float64
    assert names['difference'] <= DIFFERENCES[name]


@pytest.mark.parametrize('name', [*RECORDED])
def test_what_is_recorded_is_of_a_program_that_stands_in_its_page(name):
    block = (PAGES / f'{name}.md').read_text().split('<!-- peer -->\n```python\n')[1]
    compile(block.split('```')[0], name, 'exec')
    assert 'w, b =' in block or ('w = ' in block and 'b = ' in block)


def test_there_is_a_page_for_each_peer():
    assert {page.stem for page in PAGES.glob('*.md')} == set(DIFFERENCES)


def loss(params, batch):
    """The squared error of a small network, not quadratic in its parameters."""
    x, y = batch
    hidden = jnp.tanh(x @ params['in'] + params['bias'])
    return jnp.mean((jnp.tanh(hidden @ params['out']) - y) ** 2)


def batches():
    """20 mini-batches of 8 examples."""
    xs = np.cos(np.arange(480.0)).reshape(20, 8, 3)
    ys = np.sin(np.arange(160.0)).reshape(20, 8)
    return zip(xs, ys, strict=True)


def trained(tx, grad_fn=None, calls=1):
    """The parameters after all mini-batches, ``calls`` updates on each."""
    params = {
        'in': jnp.asarray(np.sin(np.arange(12.0)).reshape(3, 4)),
        'bias': jnp.zeros(4),
        'out': jnp.asarray(np.cos(np.arange(4.0))),
    }
    assert params['in'].dtype == jnp.float64

    @jax.jit
    def step(params, opt_state, batch):
        extra = {} if grad_fn is None else {'grad_fn': grad_fn(batch)}
        grads = jax.grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for batch in batches():
        for _ in range(calls):
            params, opt_state = step(params, opt_state, batch)
    return params


BASES = {
    'sgd': lambda: optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)
    ),
    'nesterov': lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    'adamw': lambda: optax.adamw(optax.cosine_decay_schedule(0.01, 20)),
}


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('opaque', [True, False], ids=['opaque', 'transparent'])
@pytest.mark.parametrize('base', BASES)
def test_sam_is_that_of_optax(base, opaque):
    ascent = optax.chain(optax.normalize_by_update_norm(eps=1e-12), optax.sgd(0.05))
    theirs = optax.contrib.sam(BASES[base](), ascent, opaque_mode=opaque)
    expected = trained(
        theirs,
        (lambda batch: lambda p, _: jax.grad(loss)(p, batch)) if opaque else None,
        calls=1 if opaque else 2,
    )
    found = trained(
        optax.chain(vsam_jax.sam(0.05), BASES[base]()),
        lambda batch: lambda p: jax.grad(loss)(p, batch),
    )
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-14)


def test_a_grad_fn_that_was_written_for_optax_is_refused():
    tx = vsam_jax.sam(0.05)
    w = jnp.ones(2)
    with pytest.raises(TypeError, match=r'parameters alone, got one .*\(p, i\)'):
        tx.update(w, tx.init(w), w, grad_fn=lambda p, i: p)
