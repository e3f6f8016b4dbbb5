"""The trainer on several devices and in several processes."""

import contextlib
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from experiments.common import configuration, progress
from experiments.common.devices import Devices
from experiments.configs import digits
from experiments.data import sources
from experiments.training import checkpoints, run_files, run_log
from experiments.training.experiment import Experiment, build
from experiments.training.loop import train
from tests import problems
from tests.processes import ROOT, free_port

# No number of examples is a multiple of the number of devices, and ESAM's second
# gradient is of 18 of them.
SETTINGS = {
    'data.train': 130,
    'data.validation': 21,
    'data.test': 530,
    'augmentation.padding': 1,
    'augmentation.flip': True,
    'augmentation.cutout': 3,
    'label_noise': 0.2,
    'model': 'mlp',
    'models.mlp.width': 8,
    'models.mlp.depth': 1,
    'batch_size': 40,
    'epochs': 4,
    'checkpoint_every': 2,
    'optimizer.learning_rate': 0.05,
    'methods.vsam.window': 4,
    'methods.vsam.segments': 2,
    'methods.vsam.warmup_steps': 3,
    'methods.esam.gamma': 0.45,
    'methods.saf.lag': 1,
    'methods.saf.start': 1,
}
STEPS = 12


def config_of(method: str) -> ml_collections.ConfigDict:
    return configuration.with_values(
        digits.get_config(), {**SETTINGS, 'method': method}
    )


@functools.cache
def programs(method: str, num_devices: int) -> Experiment:
    return build(config_of(method), num_devices=num_devices)


def run(
    path: pathlib.Path,
    method: str,
    num_devices: int,
    bar: progress.Bar | None = None,
) -> list[dict[str, Any]]:
    """Trains, and returns the log, without times, and the trace of it."""
    result = train(
        config_of(method),
        path,
        experiment=programs(method, num_devices),
        bar=bar or progress.Bar(),
    )
    assert result['num_devices'] == num_devices
    return numbers_of(path)


def numbers_of(path: pathlib.Path) -> list[dict[str, Any]]:
    lines = run_log.read_lines(path / run_log.LOG)
    lines += run_log.read_lines(path / run_log.TRACE)
    times = ('seconds', 'images_per_second')
    return [
        {name: value for name, value in line.items() if name not in times}
        for line in lines
    ]


def assert_same_to_rounding(
    lines: list[dict[str, Any]], others: list[dict[str, Any]]
) -> None:
    assert len(lines) == len(others)
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            np.testing.assert_allclose(
                np.array(value, float),
                np.array(other[name], float),
                rtol=1e-4,
                atol=1e-5,
                err_msg=name,
            )


# --- Data ---------------------------------------------------------------------


def test_each_device_holds_its_share_of_the_images_and_no_more():
    devices = Devices.first(4)
    settings = {'name': 'synthetic', 'train': 30, 'validation': 3, 'test': 8, 'size': 4}
    there, whole = sources.load(settings, devices), sources.load(settings)
    for name, length in (('train', 8), ('validation', 1), ('test', 2)):
        split, expected = getattr(there, name), getattr(whole, name)
        assert split.size == expected.size
        shards = sorted(split.images.addressable_shards, key=lambda s: s.device.id)
        assert [shard.device for shard in shards] == list(devices.mesh.devices)
        assert {shard.data.shape for shard in shards} == {(length, 4, 4, 3)}
        content = np.concatenate([shard.data for shard in shards])
        assert content.dtype == np.uint8
        np.testing.assert_array_equal(content[: split.size], expected.images)
        np.testing.assert_array_equal(split.labels, expected.labels)
    assert there.on(devices) is there
    noisy = there.with_label_noise(0.5, seed=1).train
    assert noisy.images is there.train.images
    assert np.sum(np.asarray(noisy.labels) != whole.train.labels) == 15
    assert noisy.labels.sharding == devices.whole
    np.testing.assert_array_equal(
        noisy.labels, whole.with_label_noise(0.5, seed=1).train.labels
    )


def test_devices_find_examples_wherever_they_are_and_move_no_others():
    devices = Devices.first(8)
    images = np.random.default_rng(0).integers(0, 256, (61, 3, 2), np.uint8)
    rows = jnp.array([60, 0, 7, 7, 8, 59, 60, 31, *range(40, 48)])
    shared = devices.share(images)
    take = jax.jit(devices.take)
    taken = take(shared, rows)
    np.testing.assert_array_equal(taken, images[rows])
    assert taken.sharding == devices.split
    text = take.lower(shared, rows).compile().as_text()
    moved = re.findall(r'= (\S+) (all-\S+|reduce-scatter|collective-\S+)\(', text)
    assert [(kind, way) for kind, way in moved if way != 'reduce-scatter'] == []
    assert [kind.split('{')[0] for kind, _ in moved] == ['u8[2,3,2]']


# --- Training -----------------------------------------------------------------


