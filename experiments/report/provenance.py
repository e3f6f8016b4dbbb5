"""What made a result: versions, device, command, memory."""

import collections
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """Versions and device, for the record."""
    device = jax.devices()[0]
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'vsam-jax')
    return {
        'versions': {
            'python': platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        'device': {
            'platform': device.platform,
            'kind': device.device_kind,
            'count': jax.device_count(),
            'cpu_cores': len(os.sched_getaffinity(0)),
            'machine': platform.machine(),
        },
    }


def system_variables() -> dict[str, str]:
    """Environment variables that change how fast programs run."""
    prefixes = ('MALLOC_', 'GLIBC_TUNABLES', 'LD_PRELOAD', 'XLA_', 'OMP_')
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)}


def command() -> str:
    """The command line of this process, without the interpreter's path."""
    arguments = sys.orig_argv[1:]
    if '-m' in arguments:
        arguments = arguments[arguments.index('-m') :]
    return shlex.join(['python', *arguments])


def peak_memory() -> int:
    """The most bytes used so far: of the device, of this process on the CPU."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != 'cpu' else None
    if stats and 'peak_bytes_in_use' in stats:
        return int(stats['peak_bytes_in_use'])
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_of(content: Mapping[str, Any]) -> str:
    """What a result was made on, for people.

    Args:
        content: a result with what :func:`environment` gave.
    """
    device = content['device']
    if device['platform'] == 'cpu':
        cores = device['cpu_cores']
        return f'{cores} CPU core{"s" * (cores != 1)} ({device["machine"]})'
    return f'{device["count"]} × {device["kind"]}'


def on(content: Mapping[str, Any]) -> str:
    """Device and version of jax of a result, as :func:`device_of` has them."""
    return f'{device_of(content)}, jax {content["versions"]["jax"]}'


def made_on(lines: Iterable[Mapping[str, Any]]) -> str:
    """A sentence on what the lines of a file were made on, with counts if it differs.

    Args:
        lines: with what :func:`environment` or :func:`on` (``'on'``) gave.
    """
    found = collections.Counter(
        x.get('on') or (on(x) if 'device' in x else None) for x in lines
    )
    unsaid = found.pop(None, 0)
    if not found:
        return 'What it was made on is not recorded.'
    if len(found) == 1 and not unsaid:
        return f'Made on {next(iter(found))}.'
    total = found.total() + unsaid
    parts = [f'{where} ({number} of {total})' for where, number in found.items()]
    if unsaid:
        parts.append(f'not recorded ({unsaid} of {total})')
    return f'Made on {"; ".join(parts)}.'
