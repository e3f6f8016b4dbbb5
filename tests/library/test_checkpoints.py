"""A run that is saved, killed and resumed is the run that was not stopped."""

import functools
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import vsam_jax
from tests import problems, processes
from tests.library import resuming_run
from tests.library.resuming_run import CONFIG, SETTINGS, optimizer, plain_state
from vsam_jax import checkpoint
from vsam_jax._state import only_state

pytestmark = pytest.mark.around

# Warm-up is over after 7 steps; 9 is the middle of the window from 7 to 10.
SAVE_AT, STEPS = 9, 17


class Network(nn.Module):
    """What has more to store than parameters: BatchNorm and dropout."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=False)(nn.tanh(nn.Dense(8)(x)))
        return nn.Dense(3)(nn.Dropout(0.2, deterministic=False)(x))


NETWORK = Network()


def flax_loss(params: Any, batch_stats: Any, batch: Any, key: Any) -> Any:
    logits, updated = NETWORK.apply(
        {'params': params, 'batch_stats': batch_stats},
        batch[0],
        rngs={'dropout': key},
        mutable=['batch_stats'],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return losses.mean(), (updated['batch_stats'], None)


def flax_state(tx: Any) -> vsam_jax.linen.TrainState:
    keys = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
    variables = jax.jit(NETWORK.init)(keys, jnp.zeros((2, 6)))
    return vsam_jax.linen.TrainState.create(
        apply_fn=NETWORK.apply, **variables, tx=tx, dropout_key=jax.random.key(2)
    )


def assert_same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# Plain and traced, every method: test_every_method.
@pytest.mark.parametrize(
    ('kind', 'planned'), [('plain', True), ('flax', True), ('flax', False)]
)
def test_a_run_resumed_within_a_window_continues_bit_for_bit(tmp_path, kind, planned):
    # One and the same transformation: it is part of the structure of a TrainState.
    tx = optimizer()
    new_state = functools.partial(plain_state if kind == 'plain' else flax_state, tx)
    if kind == 'plain':
        train_step = problems.make_step(tx)
    else:
        train_step = vsam_jax.linen.make_train_step(flax_loss)
    if planned:
        step = vsam_jax.PlannedStep(train_step)
    else:
        step = jax.jit(train_step, donate_argnums=0)
    batches = problems.mlp_batches(STEPS)

    state = new_state()
    with ocp.CheckpointManager(tmp_path) as manager:
        for i, batch in enumerate(batches):
            if i == SAVE_AT:
                assert 0 < only_state(state).position < 3
                # In the background, while the next steps take over the buffers.
                checkpoint.save(manager, i, state, config=CONFIG)
            state, _ = step(state, batch)
    assert only_state(state).num_samples > 7

    with ocp.CheckpointManager(tmp_path) as manager:
        resumed = checkpoint.restore(manager, new_state(), config=CONFIG)
    for batch in batches[SAVE_AT:]:
        resumed, _ = step(resumed, batch)
    assert_same_bits(resumed, state)


def test_a_state_is_restored_onto_other_shardings(tmp_path):
    state = plain_state(optimizer())
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(
            p.shape,
            p.dtype,
            sharding=NamedSharding(mesh, P('data') if p.shape[0] == 8 else P()),
        ),
        state[0],
    )
    shardings = vsam_jax.sharding.state_shardings(state, params)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings,
    )
    with ocp.CheckpointManager(tmp_path) as manager:
        checkpoint.save(manager, 0, state, config={})
        manager.wait_until_finished()
        restored = checkpoint.restore(manager, like, config={})
    assert jax.tree.map(lambda x: x.sharding, restored) == shardings
    assert not only_state(restored).psf[2].sharding.is_fully_replicated
    assert_same_bits(restored, state)


# --- Another configuration ----------------------------------------------------


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A manager with one checkpoint, of step 5."""
    with ocp.CheckpointManager(tmp_path_factory.mktemp('saved')) as manager:
        checkpoint.save(manager, 5, plain_state(optimizer()), config=CONFIG)
        manager.wait_until_finished()
        yield manager


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'seed': 4}, "config['vsam']['seed'] is 3 in the checkpoint, 4 in this run"),
        ({'rho': 0.2}, "config['vsam']['rho'] is 0.1 in the checkpoint, 0.2 in this"),
        ({'decay': 0.5}, "config['vsam']['decay'] is in this run alone"),
        ({'window': 8}, "config['vsam']['window'] is 4 in the checkpoint, 8 in this"),
        ({'window': 8}, "state[1][0].plan is 'bool[4]' in the checkpoint, 'bool[8]' i"),
        (
            {'psf_dtype': jnp.bfloat16},
            "state[1][0].psf[0] is 'float32[6,8]' in the checkpoint, 'bfloat16[6,8]' i",
        ),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(saved, changes, message):
    config = CONFIG | {'vsam': SETTINGS | changes}
    with pytest.raises(ValueError, match='belongs to another configuration') as error:
        checkpoint.restore(saved, plain_state(optimizer(**changes)), config=config)
    assert message in str(error.value)
    assert 'step 5' in str(error.value)
    assert str(saved.directory) in str(error.value)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'dtype': jnp.float16},
            "state[0][0] is 'float32[6,8]' in the checkpoint, 'fl",
        ),
        ({'hidden': 4}, "state[0][1] is 'float32[8]' in the checkpoint, 'float32[4]' "),
    ],
)
def test_a_checkpoint_of_other_parameters_is_refused(saved, options, message):
    with pytest.raises(ValueError, match='belongs to another configuration') as error:
        checkpoint.restore(saved, plain_state(optimizer(), **options), config=CONFIG)
    assert message in str(error.value)


