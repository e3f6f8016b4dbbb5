"""Downloads a data set of TensorFlow Datasets, once; the other programs read it.

    pip install '.[prepare]'
    python -m experiments.prepare --dataset=cifar100 --data_dir=DIRECTORY

Reading needs no TensorFlow, only ``pip install '.[data]'``.
"""

import sys

from absl import flags

from experiments.common import program
from experiments.data import prepared


def main() -> None:
    """Runs what the flags say."""
    try:
        path = prepared.prepare(flags.FLAGS.dataset, flags.FLAGS.data_dir)
    except prepared.DataError as error:
        sys.exit(str(error))
    print(f'prepared in {path}')


def define_flags() -> None:
    """Defines the flags; called by the program, not on import."""
    flags.DEFINE_string('dataset', None, 'Its name, cifar10 for instance.')
    flags.DEFINE_string(
        'data_dir', None, 'Where it is written; TFDS_DATA_DIR if it is not given.'
    )
    flags.mark_flag_as_required('dataset')


if __name__ == '__main__':
    program.run(main, define_flags)
