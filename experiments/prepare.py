"""Downloads a data set of TensorFlow Datasets, once; the other programs read it.

    pip install '.[prepare]'
    python -m experiments.prepare --dataset=cifar100 --data_dir=DIRECTORY

Reading needs no TensorFlow, only ``pip install '.[data]'``.
"""

import sys
from collections.abc import Sequence

from absl import app, flags

from experiments.data import prepared


def main(arguments: Sequence[str]) -> None:
    """Runs what the flags say."""
    if len(arguments) > 1:
        raise app.UsageError(f'unknown arguments: {" ".join(arguments[1:])}')
    try:
        path = prepared.prepare(flags.FLAGS.dataset, flags.FLAGS.data_dir)
    except prepared.DataError as error:
        sys.exit(str(error))
    print(f'prepared in {path}')


if __name__ == '__main__':
    flags.DEFINE_string('dataset', None, 'Its name, cifar10 for instance.')
    flags.DEFINE_string(
        'data_dir', None, 'Where it is written; TFDS_DATA_DIR if it is not given.'
    )
    flags.mark_flag_as_required('dataset')
    app.run(main)
