r"""Exports a finished run in few bits to whole numbers, and tests what was exported.

    python -m experiments.train --workdir=runs/lsq/sam --config.checkpoint_every=60 \
        --config=experiments/studies/quantization/digits.py:4 --config.method=sam
    python -m experiments.studies.quantization --workdir=runs/lsq/sam

The run must have a checkpoint of its end. ``integers.npz`` in its workdir then holds
the weights, int8, and what else the network has; the accuracy of both on the test
examples is printed.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from flax import traverse_util

from experiments.common import configuration, program
from experiments.data.augmentation import normalize
from experiments.models.quantization import Quantized
from experiments.studies.quantization import integers
from experiments.training import checkpoints, experiment, run_files

EXPORTED = 'integers.npz'


def export(path: pathlib.Path) -> dict[str, Any]:
    """Writes the whole numbers of a run beside its result.

    Args:
        path: the workdir of the run.

    Returns:
        ``accuracy`` on the test examples and ``accuracy_in_integers``, the share of
        examples that both take for the same (``alike``), and the bytes of the weights.

    Raises:
        ConfigError: if there is no finished run in few bits.
    """
    config: Any = ml_collections.ConfigDict(run_files.result_of(path)['config'])
    runs = experiment.build(config)
    model = runs.model
    if not isinstance(model, Quantized):
        raise configuration.ConfigError(
            'workdir must be that of a run with config.quantization.bits of 2, 3, 4 or'
            f' 8, but {path} ran in full precision.'
        )
    dataset = runs.batches.dataset
    images = normalize(jnp.asarray(dataset.test.images), dataset.mean, dataset.std)
    images = images[: dataset.test.size]
    like = jax.eval_shape(
        lambda key: model.init(key, images[:1], train=True), jax.random.key(0)
    )
    variables = checkpoints.variables(path, like)
    exported = integers.export(model, variables)
    flat: Any = traverse_util.flatten_dict(jax.device_get(exported), sep='/')
    np.savez(path / EXPORTED, **flat)
    apply = jax.jit(lambda variables, x: model.apply(variables, x, train=False))
    guesses = np.argmax(apply(variables, images), axis=-1)
    in_integers = np.argmax(integers.apply(model, exported, images), axis=-1)
    labels = np.asarray(dataset.test.labels)
    return {
        'accuracy': float(np.mean(guesses == labels)),
        'accuracy_in_integers': float(np.mean(in_integers == labels)),
        'alike': float(np.mean(guesses == in_integers)),
        'bytes': sum(x.nbytes for x in flat.values() if x.dtype == np.int8),
    }


def main() -> None:
    """Exports what the flags say."""
    path = pathlib.Path(flags.FLAGS.workdir)
    found = export(path)
    print(
        f'test accuracy {found["accuracy"]:.2%}, in whole numbers'
        f' {found["accuracy_in_integers"]:.2%} ({found["alike"]:.1%} alike);'
        f' {found["bytes"]:,} bytes of weights written to {path / EXPORTED}'
    )


def define_flags() -> None:
    """Defines the flags; called by the program, not on import."""
    flags.DEFINE_string('workdir', None, 'The workdir of the run.', required=True)


if __name__ == '__main__':
    program.run(main, define_flags)
