"""Image data sets that TensorFlow Datasets has prepared, read without TensorFlow.

A split is decoded once and then kept as uint8 in a cache file, which is all that
is needed from then on: copied to another machine, it is read without the data set
and without the ``data`` extra.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import urllib.parse
from typing import Any

import numpy as np

from experiments.common import files

_FORMAT = 1
# Examples that are decoded at once.
_CHUNK = 1000


class DataError(ValueError):
    """A data set that cannot be read; the message says what to do about it."""


@dataclasses.dataclass(frozen=True)
class Images:
    """One split of a data set.

    Attributes:
        images: uint8 array [N, height, width, channels].
        labels: int32 array [N], each in [0, num_classes).
        num_classes: how many classes there are.
        source: data set, version and split that it was made from.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    source: str


def read(
    dataset: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    label: str | None = None,
    num_classes: int | None = None,
) -> Images:
    """Reads a split, from its cache file if there is one.

    Args:
        dataset: a name as TensorFlow Datasets has it: ``'cifar10'``, or with
            configuration and version ``'emnist/letters:3.1.0'``. Its images must
            have one shape.
        split: the name of a split, ``'train'`` for instance.
        data_dir: the directory of prepared data sets; if it is empty, what the
            environment variable ``TFDS_DATA_DIR`` says, else
            ``~/tensorflow_datasets``.
        cache_dir: where cache files are; if it is empty, ``decoded`` in
            ``data_dir``. There is one for each ``dataset``, ``split`` and ``label``.
            It is never out of date by itself: remove it where the data set was
            prepared anew.
        label: the feature that holds the classes, where a data set has more than
            one: ``'coarse_label'`` for the 20 groups of classes of CIFAR-100. If it
            is empty, the one that the data set names for supervised learning.
        num_classes: how many classes there must be; if it is 0 or None, as many
            as the data set says.

    Returns:
        The split.

    Raises:
        DataError: if the split cannot be read, is damaged, or is none of images
            of one shape with a class each.
    """
    root = data_directory(data_dir)
    directory = pathlib.Path(cache_dir) if cache_dir else root / 'decoded'
    path = cache_file(directory, dataset, split, label)
    if not path.exists():
        _write_cache(path, dataset, split, label, root)
    content = _read_cache(path)
    if num_classes and content.num_classes != num_classes:
        raise DataError(
            f'{dataset} must have {num_classes} classes, but {content.source} in {path}'
            f' has {content.num_classes}. If {root} holds the right data set, remove'
            ' that file, and it is made anew; else prepare it anew:'
            f' {_prepare_command(dataset, root)}'
        )
    return content


