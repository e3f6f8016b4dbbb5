r"""How flat the minima are that finished runs ended in, method against method.

    python -m experiments.studies.flatness --workdir=runs/digits

A workdir is that of a run, or holds those of several (of a comparison, say). The runs
must have checkpoints: ``--config.checkpoint_every=1000`` keeps the last state of a
shorter run. Written are ``flatness.json``, ``table.md`` and ``flatness.png``; and
``lemma1.png`` where runs have a ρ, with as many points as they kept checkpoints
(``--config.checkpoint_every=6 --config.checkpoint_keep=10``). What is in
``flatness.json`` already is not measured again.

The loss is the one that was trained on: with the run's own labels, wrong ones too,
and its label smoothing, on the first ``--examples`` training examples without
augmentation, in mini-batches of the run's batch size. ``--mode=train`` is the loss
whose gradients the methods take: BatchNorm normalises with the statistics of each
mini-batch. ``--mode=eval`` is that of the network as it is used, with running
statistics, which a perturbation of the weights leaves as they are. Everything is
computed in float32, whatever the run computed in.
"""

import pathlib
from typing import Any

from absl import flags

from experiments.common import configuration, program
from experiments.report import tables
from experiments.studies.flatness import report
from experiments.studies.flatness.measure import MODES, SUMMARY, Settings, measure


def main() -> None:
    """Measures what the flags say."""
    options: Any = flags.FLAGS
    path = pathlib.Path(
        options.output or pathlib.Path(options.workdir[0]) / f'flatness_{options.mode}'
    )
    settings = Settings(options.mode, options.examples, tuple(options.rho))
    places = {name: getattr(options, name) for name in configuration.PLACES}
    places = {name: place for name, place in places.items() if place}
    summary = measure(options.workdir, path, settings, places)
    files = report.write(summary, path)
    tables.show(summary['name'], *report.table(summary))
    print(report.footnote(summary))
    print('written to ' + ', '.join(str(file) for file in [path / SUMMARY, *files]))


def define_flags() -> None:
    """Defines the flags; called by the program, not on import."""
    default = Settings()
    flags.DEFINE_multi_string(
        'workdir', None, 'A finished run, or a directory with some.', required=True
    )
    flags.DEFINE_string(
        'output', '', 'Where the results go; flatness_MODE in the first workdir.'
    )
    flags.DEFINE_enum('mode', default.mode, MODES, 'How BatchNorm normalises.')
    flags.DEFINE_integer('examples', default.examples, 'Training examples.')
    for name in configuration.PLACES:
        flags.DEFINE_string(name, '', f'What config.data.{name} is on this machine.')
    flags.DEFINE_multi_float('rho', list(default.rhos), 'Radii of the loss rise.')


if __name__ == '__main__':
    program.run(main, define_flags)