def test_a_checkpoint_of_another_tree_is_refused(saved):
    params, opt_state = plain_state(optimizer())
    with pytest.raises(ValueError, match='belongs to another configuration') as error:
        checkpoint.restore(saved, (params[:-1], opt_state, jnp.ones(2)), config=CONFIG)
    assert 'state[0][5] is in the checkpoint alone' in str(error.value)
    assert 'state[2] is in this run alone' in str(error.value)


def test_the_same_settings_in_other_python_types_are_accepted(saved):
    config = {
        'learning_rate': np.float64(0.1),
        'vsam': dict(reversed(SETTINGS.items())),
    }
    state = plain_state(optimizer())
    assert_same_bits(checkpoint.restore(saved, state, config=config), state)


def test_settings_in_lists_are_compared_one_by_one():
    same = checkpoint._differences('x', [1.0, float('nan')], [1.0, float('nan')])
    assert same == []
    changed = checkpoint._differences('x', [1.0, {'a': 2}], [1.0, {'a': 3}])
    assert changed == ["x[1]['a'] is 2 in the checkpoint, 3 in this run"]


def test_dtypes_in_a_configuration_are_their_names():
    for dtype in (jnp.float32, np.float32, np.dtype('float32')):
        assert checkpoint._plain('dtype', dtype) == 'float32'
    assert checkpoint._plain('dtype', jnp.bfloat16) == 'bfloat16'
    assert checkpoint._plain('dtype', bool) == 'bool'


def test_a_missing_checkpoint_is_named(saved, tmp_path):
    state = plain_state(optimizer())
    with pytest.raises(FileNotFoundError, match=r'no complete .* step 4; .* \[5\]'):
        checkpoint.restore(saved, state, config=CONFIG, step=4)
    with (
        ocp.CheckpointManager(tmp_path) as manager,
        pytest.raises(FileNotFoundError, match='no complete checkpoint'),
    ):
        checkpoint.restore(manager, state, config=CONFIG)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'vsam': {'rho': optax.constant_schedule(0.1)}}, r"config\['vsam'\]\['rho'\]"),
        ({'masks': [True, {1, 2}]}, r"config\['masks'\]\[1\] must be .* got \{1, 2\}"),
        ('vsam', "config must be a mapping, got 'vsam'"),
        ({'model': nn.Dense}, r"config\['model'\] must be .* got <class .*Dense"),
        ({'model': nn.Dense(2, dtype=jnp.float32)}, r"config\['model'\] must be "),
    ],
)
def test_a_configuration_that_cannot_be_compared_is_refused(saved, config, message):
    with pytest.raises(TypeError, match=message):
        checkpoint.save(saved, 6, plain_state(optimizer()), config=config)


def test_settings_include_the_defaults():
    method = functools.partial(
        functools.partial(vsam_jax.vsam, window=8), 0.2, psf_dtype=jnp.bfloat16
    )
    settings = checkpoint.settings_of(method)
    assert settings['method'] == 'vsam'
    assert settings['rho'] == 0.2
    assert (settings['window'], settings['decay']) == (8, 0.7)
    with pytest.raises(TypeError, match=r"argument: 'learning_rate'"):
        checkpoint.settings_of(optax.adam)


# --- Killed -------------------------------------------------------------------


