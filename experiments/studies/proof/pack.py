r"""Gathers what a machine with an accelerator but without a package index lacks.

    python -m experiments.studies.proof.pack --output=build/gpu

That machine has jax, flax, optax, torch and scikit-learn. Into the folder go the other
packages that the experiments need, as wheels (``wheels/``), and the images of CIFAR-100
as uint8 arrays in three parts of less than 64 MB (``images_0.npz`` and so on).
"""

import argparse
import importlib.metadata
import pathlib
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from experiments.common import files
from experiments.common.configuration import ConfigError
from experiments.data import prepared

ROOT = pathlib.Path(__file__).parents[3]
# What is there, and with it all that these need.
THERE = ('jax', 'jaxlib', 'flax', 'optax', 'torch', 'scikit-learn')
EXTRAS = ('experiments', 'benchmark')
PARTS = 3
_DATASET, _CLASSES = 'cifar100', 100
_SPLITS = ('train', 'test')
_LARGEST = 64_000_000
_PLATFORMS = ('manylinux_2_28_x86_64', 'manylinux_2_17_x86_64', 'manylinux2014_x86_64')


def wanted() -> dict[str, str]:
    """What the project needs for the experiments, by name: as it says it."""
    text = (ROOT / 'pyproject.toml').read_text()
    project = tomllib.loads(text)['project']
    lines = [*project['dependencies']]
    for extra in EXTRAS:
        lines += project['optional-dependencies'][extra]
    found: dict[str, str] = {
        canonicalize_name(Requirement(line).name): line for line in lines
    }
    found.pop(canonicalize_name(project['name']), None)
    return found


def closure(names: Iterable[str]) -> dict[str, str | None]:
    """Packages and all that they need, as far as they are installed here.

    Args:
        names: of packages.

    Returns:
        By name the version that is installed here; None where there is none, and what
        such a package needs is not known.
    """
    found: dict[str, str | None] = {}
    left = [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
            continue
        found[name] = package.version
        for line in package.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({'extra': ''}):
                left.append(canonicalize_name(requirement.name))
    return found


def lacking() -> list[str]:
    """What is to be gathered: in the versions that are installed here, if they are."""
    needed = wanted()
    there = closure(THERE)
    return sorted(
        needed.get(name, name) if version is None else f'{name}=={version}'
        for name, version in closure(needed).items()
        if name not in there
    )


def gather_wheels(folder: pathlib.Path, python: str) -> None:
    """Downloads wheels, and builds that of this project.

    Args:
        folder: where to.
        python: the version of Python over there, ``'3.12'`` for instance; that of this
            one if it is empty.
    """
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    other = []
    if python:
        other = ['--python-version', python, '--implementation', 'cp']
        for platform in _PLATFORMS:
            other += ['--platform', platform]
    # What these need is among them or there.
    binary = ['--no-deps', '--only-binary=:all:']
    place = ['--dest', str(folder)]
    subprocess.run([*pip, 'download', *binary, *other, *place, *lacking()], check=True)
    # Its version is written into results.
    here = ['--no-deps', '--wheel-dir', str(folder), str(ROOT)]
    subprocess.run([*pip, 'wheel', *here], check=True)


def gather_images(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the images of both splits, one after the other, in three parts.

    Returns:
        The files.
    """
    splits = [prepared.read(_DATASET, name) for name in _SPLITS]
    images = np.concatenate([split.images for split in splits])
    # 100 classes fit into a byte.
    labels = np.concatenate([split.labels for split in splits]).astype(np.uint8)
    paths = []
    pieces = zip(
        np.array_split(images, PARTS), np.array_split(labels, PARTS), strict=True
    )
    for number, (part, own) in enumerate(pieces):
        path = folder / f'images_{number}.npz'
        with files.replacing(path) as file:
            np.savez_compressed(
                file, images=part, labels=own, train=len(splits[0].labels)
            )
        if path.stat().st_size >= _LARGEST:
            raise ConfigError(
                f'{path} must be smaller than {_LARGEST:,} bytes, and has'
                f' {path.stat().st_size:,}: raise PARTS in {__file__}.'
            )
        paths.append(path)
    return paths


def unpack_images(folder: pathlib.Path) -> pathlib.Path:
    """Puts the parts together, as the experiments read them.

    Args:
        folder: where the parts are.

    Returns:
        The ``cache_dir`` of a configuration.

    Raises:
        ConfigError: if a part is missing.
    """
    cache = folder / 'decoded'
    paths = {name: prepared.cache_file(cache, _DATASET, name) for name in _SPLITS}
    if all(path.exists() for path in paths.values()):
        return cache
    parts = [folder / f'images_{number}.npz' for number in range(PARTS)]
    if missing := [path.name for path in parts if not path.exists()]:
        raise ConfigError(
            f'{folder} must hold {", ".join(missing)}; make them with python -m'
            f' experiments.studies.proof.pack --output={folder}'
        )
    arrays: Any = [np.load(path) for path in parts]
    images, labels = (
        np.concatenate([part[name] for part in arrays]) for name in ('images', 'labels')
    )
    end = int(arrays[0]['train'])
    places = {'train': slice(end), 'test': slice(end, None)}
    for name, rows in places.items():
        content = prepared.Images(
            images[rows], labels[rows].astype(np.int32), _CLASSES, f'{_DATASET} {name}'
        )
        prepared.write(paths[name], content)
    return cache


def main(arguments: Sequence[str] | None = None) -> None:
    """Gathers both."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--output', type=pathlib.Path, default='build/gpu')
    parser.add_argument('--python', default='', help='its version over there: 3.12')
    parser.add_argument('--dry', action='store_true', help='only say what is lacking')
    options = parser.parse_args(arguments)
    if options.dry:
        print('\n'.join(lacking()))
        return
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for path in gather_images(options.output):
            print(f'written to {path}')
        gather_wheels(options.output / 'wheels', options.python)
    except (ConfigError, prepared.DataError) as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(f'pip failed ({error.returncode}); what it said is above.')
    print(f'written to {options.output / "wheels"}')


if __name__ == '__main__':
    main()
