"""What is gathered for an accelerator, and the order in which it is worked off."""

import json
import time

import numpy as np
import pytest

from experiments.benchmark import jax_steps, problems, rounds, variants
from experiments.common.configuration import ConfigError
from experiments.common.ledger import Ledger
from experiments.data import prepared
from experiments.studies.proof import gpu, gpu_report, pack
from experiments.studies.proof.tasks import TASKS
from vsam_jax._state import only_state


def test_what_is_there_is_not_gathered():
    names = {line.split('==')[0].split('>=')[0] for line in pack.lacking()}
    assert {'ml-collections', 'matplotlib'} <= names
    assert 'kiwisolver' in names  # Matplotlib needs it, the project does not say so.
    assert not names & {'jax', 'flax', 'numpy', 'scikit-learn', 'vsam-jax', 'scipy'}


def test_images_are_packed_and_read_again(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    made = {
        name: prepared.Images(
            rng.integers(0, 256, (size, 32, 32, 3), np.uint8),
            rng.integers(0, 100, size).astype(np.int32),
            100,
            name,
        )
        for name, size in (('train', 50), ('test', 10))
    }
    monkeypatch.setattr(prepared, 'read', lambda dataset, split: made[split])
    paths = pack.gather_images(tmp_path)
    assert [np.load(path)['images'].shape[0] for path in paths] == [20, 20, 20]
    monkeypatch.undo()
    cache = pack.unpack_images(tmp_path)
    for name, content in made.items():
        read = prepared.read('cifar100', name, cache_dir=cache, num_classes=100)
        np.testing.assert_array_equal(read.images, content.images)
        np.testing.assert_array_equal(read.labels, content.labels)
    paths[1].unlink()
    assert pack.unpack_images(tmp_path) == cache  # They are there.
    prepared.cache_file(cache, 'cifar100', 'test').unlink()
    with pytest.raises(ConfigError, match=r'images_1\.npz'):
        pack.unpack_images(tmp_path)
    monkeypatch.setattr(prepared, 'read', lambda dataset, split: made[split])
    monkeypatch.setattr(pack, '_LARGEST', 1000)
    with pytest.raises(ConfigError, match='smaller than 1,000 bytes'):
        pack.gather_images(tmp_path)


def test_items_are_made_in_order_until_the_time_is_over(tmp_path):
    ledger = Ledger(tmp_path / 'gpu.jsonl')
    called = []

    def item(key, action=lambda: None):
        def make():
            called.append(key)
            action()
            ledger.add(key, {'kind': 'none'})

        return gpu.Item(key, make)

    def fail():
        if called.count('bad') == 1:
            raise RuntimeError('out of memory')

    slow = lambda: called.count('slow') == 1 and time.sleep(60)
    items = [item('first'), item('bad', fail), item('slow', slow), item('last')]
    assert gpu.work(items, ledger, 0.5) == ['bad', 'slow', 'last']
    assert 'out of memory' in ledger['bad']['error']
    assert called == ['first', 'bad', 'slow']
    assert gpu.work(items, Ledger(tmp_path / 'gpu.jsonl'), 60) != []
    assert called == ['first', 'bad', 'slow', 'bad', 'slow', 'last']
    ledger.reload()
    assert gpu.work(items, ledger, 60) == []
    assert len(called) == 6


def test_the_most_important_comes_first(tmp_path):
    ledger = Ledger(tmp_path / 'gpu.jsonl')
    keys = [item.key for item in gpu.items_of(tmp_path, tmp_path, ledger, tiny=True)]
    assert len(set(keys)) == len(keys) == 4 + 3 * 4 + 4
    assert keys[0] == 'steps/resnet18_128'
    assert keys.index('runs/winner/seed700') < keys.index('runs/sgd/seed701')
    for names in gpu.STEPS.values():
        assert names[0] == variants.BASE
        assert set(names) <= set(variants.ALL)


def test_the_smallest_slice_that_pays():
    def rows(*milliseconds):
        titles = (variants.SAM, *variants.SLICES.values())
        pairs = zip(titles, milliseconds, strict=True)
        return {title: {'step_milliseconds': value} for title, value in pairs}

    assert gpu_report.smallest_that_pays(rows(10, 8, 7, 6.5)) == 1 / 8
    assert gpu_report.smallest_that_pays(rows(10, 8, 7.9, 7.9)) == 1 / 2
    assert gpu_report.smallest_that_pays(rows(10, 12, 7, 6.9)) == 1 / 4
    assert gpu_report.smallest_that_pays(rows(10, 12, 11, 9.9)) == 1
    assert gpu_report.smallest_that_pays({}) is None


def test_runs_are_those_of_the_task_with_bfloat16(tmp_path):
    task = TASKS['resnet18']
    config = gpu.config_of_runs(task, tmp_path, tiny=True)
    assert config.models.resnet18.dtype == 'bfloat16'
    job = gpu.run_of(task, config, 'winner', 700)
    assert job.notes['rho'] == job.config.methods[job.config.method].rho > 0
    assert gpu.run_of(task, config, 'sgd', 700).notes['rho'] == 0
    result = {'accuracy': 0.5, 'loss': 1.0, 'calibration_error': 0.25}
    line = {**job.notes, 'fitted': {'accuracy': 0.75}}
    line |= {'last': {'test': result}, 'best': {'test': result}}
    text = gpu_report.of_runs([line])
    assert (
        'lean SAM, 1/4, every 3rd step | 0.1 | 1 | 50.0 | 50.0 | 1.000 | 25.0 | 75.0 |'
        in text
    )


@pytest.mark.slow
def test_steps_with_slices_and_their_line(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, '_SECONDS', 0)
    ledger = Ledger(tmp_path / 'gpu.jsonl')
    names = (
        variants.BASE,
        variants.SAM,
        *variants.SLICES.values(),
        variants.LEAN[1 / 8],
    )
    gpu.time_steps(problems.PROBLEMS['tiny'](), names, 'steps/tiny', ledger, 1)
    line = json.loads((tmp_path / 'gpu.jsonl').read_text())
    assert list(line['steps'])[1:6] == list(names[1:])
    assert gpu_report.smallest_that_pays(line['steps']) in (1, *variants.SHARES)
    # Operations are known of whole mini-batches alone.
    assert line['steps'][variants.SAM]['flops'] > line['steps']['SGD']['flops']
    assert line['steps'][variants.SLICES[1 / 2]]['flops'] is None
    ledger.add('runs/sam/seed700', {'error': 'OutOfMemory'})
    text = gpu_report.of_steps(ledger)
    assert variants.SLICES[1 / 8] in text
    assert 'still saves time is 1/' in text or 'no sampled step with a slice' in text
    assert '- runs/sam/seed700: OutOfMemory' in gpu_report.of_runs(ledger)


def test_second_gradients_are_of_a_slice():
    problem = problems.PROBLEMS['tiny']()
    names = (variants.LEAN[1 / 8], variants.SLICES[1 / 2], variants.SLICES[1 / 8])
    runners = jax_steps.runners(problem, (variants.BASE, *names))
    lean = runners[variants.LEAN[1 / 8]]
    lean.run(2)
    state = only_state(lean._session.state)
    assert (int(state.step), int(state.num_samples)) == (6, 2)
    half, eighth = (
        runners[name]._calls[0].executable.cost_analysis()['flops']
        for name in names[1:]
    )
    assert eighth < half
