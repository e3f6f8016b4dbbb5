"""The proof: what is measured of a run, its plan, and one tiny run of it all."""

import dataclasses
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import configuration
from experiments.common.devices import Devices
from experiments.common.ledger import Ledger
from experiments.common.shards import Shard
from experiments.data.examples import Dataset, Split
from experiments.methods import registry
from experiments.methods.compared import METHODS
from experiments.studies.proof import __main__ as program
from experiments.studies.proof import measures, plan, protocol, report, rounding, widths
from experiments.studies.proof.protocol import Unit
from experiments.studies.proof.task import SEEDS, TUNING_SEED, Entry, Task
from experiments.studies.proof.tasks import CHOSEN, TASKS
from experiments.training import plans
from experiments.training.evaluation import evaluate_splits
from tests.experiments.small import TASK, tiny_digits

TINY = Task(
    'tiny',
    lambda: tiny_digits(epochs=4, label_noise=0.2, log_every=1, eval_every=1),
    rho=0.1,
    rate=0.1,
    sgd_rate=0.1,
    entries={
        'sgd': Entry('sgd', SEEDS[:2]),
        'sam': Entry('sam', SEEDS[:2]),
        'sgd_equal': Entry('sgd', SEEDS[:1], equal_time=True),
    },
)


class Told(nn.Module):
    """Its logits are the images."""

    def __call__(self, x, train):
        del train
        return x.reshape(x.shape[0], -1, 2).squeeze()


def _dataset(images: list, labels: list) -> Dataset:
    pixels = np.array(images, np.uint8)
    split = Split(pixels, np.array(labels, np.int32))
    dataset = Dataset(split, split, split, 2, jnp.zeros(1), jnp.ones(1))
    return dataset.on(Devices.first(1))


def test_loss_and_calibration_error_by_hand():
    # Three examples of two classes; the first two share a bin, the third has its own.
    logits = [[0, 1], [1, 0], [3, 0]]
    dataset = _dataset([[[[a], [b]]] for a, b in logits], [1, 1, 0])
    found = evaluate_splits(Told(), {}, dataset, {'all': dataset.test})
    low, high = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    assert found['all_accuracy'] == pytest.approx(2 / 3)
    # −log p of the labels: right, wrong, right.
    losses = [-math.log(low), -math.log(1 - low), -math.log(high)]
    assert found['all_loss'] == pytest.approx(sum(losses) / 3, rel=1e-5)
    # Two of confidence `low`, one of them right; and one of `high`, right.
    assert found['all_calibration_error'] == pytest.approx(
        (abs(2 * low - 1) + abs(high - 1)) / 3, rel=1e-4
    )


def test_each_position_of_a_text_is_calibrated_for_itself():
    # One example of two positions.
    dataset = _dataset([[[[0], [1], [3], [0]]]] * 2, [[1, 1]] * 2)
    found = evaluate_splits(Told(), {}, dataset, {'all': dataset.test})
    low, high = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    assert found['all_accuracy'] == pytest.approx(0.5)
    error = (abs(low - 1) + high) / 2
    assert found['all_calibration_error'] == pytest.approx(error, rel=1e-4)


def test_matrices_are_rounded_column_by_column_and_biases_are_not():
    params = {
        'kernel': jnp.array([[0.7, -127.0], [0.26, 63.4], [-0.24, 0.6]]),
        'bias': jnp.array([0.123, 4.56]),
        'dead': jnp.zeros((2, 2)),
    }
    four = rounding.rounded(params, bits=4)
    np.testing.assert_allclose(four['kernel'][:, 0], [0.7, 0.3, -0.2], rtol=1e-6)
    np.testing.assert_allclose(
        four['kernel'][:, 1], np.array([-7, 3, 0]) * 127 / 7, rtol=1e-6
    )
    eight = rounding.rounded(params, bits=8)
    np.testing.assert_allclose(eight['kernel'][:, 1], [-127, 63, 1], rtol=1e-6)
    for made in (four, eight):
        np.testing.assert_array_equal(made['bias'], params['bias'])
        np.testing.assert_array_equal(made['dead'], 0)
    with pytest.raises(ValueError, match='got 1'):
        rounding.rounded(params, bits=1)
    random = {'w': jax.random.normal(jax.random.key(0), (3, 3, 8, 16))}
    close = rounding.rounded(random, bits=8)['w']
    step = np.abs(np.asarray(random['w'])).max((0, 1, 2)) / 127
    assert np.all(np.abs(close - random['w']) <= step / 2 * (1 + 1e-4))