def worker(folder: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, '-m', 'tests.library.resuming_run', str(folder)],
        cwd=processes.ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_while_saving(folder: pathlib.Path) -> int | None:
    """Starts a run, kills it once step 8 is being saved; what is complete then."""
    steps = folder / 'steps'
    process = worker(folder)
    # The second checkpoint, of step 8, under its final name or a temporary one.
    while not list(steps.glob('8*')):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    with ocp.CheckpointManager(steps) as manager:
        return manager.latest_step()


@pytest.mark.subprocess
def test_a_run_killed_while_saving_resumes_from_the_last_complete_checkpoint(tmp_path):
    # On a busy machine the kill may come after the checkpoint is complete.
    for attempt in range(5):
        killed = tmp_path / f'killed_{attempt}'
        complete = kill_while_saving(killed)
        if complete != 8:
            break
    assert complete == 4

    process = worker(killed)
    uninterrupted = tmp_path / 'uninterrupted'
    resuming_run.main(str(uninterrupted))  # In this process.
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    resumed, reference = (
        json.loads((folder / 'result.json').read_text())
        for folder in (killed, uninterrupted)
    )
    assert (reference['first_step'], resumed['first_step']) == (0, 4)
    assert resumed['bits'] == reference['bits']


def test_the_latest_checkpoint_is_restored_unless_a_step_is_named(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in (3, 12):
            checkpoint.save(manager, step, {'w': jnp.array(step)}, config={})
        manager.wait_until_finished()
        restore = functools.partial(
            checkpoint.restore, manager, {'w': jnp.array(0)}, config={}
        )
        assert int(restore()['w']) == 12
        assert int(restore(step=3)['w']) == 3


def test_options_of_the_manager_reach_it(tmp_path):
    options = ocp.CheckpointManagerOptions(save_interval_steps=10)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        save = functools.partial(checkpoint.save, manager, config={})
        assert save(0, {'w': jnp.ones(2)}) is True
        assert save(3, {'w': jnp.ones(2)}) is False
        assert save(3, {'w': jnp.ones(2)}, force=True) is True
        manager.wait_until_finished()
        assert list(manager.all_steps()) == [0, 3]


def test_lists_of_other_lengths_differ_as_a_whole():
    changed = checkpoint._differences('x', [1, 2], [1])
    assert changed == ['x is [1, 2] in the checkpoint, [1] in this run']


def test_settings_of_every_kind_come_back_as_the_same(tmp_path):
    config = {
        'rates': {0: 0.1, 100: 0.01},
        'betas': (0.9, 0.99),
        'seed': np.int64(3),
        'rho': jnp.float32(0.5),
        'mask': np.array([True, False]),
    }
    state = {'w': jnp.ones(2)}
    with ocp.CheckpointManager(tmp_path) as manager:
        checkpoint.save(manager, 0, state, config=config)
        manager.wait_until_finished()
        problems.assert_equal(checkpoint.restore(manager, state, config=config), state)


def test_of_many_differences_the_first_are_listed_and_the_rest_counted(tmp_path):
    state = {'w': jnp.ones(2)}
    with ocp.CheckpointManager(tmp_path) as manager:
        checkpoint.save(manager, 0, state, config={str(i): 0 for i in range(10)})
        manager.wait_until_finished()
        with pytest.raises(ValueError, match='another configuration') as error:
            checkpoint.restore(manager, state, config={str(i): 1 for i in range(10)})
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 9
    assert lines[-1].strip() == 'and 2 more'


@pytest.mark.parametrize(
    ('value', 'error', 'message'),
    [
        (jax.random.key(0), TypeError, 'must be a JSON value'),
        (np.complex64(1), TypeError, 'must be a JSON value'),
        (np.datetime64('2024-01-01'), TypeError, 'must be a JSON value'),
        ({1: 2, '1': 3}, ValueError, 'must have keys that differ'),
    ],
)
def test_settings_that_cannot_be_stored_are_refused_at_once(
    value, error, message, tmp_path
):
    with ocp.CheckpointManager(tmp_path) as manager:
        with pytest.raises(error, match=rf"config\['a'\] {message}"):
            checkpoint.save(manager, 0, {'w': jnp.ones(2)}, config={'a': value})
        assert not manager.all_steps()


def test_a_checkpoint_of_others_is_named_as_one(tmp_path):
    state = {'w': jnp.ones(2)}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(state))  # pyright: ignore
        manager.wait_until_finished()
    with (
        ocp.CheckpointManager(tmp_path) as manager,
        pytest.raises(
            ValueError, match=r'step 0 in .*\.checkpoint\.save wrote, but has'
        ),
    ):
        checkpoint.restore(manager, state, config={})
