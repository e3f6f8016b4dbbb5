"""What happens to who uses the trainer wrongly: a clear message, and nothing lost."""

import copy
import functools
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
from typing import Any

import ml_collections
import pytest

from experiments import compare
from experiments.common import configuration, program, progress
from experiments.training import checkpoints, experiment, run_files, run_log
from experiments.training.loop import train
from tests import processes
from tests.experiments.small import tiny_digits


@pytest.fixture(scope='module')
def config() -> ml_collections.ConfigDict:
    """A run of six steps."""
    return tiny_digits(method='sgd', epochs=2)


@pytest.fixture(scope='module')
def settings(config) -> dict[str, Any]:
    return configuration.of_run(config)


def refused(message: str, config: Any, path: Any) -> None:
    with pytest.raises(configuration.ConfigError, match=message):
        train(config, path, bar=progress.Bar())


def test_a_workdir_is_for_one_process_at_a_time(config, settings, tmp_path):
    with run_files.claimed(tmp_path, settings):
        refused('is in use: another process', config, tmp_path)
    # Whatever ends a process gives the workdir back.
    with run_files.claimed(tmp_path, settings):
        pass


def test_an_unfinished_run_with_other_settings_stays_what_it_is(
    config, settings, tmp_path
):
    with run_files.claimed(tmp_path, settings):
        (tmp_path / run_log.LOG).write_text('{"step": 2}\n')
    other = configuration.with_values(config, {'seed': 1})
    refused('config.seed is 0 there and 1 here', other, tmp_path)
    assert (tmp_path / run_log.LOG).read_text() == '{"step": 2}\n'


@pytest.mark.parametrize('name', [run_log.LOG, run_log.TENSORBOARD])
def test_files_of_something_else_are_not_replaced(config, name, tmp_path):
    (tmp_path / name).mkdir()
    refused(f'holds {name} of something else', config, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize('content', ['{"config', '[]', '{"config": 1}', ''])
def test_a_damaged_result_is_named_and_kept(config, content, tmp_path):
    file = tmp_path / run_files.RESULT
    file.write_text(content)
    refused('result.json is no result of a run .*Move it away', config, tmp_path)
    assert file.read_text() == content


def test_damaged_settings_are_named(config, tmp_path):
    (tmp_path / run_files.SETTINGS).write_text('{"na')
    refused('settings.json holds no settings of a run', config, tmp_path)


def test_damaged_times_of_a_comparison_are_named(config, tmp_path):
    (tmp_path / compare.TIMING).write_text('{}')
    with pytest.raises(configuration.ConfigError, match='holds no times of steps'):
        compare.compare(
            config,
            tmp_path,
            methods=('sgd',),
            seeds=(0,),
            timing_rounds=1,
            timing_steps=1,
        )


def test_a_missing_data_set_is_named_and_the_workdir_stays_free(config, tmp_path):
    missing = copy.deepcopy(config)
    missing.data = {'name': 'cifar10', 'data_dir': str(tmp_path / 'data')}
    path = tmp_path / 'run'
    refused('experiments.prepare --dataset=cifar10 --data_dir=.*data', missing, path)
    # So that it can be said again, and right.
    assert list(path.iterdir()) == []


@pytest.fixture(scope='module')
def interrupted(config, tmp_path_factory) -> tuple[Any, Any, pathlib.Path]:
    """A configuration, its programs, and an unfinished run with two checkpoints."""
    config = configuration.with_values(
        config, {'checkpoint_every': 1, 'checkpoint_keep': 2}
    )
    programs = experiment.build(config)
    path = tmp_path_factory.mktemp('interrupted')
    train(config, path, experiment=programs, bar=progress.Bar())
    (path / run_files.RESULT).unlink()
    return config, programs, path


# Where the arrays are damaged the message is the same, but orbax leaves coroutines.
@pytest.mark.parametrize('name', ['configuration/metadata', 'state/_METADATA'])
@pytest.mark.parametrize('keep', [0.0, 0.5])
def test_a_damaged_checkpoint_is_named_and_kept(interrupted, name, keep, tmp_path):
    config, programs, path = interrupted
    run = shutil.copytree(path, tmp_path / 'run')
    last = run / checkpoints.CHECKPOINTS / '6'
    content = (last / name).read_bytes()
    (last / name).unlink()
    if keep:
        (last / name).write_bytes(content[: int(keep * len(content))])
    before = content_of(run)
    go_on = functools.partial(train, config, run, experiment=programs)
    with pytest.raises(
        configuration.ConfigError, match=f'{last} cannot be read(?s:.*)Move it away'
    ):
        go_on(bar=progress.Bar())
    assert content_of(run) == before
    # As the message says: it goes on from the checkpoint of the first epoch.
    shutil.move(last, tmp_path / 'away')
    bar = progress.Bar()
    assert go_on(bar=bar)['steps'] == bar.done == 6
    assert [line['step'] for line in run_log.read_lines(run / run_log.LOG)] == [3, 6]


def content_of(path: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """All files below a directory."""
    return {file: file.read_bytes() for file in path.rglob('*') if file.is_file()}


def test_an_interrupted_program_says_how_to_go_on(capsys):
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        program._guarded(main, ['program'])
    assert ended.value.code == 130
    assert 'The same command goes on' in capsys.readouterr().err


CONFIG = '--config=experiments/configs/digits.py'
WRONG = {
    # No configuration, or none that can be read.
    (): 'flag --config=None: .*\nflag --workdir=None',
    ('--config=no.py', '--workdir=x'): 'must name a configuration file: .*no.py',
    (
        '--config=experiments/configs/digits_tasks.py:no',
        '--workdir=x',
    ): "task must be one of mlp_200, .*; got 'no'",
    # Names and values.
    (CONFIG, '--workdir=x', '--confg=1'): "Unknown command line flag 'confg'",
    (CONFIG, '--workdir=x', '--config.metod=sam'): 'no such field.*\n.*mean "method"',
    (CONFIG, '--workdir=x', '--config.epochs=two'): '--config.epochs=two: invalid',
    (CONFIG, '--workdir=x', '--config.method=sma'): 'must be one of .*; got .sma',
    (CONFIG, '--workdir=x', 'more'): 'unknown arguments: more',
    (CONFIG, '--workdir=/proc/x'): "workdir must be a directory .* got '/proc/x'",
}


@pytest.mark.subprocess
def test_wrong_command_lines_end_with_a_message_alone():
    # One process imports what takes time, and each command line has a child of it.
    ended = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', f'import {__name__} as t; t.try_all()'],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    messages = json.loads(ended.stdout.splitlines()[-1])
    for (arguments, expected), (code, message) in zip(
        [*WRONG.items(), (('--help',), 'Trains one network')], messages, strict=True
    ):
        assert re.search(expected, message), (arguments, message)
        assert 'Traceback' not in message
        assert code == 1
    assert '--config: The configuration file' in messages[-1][1]


def _train(arguments: tuple[str, ...]) -> None:
    """Runs the trainer, and ends this process without what takes time."""
    sys.argv = ['experiments.train', *arguments]
    try:
        runpy.run_module('experiments.train', run_name='__main__', alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        sys.stdout.flush()
        os._exit(1 if ended.code else 0)
    os._exit(0)


def try_all() -> None:
    """Prints the exit code and the message of each wrong command line."""
    found = []
    for arguments in (*WRONG, ('--help',)):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os.close(writing)
            _train(arguments)
        os.close(writing)
        with os.fdopen(reading) as output:
            message = output.read()
        _, status = os.waitpid(child, 0)
        found.append((os.waitstatus_to_exitcode(status), message))
    print(json.dumps(found))
