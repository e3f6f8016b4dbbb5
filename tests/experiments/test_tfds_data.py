"""Data sets of TensorFlow Datasets: what is read, what is kept, what is refused.

The data set in fixtures/tfds was made by fixtures/make_tiny_images.py.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments.common import configuration, files
from experiments.data import examples, prepared, sources
from tests import processes
from tests.experiments.fixtures import make_tiny_images

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
INFO, FEATURES = 'dataset_info.json', 'features.json'
LABELS = 'label.labels.txt'
SHARD = 'tiny_images-train.array_record-00000-of-00001'

tfds = pytest.importorskip('tensorflow_datasets', reason="needs '.[data]'")
pytest.importorskip('array_record', reason="needs '.[data]'")


@pytest.fixture
def data_dir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A data directory with the small data set, to be written to and damaged."""
    return pathlib.Path(shutil.copytree(FIXTURES / 'tfds', tmp_path / 'tfds'))


@pytest.fixture(scope='module')
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The small data set decoded, to be read only."""
    path = tmp_path_factory.mktemp('decoded')
    for split in ('train', 'test'):
        prepared.read('tiny_images', split, data_dir=FIXTURES / 'tfds', cache_dir=path)
    return path


def load(**settings) -> examples.Dataset:
    """The small data set, as a configuration names it."""
    return sources.load({'name': 'tfds', 'dataset': 'tiny_images', **settings})


def refusal(*arguments, **keywords) -> str:
    with pytest.raises(prepared.DataError) as caught:
        prepared.read(*arguments, **keywords)
    return str(caught.value)


# --- What is read -------------------------------------------------------------


@pytest.mark.parametrize('split', ['train', 'test'])
def test_what_the_real_writer_wrote_is_read(split, cache_dir):
    content = prepared.read('tiny_images', split, cache_dir=cache_dir)
    images, labels = make_tiny_images.examples(split)
    # The writer shuffles.
    by_image = lambda images, labels: sorted(
        (image.tobytes(), int(label))
        for image, label in zip(images, labels, strict=True)
    )
    assert content.images.shape == images.shape
    assert by_image(content.images, content.labels) == by_image(images, labels)
    assert content.images.dtype == np.uint8
    assert content.num_classes == len(make_tiny_images.CLASSES)
    assert content.source == f'tiny_images/1.0.0 {split}'


def test_a_split_is_decoded_once_and_then_needs_no_data_set_and_no_packages(
    data_dir, monkeypatch
):
    first = prepared.read('tiny_images', 'train', data_dir=data_dir)
    shutil.rmtree(data_dir / 'tiny_images')
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
    monkeypatch.setenv('TFDS_DATA_DIR', str(data_dir))
    second = prepared.read('tiny_images', 'train')
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert (first.num_classes, first.source) == (second.num_classes, second.source)


def test_versions_have_caches_of_their_own(data_dir, tmp_path):
    for dataset in ('tiny_images', 'tiny_images:1.0.0'):
        prepared.read(dataset, 'test', data_dir=data_dir, cache_dir=tmp_path / 'x')
    assert len(list((tmp_path / 'x').iterdir())) == 2


def test_the_feature_that_holds_the_classes_can_be_named(cache_dir, data_dir, tmp_path):
    default = prepared.read('tiny_images', 'test', cache_dir=cache_dir)
    keywords = {'data_dir': data_dir, 'cache_dir': tmp_path / 'x'}
    named = prepared.read('tiny_images', 'test', label='label', **keywords)
    np.testing.assert_array_equal(default.labels, named.labels)
    # A cache file of its own: what another feature says is not mixed up with it.
    assert [path.name for path in (tmp_path / 'x').iterdir()] == [
        'tiny_images-test-label.npz'
    ]
    with pytest.raises(prepared.DataError, match="label must be one of label; got 'x'"):
        prepared.read('tiny_images', 'test', label='x', **keywords)


def test_a_configuration_names_a_data_set_and_its_parts(cache_dir):
    small = load(cache_dir=str(cache_dir), validation=6, train=5, test=3)
    large = load(cache_dir=str(cache_dir), validation=6)
    assert (small.train.size, small.validation.size, small.test.size) == (5, 6, 3)
    assert (large.train.size, large.validation.size, large.test.size) == (14, 6, 7)
    assert large.num_classes == 3
    assert large.train.images.dtype == np.uint8
    np.testing.assert_array_equal(small.validation.images, large.validation.images)
    content = prepared.read('tiny_images', 'train', cache_dir=cache_dir)
    parts = np.concatenate([large.train.images, large.validation.images])
    assert sorted(map(bytes, parts)) == sorted(map(bytes, content.images))
    other = load(cache_dir=str(cache_dir), validation=6, split_seed=1)
    assert np.any(np.asarray(other.train.images) != np.asarray(large.train.images))


def test_statistics_are_those_of_the_training_images_or_have_a_name(cache_dir):
    measured = load(cache_dir=str(cache_dir), validation=6)
    images = np.asarray(measured.train.images, np.float64)
    np.testing.assert_allclose(measured.mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(measured.std, images.std((0, 1, 2)), rtol=1e-6)
    named = load(cache_dir=str(cache_dir), validation=6, statistics='cifar100')
    np.testing.assert_allclose(named.mean, [129.3, 124.1, 112.4], rtol=1e-6)
    np.testing.assert_allclose(named.std, [68.2, 65.4, 70.4], rtol=1e-6)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (
            {'statistics': 'mnist'},
            r'statistics .* train, cifar10, cifar100; got .mnist',
        ),
        ({'validation': 20}, r'validation \+ train must be at most 20, got 21'),
        ({'test': 8}, r'test must be at most 7, got 8'),
        ({'validation': -1}, r'validation must be an integer >= 0, got -1'),
        ({'cache': 'x'}, r"config.data holds 'cache'.*data_dir, cache_dir"),
        (
            {'num_classes': 4},
            r'tiny_images must have 4 classes, but .*/1.0.0 train in .* has 3',
        ),
    ],
)
def test_settings_that_cannot_be_meant_name_the_section(settings, message, cache_dir):
    with pytest.raises(configuration.ConfigError, match=message):
        load(**{'cache_dir': str(cache_dir), 'validation': 6, **settings})


@pytest.mark.parametrize(('name', 'classes'), [('cifar10', 10), ('cifar100', 100)])
def test_cifar_must_have_its_classes(name, classes, cache_dir, tmp_path):
    for split in ('train', 'test'):
        shutil.copy(
            cache_dir / f'tiny_images-{split}.npz', tmp_path / f'{name}-{split}.npz'
        )
    with pytest.raises(configuration.ConfigError, match=f'must have {classes} classes'):
        sources.load({'name': name, 'cache_dir': str(tmp_path)})


def test_statistics_of_a_channel_are_numpys():
    images = np.random.default_rng(0).integers(0, 256, (2500, 2, 3, 2), dtype=np.uint8)
    images[..., 1] //= 3
    mean, std = sources.channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-12)


# --- What is missing ----------------------------------------------------------


@pytest.mark.parametrize('package', ['tensorflow_datasets', 'array_record.python'])
def test_without_the_packages_the_command_that_installs_them(
    package, data_dir, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal('tiny_images', 'train', data_dir=data_dir)
    assert "pip install '.[data]'" in message


def test_the_extras_that_messages_name_exist():
    pyproject = (processes.ROOT / 'pyproject.toml').read_text()
    assert '\ndata = [' in pyproject
    assert '\nprepare = [' in pyproject


@pytest.mark.parametrize('dataset', ['cifar10', 'cifar100'])
def test_a_data_set_that_is_not_prepared_comes_with_the_command_that_does(
    dataset, tmp_path
):
    message = refusal(dataset, 'train', data_dir=tmp_path)
    assert f'{tmp_path / dataset}' in message
    assert "pip install '.[prepare]'" in message
    command = f'python -m experiments.prepare --dataset={dataset} --data_dir={tmp_path}'
    assert command in message
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_is_one_line(tmp_path):
    message = refusal('no_such_images', 'train', data_dir=tmp_path)
    assert 'no_such_images not found' in message
    assert '\n' not in message


def test_an_unknown_split_lists_those_there_are(data_dir):
    message = refusal('tiny_images', 'validation', data_dir=data_dir)
    assert "train, test; got 'validation'" in message


def test_preparing_without_tensorflow_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    with pytest.raises(prepared.DataError) as caught:
        prepared.prepare('cifar10', tmp_path)
    assert "pip install '.[prepare]'" in str(caught.value)


def test_preparing_without_a_network_says_so(tmp_path, monkeypatch):
    class Unreachable:
        def download_and_prepare(self):
            raise ConnectionError('Name or service not known')

    monkeypatch.setattr(prepared.importlib.util, 'find_spec', lambda name: name)
    monkeypatch.setattr(tfds, 'builder', lambda *_, **__: Unreachable())
    with pytest.raises(prepared.DataError) as caught:
        prepared.prepare('cifar10', tmp_path)
    assert 'Name or service not known' in str(caught.value)
    assert 'needs a network' in str(caught.value)


# --- What is damaged ----------------------------------------------------------


def cut_to(size: int):
    return lambda path: os.truncate(path, size)


def overwrite(text: str):
    return lambda path: path.write_text(text)


def replace(old: str, new: str):
    def harm(path: pathlib.Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return harm


def flip_bytes(start: int):
    def harm(path: pathlib.Path) -> None:
        content = bytearray(path.read_bytes())
        for position in range(start, start + 40):
            content[position] ^= 0xFF
        path.write_bytes(content)

    return harm


PREPARE = 'python -m experiments.prepare --dataset=tiny_images'


@pytest.mark.parametrize(
    ('name', 'harm', 'blamed', 'remedy'),
    [
        (SHARD, pathlib.Path.unlink, SHARD, PREPARE),
        (SHARD, cut_to(0), SHARD, PREPARE),
        (SHARD, cut_to(3000), SHARD, PREPARE),
        (SHARD, cut_to(65536), SHARD, PREPARE),
        (SHARD, flip_bytes(2000), SHARD, PREPARE),
        (SHARD, flip_bytes(4500), SHARD, PREPARE),
        (INFO, pathlib.Path.unlink, INFO, PREPARE),
        (INFO, overwrite('{'), INFO, PREPARE),
        # More examples than there are.
        (INFO, replace('"20"', '"25"'), SHARD, PREPARE),
        (FEATURES, pathlib.Path.unlink, FEATURES, PREPARE),
        (FEATURES, overwrite('{'), FEATURES, PREPARE),
        # Images of another shape.
        (FEATURES, replace('"6"', '"7"'), SHARD, PREPARE),
        # Images of no fixed shape.
        (FEATURES, replace('"6"', '"-1"'), '', 'must hold uint8 images of one shape'),
        # Fewer classes.
        (FEATURES, replace('"numClasses": "3"', '"numClasses": "2"'), LABELS, PREPARE),
        (LABELS, overwrite('ant\nbee\n'), LABELS, PREPARE),
    ],
)
def test_damage_names_a_file_and_what_to_do_and_leaves_no_cache(
    name, harm, blamed, remedy, data_dir
):
    directory = data_dir / 'tiny_images' / '1.0.0'
    harm(directory / name)
    message = refusal('tiny_images', 'train', data_dir=data_dir)
    assert str(directory / blamed) in message
    assert remedy in message
    assert '\n' not in message
    assert not list(data_dir.glob('decoded/*'))


@pytest.mark.parametrize(
    'harm', [cut_to(0), cut_to(100), cut_to(3000), overwrite('images\n')]
)
def test_a_damaged_cache_is_named_and_not_used(harm, cache_dir, tmp_path):
    path = tmp_path / 'tiny_images-train.npz'
    shutil.copy(cache_dir / path.name, path)
    harm(path)
    message = refusal('tiny_images', 'train', cache_dir=tmp_path)
    assert str(path) in message
    assert 'Remove it, and it is made anew' in message


def test_no_wrong_byte_of_a_cache_changes_what_is_read(cache_dir, tmp_path):
    path = tmp_path / 'tiny_images-train.npz'
    whole = (cache_dir / path.name).read_bytes()
    content = prepared.read('tiny_images', 'train', cache_dir=cache_dir)
    refused = 0
    for position in range(0, len(whole), 23):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            read = prepared.read('tiny_images', 'train', cache_dir=tmp_path)
        except prepared.DataError:
            refused += 1
        else:  # A date, for instance.
            np.testing.assert_array_equal(read.images, content.images)
            np.testing.assert_array_equal(read.labels, content.labels)
            assert read.num_classes == content.num_classes
    assert refused > 0.8 * len(whole) / 23


@pytest.mark.parametrize(
    ('part', 'value', 'message'),
    [
        ('images', np.zeros((20, 6, 8, 3), np.float32), 'float32'),
        ('images', np.zeros((20, 6, 8), np.uint8), r'uint8\[20, 6, 8\]'),
        ('labels', np.zeros(19, np.int32), r'int32\[19\] for 20 images'),
        ('labels', np.full(20, 3, np.int32), 'from 3 to 3, but there are 3 classes'),
        ('labels', np.full(20, -1, np.int32), 'from -1 to -1'),
        ('header', np.array(json.dumps({'format': 0})), 'format 0 instead of 1'),
    ],
)
def test_a_cache_with_other_content_is_refused(
    part, value, message, cache_dir, tmp_path
):
    path = tmp_path / 'tiny_images-train.npz'
    with np.load(cache_dir / path.name) as parts:
        np.savez(path, **{**parts, part: value})
    with pytest.raises(prepared.DataError, match=message):
        prepared.read('tiny_images', 'train', cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written_is_an_error_with_the_argument(data_dir):
    (data_dir / 'file').touch()
    message = refusal(
        'tiny_images', 'train', data_dir=data_dir, cache_dir=data_dir / 'file'
    )
    assert f'{data_dir}/file/tiny_images-train.npz cannot be written' in message
    assert 'cache_dir' in message


def test_a_file_is_the_old_one_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / 'file'
    with files.replacing(path) as file:
        file.write(b'old')
        assert not path.exists()

    def write_half() -> None:
        with files.replacing(path) as file:
            file.write(b'new, but not all of')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [path]


# --- The fixture --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.subprocess
def test_the_fixture_can_be_made_anew(tmp_path, cache_dir):
    pytest.importorskip('tensorflow', reason="needs '.[prepare]'")
    subprocess.run(
        [sys.executable, FIXTURES / 'make_tiny_images.py', tmp_path / 'tfds'],
        check=True,
        capture_output=True,
    )
    for split in ('train', 'test'):
        new = prepared.read('tiny_images', split, data_dir=tmp_path / 'tfds')
        old = prepared.read('tiny_images', split, cache_dir=cache_dir)
        np.testing.assert_array_equal(new.images, old.images)
        np.testing.assert_array_equal(new.labels, old.labels)
        assert (new.source, new.num_classes) == (old.source, old.num_classes)
