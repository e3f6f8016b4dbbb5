"""What a sharded run holds and sends, as docs/evidence/scale.md derives it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments import documents
from experiments.studies.scale import __main__ as scale

# Statistics, plan and counters, all of it replicated.
SMALL = 2000


@functools.cache
def measured(psf_dtype: Any = None) -> dict[str, Any]:
    return scale.measure(width=128, depth=2, batch_size=16, psf_dtype=psf_dtype)


def layout(**sizes: int) -> scale.Layout:
    return scale.Layout(measured()['parameters'], jax.device_count(), **sizes)


@pytest.mark.parametrize('psf_dtype', [None, jnp.bfloat16])
def test_a_device_holds_its_share_of_everything_the_psf_too(psf_dtype):
    run = measured(psf_dtype)
    derived = scale.derive(layout(psf_bytes=4 if psf_dtype is None else 2))
    for name, step in run['steps'].items():
        held = step['memory']['arguments'] - 4 * run['batch_elements']
        assert derived[name]['state'] <= held <= derived[name]['state'] + SMALL


def test_a_reuse_step_sends_nothing_more_and_needs_no_tensor_more():
    steps = measured()['steps']
    assert steps['reuse']['collectives'] == steps['base']['collectives']
    temporaries = [steps[name]['memory']['temporaries'] for name in ('base', 'reuse')]
    assert abs(temporaries[1] - temporaries[0]) < SMALL


def test_a_sampled_step_sends_one_gradient_more_and_single_numbers():
    steps = measured()['steps']
    sent = dict(steps['sampled']['collectives'])
    once = dict(steps['base']['collectives'])
    assert 0 < sent.pop('scalars') < 50
    assert once.pop('scalars') < 5
    # Weights are gathered and gradients reduced: both of all parameters, at least.
    assert once['all-gather'] >= measured()['parameters']
    assert sent == {name: 2 * size for name, size in once.items()}
    derived = scale.derive(layout())
    assert derived['sampled']['received'] == 2 * derived['base']['received']


def test_collectives_are_counted():
    text = """
      %a = f32[4,8]{1,0} all-gather(%x), dimensions={0}
      %b = (f32[3]{0}, f32[]) all-reduce(%y, %z), to_apply=%add
      %c = f32[2]{0} all-reduce-start(%y)
      %d = f32[2]{0} all-reduce-done(%c)
    """
    assert scale.collectives(text) == {'scalars': 1, 'all-gather': 32, 'all-reduce': 5}


def test_the_page_holds_what_the_formulas_give():
    text = (documents.ROOT / 'docs' / 'evidence' / 'scale.md').read_text()
    assert scale.table(scale.Layout(1e9, 256)) in text
