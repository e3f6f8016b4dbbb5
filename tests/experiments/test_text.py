"""Bytes of text as examples: where they come from, what is learnt of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import configuration
from experiments.configs import right_labels
from experiments.data import sources, text
from experiments.models import zoo
from experiments.training.loop import train


def test_windows_are_of_different_files_and_follow_each_other():
    sizes = {'train': 8, 'validation': 4, 'test': 4}
    found = text.standard_library(sizes, length=32)
    assert {name: rows.shape for name, rows in found.items()} == {
        'train': (8, 33),
        'validation': (4, 33),
        'test': (4, 33),
    }
    rows = found['train']
    np.testing.assert_array_equal(rows[:-1, -1], rows[1:, 0])
    again = text.standard_library(sizes, length=32)
    np.testing.assert_array_equal(again['test'], found['test'])
    other = text.standard_library(sizes, length=32, split_seed=1)
    assert not np.array_equal(other['test'], found['test'])
    assert len({rows.tobytes() for rows in found.values()}) == 3


@pytest.mark.parametrize(
    ('sizes', 'length', 'message'),
    [
        ({'train': 1}, 0, 'length must be'),
        ({'validation': 10**9}, 32, 'validation must be an integer in'),
        ({'test': -1}, 32, 'test must be an integer in'),
    ],
)
def test_windows_that_there_are_not_are_refused(sizes, length, message):
    with pytest.raises(ValueError, match=message):
        text.standard_library(sizes, length)


def test_the_label_of_a_byte_is_the_next_one():
    dataset = sources.python_sources(train=4, validation=2, test=2, length=16)
    images, labels = dataset.train.images, dataset.train.labels
    assert (images.shape, labels.shape) == ((4, 1, 16, 1), (4, 16))
    np.testing.assert_array_equal(images[:, 0, 1:, 0], labels[:, :-1])
    assert dataset.with_label_noise(0, seed=0) is dataset
    with pytest.raises(ValueError, match='label_noise must be 0'):
        dataset.with_label_noise(0.5, seed=0)


@pytest.mark.slow
def test_a_byte_is_told_from_those_before_it_alone():
    model = zoo.create('decoder', {'width': 8, 'depth': 2}, num_classes=256)
    x = jax.random.randint(jax.random.key(0), (2, 1, 6, 1), 0, 256).astype(float)
    variables = model.init(jax.random.key(1), x, train=True)
    logits = model.apply(variables, x, train=False)
    assert logits.shape == (2, 6, 256)
    changed = model.apply(variables, x.at[:, :, 3].set(7.0), train=False)
    same = jnp.isclose(logits, changed, atol=1e-6).all((0, 2))
    np.testing.assert_array_equal(same, [True, True, True, False, False, False])
    with pytest.raises(configuration.ConfigError, match='multiple of heads'):
        zoo.create('decoder', {'width': 7}, num_classes=256)


@pytest.mark.slow
def test_a_run_on_text_reports_means_over_bytes(tmp_path):
    config = configuration.with_values(
        right_labels.get_config('bytes_256'),
        {
            'data.train': 16,
            'data.validation': 4,
            'data.test': 4,
            'data.length': 16,
            'batch_size': 8,
            'epochs': 2,
            'eval_every': 2,
            'models.decoder.width': 8,
            'models.decoder.depth': 1,
            'method': 'sam',
            'methods.sam.rho': 0.05,
        },
    )
    last = train(config, tmp_path)['log'][-1]
    # Hardly trained, it knows nothing: log 256 a byte.
    assert last['test_loss'] == pytest.approx(np.log(256), abs=0.5)
    assert 0 <= last['test_accuracy'] < 0.5


@pytest.mark.parametrize('name', list(right_labels.TASKS))
def test_every_task_has_right_labels(name):
    config = right_labels.get_config(name)
    configuration.check(config)
    assert config.label_noise == 0


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"task must be one of vit_192, .*; got 'no'"):
        right_labels.get_config('no')
