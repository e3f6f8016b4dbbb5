r"""How wide a network SAM can train: steps at two widths, and what follows for others.

    taskset -c 0 python -m experiments.studies.proof.widths

Between and beyond the two widths, seconds of a step are taken to be a power of the
width; parameters are counted. Written to ``results/widths.json`` and ``widths.md``.
"""

import argparse
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common import files, quantities
from experiments.data import sources
from experiments.methods.compared import METHODS, config_of
from experiments.models import zoo
from experiments.report import provenance, tables
from experiments.studies.proof.tasks import EPOCHS, cifar
from experiments.training import plans, speed

RESULTS = pathlib.Path(__file__).parent / 'results' / 'widths.json'
# What SAM's run is to take on all cores, and how large the network should be.
MINUTES = 25
PARAMETERS = 300_000
_STEPS_PER_EPOCH = 45_000 // 128
_WIDTHS = (8, 12, 16, 20, 24, 28, 32, 48, 64)


@functools.cache
def parameters(width: int) -> int:
    """Numbers that the network of a width has; nothing is computed."""
    config = cifar(width=width)
    model = zoo.create(config.model, config.models[config.model], 100)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), images)['params']
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def measure(widths: Sequence[int], rounds: int, steps: int) -> dict[str, float]:
    """Seconds of a step of SAM on random images, by width.

    Args:
        widths: which.
        rounds: how many rounds of all of them in turn.
        steps: of each in a round.
    """
    data = {'name': 'synthetic', 'train': 1280, 'num_classes': 100}
    configs = {}
    for width in widths:
        config: Any = config_of(cifar(width=width), 'sam', 0.1, 0.1, seed=0)
        with config.unlocked():
            config.data = data
        configs[str(width)] = config
    found = speed.measure(configs, sources.load(data), rounds, steps)
    return {width: row['step'] for width, row in found.items()}


def fit(seconds: Mapping[str, float]) -> tuple[float, float]:
    """Factor a and exponent b of seconds = a · width^b, through two points.

    Example:
        >>> fit({'10': 1.0, '20': 4.0})
        (0.01, 2.0)
    """
    (small, first), (large, second) = ((int(w), s) for w, s in seconds.items())
    exponent = math.log(second / first) / math.log(large / small)
    return first / small**exponent, exponent


def extrapolate(seconds: Mapping[str, float]) -> dict[str, Any]:
    """What fits into :data:`MINUTES`.

    Args:
        seconds: of a step that one core makes, by two widths.

    Returns:
        For each of some ``widths`` the ``parameters``, ``step`` in seconds of one core,
        the ``minutes`` of :data:`EPOCHS` epochs on all cores and the ``epochs`` that
        fit; and ``widest``, the largest of them that fits (None if none does).
    """
    factor, exponent = fit(seconds)
    rows = {}
    for width in _WIDTHS:
        step = factor * width**exponent
        epoch = _STEPS_PER_EPOCH * step / plans.CORES / 60
        rows[str(width)] = {
            'parameters': parameters(width),
            'step': step,
            'minutes': EPOCHS * epoch,
            'epochs': MINUTES / epoch,
        }
    fits = [width for width in rows if rows[width]['minutes'] <= MINUTES]
    return {
        'seconds': dict(seconds),
        'exponent': exponent,
        'widths': rows,
        'widest': int(fits[-1]) if fits else None,
    }


def verdict(found: Mapping[str, Any]) -> str:
    """What fits, in a sentence."""
    enough = [w for w, row in found['widths'].items() if row['parameters'] > PARAMETERS]
    smallest = found['widths'][enough[0]]
    large = (
        f'Width {enough[0]} is the first above {PARAMETERS:,} parameters'
        f' ({smallest["parameters"]:,}); SAM makes {smallest["epochs"]:.0f} epochs of'
        f' it in {MINUTES} minutes on {plans.CORES} cores.'
    )
    if found['widest'] is None:
        return f'No width makes {EPOCHS} epochs in that time. {large}'
    widest = found['widths'][str(found['widest'])]
    return (
        f'The widest that makes {EPOCHS} epochs in that time is {found["widest"]}'
        f' ({widest["parameters"]:,} parameters). {large}'
    )


def rows_of(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a width per row."""
    header = ['Width', 'Parameters', 'Step of SAM, ms of a core']
    header += [f'{EPOCHS} epochs, minutes', f'Epochs in {MINUTES} minutes']
    rows = [
        [
            f'{width}{" (measured)" if width in found["seconds"] else ""}',
            f'{row["parameters"]:,}',
            f'{1e3 * row["step"]:.0f}',
            f'{row["minutes"]:.0f}',
            f'{row["epochs"]:.0f}',
        ]
        for width, row in found['widths'].items()
    ]
    return header, rows


def _two(text: str) -> set[int]:
    widths = {quantities.count(width) for width in text.split(',')}
    if len(widths) != 2:
        raise argparse.ArgumentTypeError(f'must be two widths, got {text!r}')
    return widths


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the result files."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument(
        '--widths', type=_two, default='16,32', help='the two that are measured'
    )
    parser.add_argument('--rounds', type=quantities.count, default=5)
    parser.add_argument(
        '--steps', type=quantities.count, default=2, help='of each in a round'
    )
    parser.add_argument('--output', type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = extrapolate(measure(sorted(options.widths), options.rounds, options.steps))
    content = {
        **found,
        'verdict': verdict(found),
        'method': METHODS['sam'].title,
        'command': provenance.command(),
        **provenance.environment(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(options.output, files.jsonable(content))
    header, rows = rows_of(found)
    with files.replacing(options.output.with_suffix('.md')) as file:
        text = f'{tables.markdown(header, rows)}\n{content["verdict"]}'
        file.write(f'{text} Command: `{content["command"]}`.\n'.encode())
    tables.show('widths', header, rows)
    print(content['verdict'])


if __name__ == '__main__':
    main()
