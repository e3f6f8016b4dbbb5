"""The study of slices of the mini-batch, on two steps."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.studies.slices import __main__ as program
from experiments.studies.slices import methods, report, screen, tasks


@pytest.fixture
def task(monkeypatch):
    small = dataclasses.replace(
        tasks.TASKS['mlp_600'],
        num_steps=2,
        radii=(0.5, 1.0),
        rates=(0.1,),
        sgd_rates=(0.1, 0.01),
    )
    monkeypatch.setitem(tasks.TASKS, 'mlp_600', small)
    return small


class Told:
    """Trains nothing."""

    made: list[str]  # Of all programs.

    def __init__(self, _, method, **__):
        self.made.append(method.title)
        self.bonus = 0.1 * (method.parts == 1)

    def __call__(self, runs):
        found = [0.5 + self.bonus + 0.1 * rho + 1e-3 * (s % 7) for s, (rho, _) in runs]
        return np.stack([found, found], axis=1)


@pytest.mark.slow
def test_two_steps_of_a_program(task):
    program = screen.Program(task, methods.METHODS['slice_8_3'], width=2)
    runs = [(seed, (0.5, 0.1)) for seed in (1, 2, 1)]
    found = program(runs)
    assert found.shape == (3, 2)
    assert ((found > 0) & (found < 1)).all()
    np.testing.assert_array_equal(found[0], found[2])


def test_units_are_written_and_not_made_again(task, tmp_path, monkeypatch):
    monkeypatch.setattr(screen, 'Program', Told)
    Told.made = []
    output = tmp_path / 'slices.json'
    names = ('sam', 'sgd', 'slice_8_3')
    program.run(output, ['mlp_600'], names[-1:], num_seeds=2, tuning=(300,))
    content = json.loads(output.read_text())
    assert list(content['units']) == [f'mlp_600/{name}' for name in names]
    unit = content['units']['mlp_600/slice_8_3']
    assert len(unit['validation']) == len(methods.pairs_of(task, 'slice_8_3')) == 2
    assert unit['at_edge'] == [True, False]
    assert unit['chosen'] == [0.4, 0.1]  # The larger one, scaled for slices.
    found = unit['statistics']['own']['minus_sam']
    np.testing.assert_allclose(list(found.values()), -0.16, atol=1e-5)
    assert '1/8 of the examples' in (tmp_path / 'table.md').read_text()

    assert len(Told.made) == 3
    program.run(output, ['mlp_600'], names[-1:], num_seeds=2, tuning=(300,))
    assert len(Told.made) == 3
    assert json.loads(output.read_text())['units'] == content['units']
    with pytest.raises(SystemExit, match='2 seeds'):
        program.run(output, ['mlp_600'], names[-1:], num_seeds=3)


def test_msam_looks_ahead_by_the_momentum():
    tx = optax.sgd(0.1, momentum=0.9)
    params = {'w': jnp.array([1.0, 2.0])}
    _, state = tx.update({'w': jnp.array([3.0, 4.0])}, tx.init(params), params)
    along = lambda state: methods._along_momentum(params, state, 0.5, None)['w']
    np.testing.assert_allclose(along(state), [1 - 0.3, 2 - 0.4], rtol=1e-6)
    np.testing.assert_allclose(along(tx.init(params)), [1, 2])


def test_examples_of_a_step():
    cost = lambda name: methods.METHODS[name].gradients
    np.testing.assert_allclose(cost('slice_8_3'), 1 + 2 / 8 / 3)
    assert (cost('sgd'), cost('sam'), cost('vsam')) == (1, 2, None)
    assert (cost('quarter'), cost('msam')) == (1.25, 1)
    np.testing.assert_allclose(cost('tail'), 1 + 1 / 3)


def test_the_trainer_has_results():
    found = report.trainer_results('sam')
    assert len(found['seeds']) == len(found['values'])
    assert found['pair'][1] == 0.1