# Of vSAM the next test says it too.
@pytest.mark.parametrize('method', problems.slow_but(['esam'], ['vsam', 'esam', 'saf']))
def test_a_run_is_the_same_on_one_device_and_on_four(method, tmp_path):
    one, four = (run(tmp_path / str(n), method, n) for n in (1, 4))
    assert_same_to_rounding(one, four)


class _Interrupt(progress.Bar):
    """A bar that stops the run, as a signal would, before its last step."""

    def advance(self, steps: int = 1) -> None:
        super().advance(steps)
        if self.done == STEPS - 1:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_on_any_number_of_devices(tmp_path):
    whole = run(tmp_path / 'whole', 'vsam', 4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / 'four', 'vsam', 4, _Interrupt())
    shutil.copytree(tmp_path / 'four', tmp_path / 'one')
    bar = progress.Bar()
    assert run(tmp_path / 'four', 'vsam', 4, bar) == whole
    assert bar.done == STEPS
    assert_same_to_rounding(run(tmp_path / 'one', 'vsam', 1), whole)


def test_the_second_gradient_of_esam_is_computed_by_all_devices():
    runs = programs('esam', 4)
    state = runs.init(0)
    batch = runs.batches.take(runs.batches.dataset.train, runs.batches.epoch(0, 0), 0)
    text = runs.step.function.lower(state, batch).compile().as_text()
    # ⌈18 / 4⌉ examples each, 8 units; as many as that go through a whole device
    # nowhere.
    assert re.search(r'f32\[5,8\]', text)
    assert not re.search(r'f32\[18,8\]', text)


@pytest.mark.parametrize(
    ('num_devices', 'values', 'message'),
    [
        (3, {}, r'batch_size must be a multiple of the number of devices, 3, got 40'),
        (
            8,
            {'data.train': 4, 'batch_size': 4},
            r'batch_size must be a multiple of the number of devices, 8, got 4',
        ),
        (9, {}, r'num_devices must be in \[0, 8\], since .* got 9'),
        (-1, {}, r'num_devices must be in \[0, 8\], since .* got -1'),
    ],
)
def test_devices_that_cannot_share_a_mini_batch_are_refused(
    num_devices, values, message, tmp_path
):
    config = configuration.with_values(config_of('sgd'), values)
    with pytest.raises(configuration.ConfigError, match=message):
        train(config, tmp_path, num_devices=num_devices, bar=progress.Bar())


# --- Several processes --------------------------------------------------------


@contextlib.contextmanager
def processes(
    path: pathlib.Path, count: int, **values: Any
) -> Iterator[list[subprocess.Popen]]:
    """The processes of a run in ``path``, two devices in all; they end with it."""
    settings = {**SETTINGS, 'method': 'vsam', 'epochs': 16, 'eval_every': 1, **values}
    flags = ['--config=experiments/configs/digits.py', f'--workdir={path}']
    flags += [f'--config.{name}={value}' for name, value in settings.items()]
    if count > 1:
        flags += [
            f'--coordinator=127.0.0.1:{free_port()}',
            f'--num_processes={count}',
        ]
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(count):
            own = [f'--process_id={number}'] if count > 1 else []
            log = (path.parent / f'{path.name}-{number}.txt').open('w')
            process = subprocess.Popen(
                [sys.executable, '-m', 'experiments.train', *flags, *own],
                cwd=ROOT,
                env={**os.environ, 'JAX_NUM_CPU_DEVICES': str(2 // count)},
                stdout=stack.enter_context(log),
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        yield started


def outputs(path: pathlib.Path) -> list[str]:
    return [(path.parent / f'{path.name}-{n}.txt').read_text() for n in range(2)]


@pytest.mark.slow
@pytest.mark.subprocess
def test_two_processes_that_were_killed_end_as_one_with_as_many_devices(tmp_path):
    path = tmp_path / 'two'
    with processes(tmp_path / 'one', count=1) as (process,):
        assert process.wait(timeout=600) == 0
    with processes(path, count=2) as started:
        while len(run_log.read_lines(path / run_log.LOG)) < 6:
            assert all(process.poll() is None for process in started), outputs(path)
            time.sleep(0.01)
    assert not (path / run_files.RESULT).exists()
    assert any((path / checkpoints.CHECKPOINTS).iterdir())
    with processes(path, count=2) as started:
        for process in started:
            assert process.wait(timeout=600) == 0, outputs(path)
    assert numbers_of(path) == numbers_of(tmp_path / 'one')
    # One of them alone says and writes what came out.
    assert ['written to' in text for text in outputs(path)] == [True, False]
    assert len(list((path / run_log.TENSORBOARD).iterdir())) == 1
    # What is wrong both of them say, and neither waits for the other.
    with processes(path, count=2, epochs=17) as started:
        for process in started:
            assert process.wait(timeout=600) != 0
    assert all('config.epochs is 16 there and 17' in text for text in outputs(path))