def test_the_best_epoch_is_that_of_the_validation_examples():
    entry = lambda epoch, accuracy, loss: {
        'epoch': epoch,
        'validation_accuracy': accuracy,
        'validation_loss': loss,
    }
    log = [entry(1, 0.5, 2.0), entry(2, 0.7, 1.0), entry(3, 0.7, None)]
    assert measures.best(log, 'accuracy')['epoch'] == 2
    assert measures.best(log, 'loss')['epoch'] == 2
    assert measures.best([log[2], log[0]], 'loss')['epoch'] == 1


@pytest.mark.parametrize('name', [*CHOSEN, 'wide_resnet_wrong_40'])
def test_every_task_is_complete(name):
    task = TASKS[name]
    assert {'sgd', 'sam'} <= set(task.entries)
    assert set(CHOSEN) <= set(TASKS)
    assert task.config().batch_size % 8 == 0  # A part of an eighth is possible.
    for entry, row in task.entries.items():
        unit = Unit(name, task, entry, stretch=2.0)
        assert TUNING_SEED not in row.seeds
        pair = unit.pairs()[len(unit.pairs()) // 2]
        for job in (*unit.checks(), *unit.reported(pair)):
            configuration.check(job.config)
        run = unit.reported(pair)[0].config
        assert registry.create(row.method, run.methods[row.method], {}, TASK).tx
        factor = 2 if row.equal_time else 1
        assert run.epochs == factor * task.epochs
        checked = 3 if task.checked else 0
        assert len(unit.checks()) == checked


def test_settings_are_the_best_of_the_checks(tmp_path):
    ledger = Ledger(tmp_path / 'runs.jsonl')
    unit = Unit('tiny', TINY, 'sam')
    assert [pair[0] for pair in unit.pairs()] == [0.05, 0.1, 0.2]
    assert [job.config.epochs for job in protocol.jobs(ledger, unit)] == [1, 1, 1]
    for job, accuracy in zip(unit.checks(), (0.5, 0.9, 0.8), strict=True):
        assert not job.tests
        ledger.add(job.key, {'validation': {'accuracy': accuracy, 'loss': 0.0}})
    assert protocol.chosen(ledger, unit) == (0.1, 0.1)
    reported = protocol.jobs(ledger, unit)[3:]
    assert [job.notes['seed'] for job in reported] == [700, 701]
    assert {job.config.epochs for job in reported} == {4}
    assert protocol.lines(ledger, unit) == []
    ledger.add(reported[1].key, {'seed': 701})
    assert [line['seed'] for line in protocol.lines(ledger, unit)] == [701]
    unchecked = dataclasses.replace(TINY, checked=False)
    assert protocol.chosen(ledger, Unit('other', unchecked, 'sam')) == (0.1, 0.1)


def _speeds(ledger: Ledger, step: float) -> None:
    row = lambda step: {
        'step': step,
        'setup': 10.0,
        'evaluation': 1.0,
        'parameters': 7,
    }
    methods = {'sgd': row(step), 'sam': row(2 * step)}
    ledger.add('tiny', {'steps_per_epoch': 3, 'methods': methods})


def test_a_plan_that_is_too_long_is_refused(tmp_path):
    ledger = Ledger(tmp_path / 'speeds.jsonl')
    _speeds(ledger, 0.5)
    made = plan.make(ledger, {'tiny': TINY})
    rows = made['tasks']['tiny']['entries']
    # Four epochs of three steps, and an evaluation after each.
    assert rows['sam']['run_seconds'] == pytest.approx(4 * (3 * 1.0 + 1))
    # Two runs, and three of a quarter of their length.
    assert rows['sam']['seconds'] == pytest.approx(10 + 16 * (2 + 0.75))
    assert rows['sgd_equal']['epochs'] == 8
    assert rows['sgd_equal']['checks'] == 0  # Those of SGD.
    assert made['hours'] == pytest.approx(made['core_hours'] / 2)
    plan.write(made, tmp_path)
    assert '| all |' in (tmp_path / 'plan.md').read_text()

    _speeds(ledger, 5000.0)
    plan.write(plan.make(ledger, {'tiny': TINY}), tmp_path)
    start = lambda tasks: program.run(
        tmp_path, tmp_path / 'runs', tasks, ('sgd', 'sam'), Shard()
    )
    with pytest.raises(configuration.ConfigError, match=r'more than 10: .*--over'):
        start({'tiny': TINY})
    # What is not wanted does not count.
    known = plans.read(tmp_path)
    plans.check_length(known, 20.0, 'fewer')
    with pytest.raises(configuration.ConfigError, match=r'10\.1 hours on 2 cores, m'):
        plans.check_length(known, 20.2, 'fewer')
    with pytest.raises(configuration.ConfigError, match='must plan sgd'):
        start({'other': TINY})
    (tmp_path / plans.PLAN).unlink()
    with pytest.raises(configuration.ConfigError, match='make it with --plan'):
        start({'tiny': TINY})


def test_parameters_are_counted_and_seconds_extrapolated():
    assert widths.parameters(24) > 4 * widths.parameters(11)
    found = widths.extrapolate({'16': 0.1, '32': 0.4})
    rows = found['widths']
    assert found['exponent'] == pytest.approx(2)
    assert rows['8']['step'] == pytest.approx(0.025)
    assert rows['32']['minutes'] == pytest.approx(20 * 351 * 0.4 / 2 / 60)
    assert found['widest'] == 32
    assert 'above 300,000 parameters' in widths.verdict(found)
    slow = widths.extrapolate({'16': 10.0, '32': 40.0})
    assert slow['widest'] is None
    assert widths.verdict(slow).startswith('No width')


@pytest.mark.slow
def test_plan_runs_and_table_of_a_tiny_task(tmp_path, monkeypatch):
    task = dataclasses.replace(TINY, checked=False)
    monkeypatch.setitem(TASKS, 'tiny', task)
    made = program.make_plan(tmp_path, {'tiny': task})
    speeds = (tmp_path / 'speeds.jsonl').read_text()
    program.make_plan(tmp_path, {'tiny': task})
    assert (tmp_path / 'speeds.jsonl').read_text() == speeds
    assert made['tasks']['tiny']['parameters'] > 0

    start = lambda index, count: program.run(
        tmp_path,
        tmp_path / 'runs',
        {'tiny': task},
        tuple(task.entries),
        Shard(index, count),
    )
    start(0, 2)
    first = len(Ledger(tmp_path / 'runs.jsonl'))
    start(1, 2)
    ledger = Ledger(tmp_path / 'runs.jsonl')
    assert 0 < first < len(ledger) == 2 + 2 + 1
    text = (tmp_path / 'runs.jsonl').read_text()
    start(0, 1)
    assert (tmp_path / 'runs.jsonl').read_text() == text

    lines = protocol.lines(ledger, Unit('tiny', task, 'sam'))
    assert len(lines) == 2
    for line in lines:
        # What was read from the checkpoint is the network of the last step.
        eight = line['rounded']['8']['test']['loss']
        assert eight == pytest.approx(line['last']['test']['loss'], rel=0.05)
        assert line['last']['test']['loss'] == line['test']['loss']
        assert line['last']['epoch'] == 4
        assert 0 <= line['last']['test']['calibration_error'] <= 1
        assert (
            line['best']['validation']['accuracy']
            >= (line['last']['validation']['accuracy'])
        )
        # A fifth of the labels is wrong, and four epochs do not suffice for these.
        assert line['fitted']['accuracy'] < 0.9

    table = report.write(tmp_path).read_text()
    assert f'| {METHODS["sam"].title} | 2 | 4 |' in table
    assert 'SGD, equal time | 1 |' in table
    assert '†' in table
    rows = {
        unit.entry: (unit, protocol.lines(ledger, unit))
        for unit in plan.units(made, {'tiny': task}, task.entries)
    }
    unit, lines = rows['sam']
    fewer = {**rows, 'sam': (unit, lines[:1])}
    _, cells = report.of_images(fewer, {'sgd': 1.0, 'sam': 2.0})
    assert [row[1] for row in cells] == ['2', '1 of 2', '1']
    equal = rows['sgd_equal'][0].epochs
    header, cells = report.of_text(rows, {'sgd': 1.0, 'sam': 2.0})
    assert [row[3] for row in cells] == ['1.00', '2.00', f'{equal / 4:.2f}']
    assert {len(row) for row in cells} == {len(header)}
    assert len(cells) == 3
    assert json.loads((tmp_path / plans.PLAN).read_text())['limit_hours'] == 10