def data_directory(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """The directory of prepared data sets, see :func:`read`."""
    default = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    return pathlib.Path(data_dir or default).expanduser()


# --- Cache files --------------------------------------------------------------


def cache_file(
    directory: pathlib.Path, dataset: str, split: str, label: str | None = None
) -> pathlib.Path:
    """The file that :func:`read` keeps a split in.

    Args:
        directory: the ``cache_dir``.
        dataset: as :func:`read` has it.
        split: likewise.
        label: likewise.
    """
    # Names contain slashes and colons.
    name = '-'.join(filter(None, (dataset, split, label)))
    return directory.expanduser() / f'{urllib.parse.quote(name, safe="")}.npz'


def write(path: pathlib.Path, content: Images) -> None:
    """Writes a split as a cache file, which :func:`read` then needs nothing else for.

    Args:
        path: the file, see :func:`cache_file`; its directory is made.
        content: the split.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        _save(file, content)


def _save(file: Any, content: Images) -> None:
    header = {
        'format': _FORMAT,
        'num_classes': content.num_classes,
        'source': content.source,
    }
    np.savez(
        file,
        header=np.array(json.dumps(header)),
        images=content.images,
        labels=content.labels,
    )


def _write_cache(
    path: pathlib.Path, dataset: str, split: str, label: str | None, root: pathlib.Path
) -> None:
    prepare_anew = _prepare_command(dataset, root)
    builder = _open(dataset, split, label, root, prepare_anew)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened before a long time is spent on what cannot be written.
        with files.replacing(path) as file:
            _save(file, _decode(builder, split, label, prepare_anew))
    except OSError as error:
        raise DataError(
            f'{path} cannot be written ({_describe(error)}). Give a cache_dir that can.'
        ) from error


def _read_cache(path: pathlib.Path) -> Images:
    try:
        # A zip file has a checksum of each part, which reading compares.
        with path.open('rb') as file, np.load(file, allow_pickle=False) as parts:
            header = json.loads(str(parts['header']))
            if header['format'] != _FORMAT:
                raise ValueError(f'format {header["format"]} instead of {_FORMAT}')
            content = Images(
                images=parts['images'],
                labels=parts['labels'],
                num_classes=header['num_classes'],
                source=header['source'],
            )
        _check(content)
    except Exception as error:  # Damage has as many names as the formats have parts.
        raise DataError(
            f'{path} is no complete cache of a data set ({_describe(error)}). Remove'
            ' it, and it is made anew from the prepared data set.'
        ) from error
    return content


def _check(content: Images) -> None:
    images, labels = content.images, content.labels
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f'images are {images.dtype}{list(images.shape)}')
    if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
        raise ValueError(
            f'labels are {labels.dtype}{list(labels.shape)} for {len(images)} images'
        )
    if not len(labels):
        raise ValueError('it holds no examples')
    low, high = labels.min(), labels.max()
    if low < 0 or high >= content.num_classes:
        raise ValueError(
            f'labels reach from {low} to {high}, but there are {content.num_classes}'
            ' classes'
        )


# --- Prepared data sets -------------------------------------------------------


def _open(
    dataset: str, split: str, label: str | None, root: pathlib.Path, prepare_anew: str
) -> Any:
    """The builder of a prepared data set that has such a split."""
    tfds = _import_tfds(dataset, root)
    try:
        builder = tfds.builder(dataset, data_dir=root)
    except Exception as error:
        damaged = _damaged_metadata(root / dataset.split(':')[0])
        what = f'{dataset} cannot be read from {root}'
        if damaged:
            what = f'{", ".join(map(str, damaged))} cannot be read'
        raise DataError(
            f'{what} ({_describe(error)}). If the name is right, prepare the data set'
            f' anew: {prepare_anew}'
        ) from error
    if not builder.is_prepared():
        raise DataError(
            f'{dataset} is not prepared: {builder.data_dir} holds no data set. Give'
            ' the data_dir that it is in, or prepare it, which needs a network:'
            f' {prepare_anew}'
        )
    kind = builder.info.file_format.file_suffix
    if kind != 'array_record':
        raise DataError(
            f'{builder.data_dir} holds {dataset} as {kind}, not as array_record.'
            f' Prepare it in another data_dir: {_prepare_command(dataset, "DIRECTORY")}'
        )
    if split not in builder.info.splits:
        raise DataError(
            f'split must be one of {", ".join(builder.info.splits)}; got {split!r} for'
            f' {dataset}.'
        )
    _keys_and_shape(builder, label, prepare_anew)
    return builder


def _damaged_metadata(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files that describe a data set and are missing or no JSON."""
    damaged = []
    for folder in sorted({path.parent for path in directory.rglob('*.array_record*')}):
        for name in ('dataset_info.json', 'features.json'):
            try:
                json.loads((folder / name).read_text())
            except (OSError, ValueError):
                damaged.append(folder / name)
    return damaged


def _keys_and_shape(
    builder: Any, named: str | None, prepare_anew: str
) -> tuple[str, str, int, tuple[int, ...]]:
    """The keys of image and label, how many classes, and the images' shape."""
    # A data set may be of text, without features that have names.
    features = dict(getattr(builder.info.features, 'items', tuple)())
    keys = builder.info.supervised_keys
    image, label = keys if keys and len(keys) == 2 else ('image', 'label')
    if named:
        label = named
        classes = [name for name in features if hasattr(features[name], 'num_classes')]
        if label not in classes:
            raise DataError(
                f'label must be one of {", ".join(classes) or "no features"}; got'
                f' {label!r} for {builder.info.name}.'
            )
    shape = getattr(features.get(image), 'shape', None) or ()
    num_classes = getattr(features.get(label), 'num_classes', None)
    fits = len(shape) == 3 and None not in shape
    if not (fits and features[image].np_dtype == np.uint8 and num_classes):
        raise DataError(
            f'{builder.data_dir} must hold uint8 images of one shape with a class each,'
            f' but its features are {" ".join(str(builder.info.features).split())}.'
        )
    names = features[label].names
    if len(names) != num_classes:
        raise DataError(
            f'{builder.data_dir}/{label}.labels.txt names {len(names)} classes, but'
            f' features.json beside it says {num_classes}. Remove {builder.data_dir}'
            f' and prepare the data set anew: {prepare_anew}'
        )
    return image, label, num_classes, shape


def _decode(builder: Any, split: str, named: str | None, prepare_anew: str) -> Images:
    image, label, num_classes, shape = _keys_and_shape(builder, named, prepare_anew)
    size = builder.info.splits[split].num_examples
    images = np.empty((size, *shape), np.uint8)
    labels = np.empty(size, np.int32)
    try:
        source = builder.as_data_source(split)
        for start in range(0, size, _CHUNK):
            rows = range(start, min(start + _CHUNK, size))
            for row, example in zip(rows, source.__getitems__(rows), strict=True):
                images[row], labels[row] = example[image], example[label]
        content = Images(
            images, labels, num_classes, f'{builder.info.full_name} {split}'
        )
        _check(content)
    except Exception as error:  # What readers and decoders raise has no common name.
        paths = ', '.join(map(str, builder.info.splits[split].filepaths))
        raise DataError(
            f'{paths} cannot be read ({_describe(error)}). Remove {builder.data_dir}'
            f' and prepare the data set anew: {prepare_anew}'
        ) from error
    return content


def prepare(dataset: str, data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Downloads a data set and writes it as :func:`read` needs it.

    Args:
        dataset: its name, see :func:`read`.
        data_dir: where it is written, see :func:`read`.

    Returns:
        The directory of the data set.

    Raises:
        DataError: without TensorFlow, without a network, or if the download is
            not what it should be.
    """
    root = data_directory(data_dir)
    tfds = _import_tfds(dataset, root)
    if importlib.util.find_spec('tensorflow') is None:
        raise DataError(
            f'Preparing {dataset} needs TensorFlow, reading it afterwards does not:'
            " pip install '.[prepare]' and call this again."
        )
    try:
        builder = tfds.builder(dataset, data_dir=root, file_format='array_record')
        builder.download_and_prepare()
    except Exception as error:  # Whatever a server, a network or a disk may do.
        raise DataError(
            f'{dataset} cannot be prepared in {root} ({_describe(error)}). This needs a'
            ' network; without one, prepare it on a machine that has one, and copy'
            f' its directory in {root}.'
        ) from error
    return pathlib.Path(builder.data_dir)


def _import_tfds(dataset: str, root: pathlib.Path) -> Any:
    try:
        import array_record.python  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f'Reading {dataset} from {root} needs tensorflow-datasets and array_record'
            f" ({error}): pip install '.[data]'"
        ) from error
    return tfds


def _prepare_command(dataset: str, root: object) -> str:
    return (
        "pip install '.[prepare]' && python -m experiments.prepare"
        f' --dataset={dataset} --data_dir={root}'
    )


def _describe(error: Exception) -> str:
    # Some messages go on with a list of everything there is.
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0]}'
