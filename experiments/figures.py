r"""Figures 1 and 2 over several networks, from finished comparisons of one each.

    python -m experiments.compare --config=… --config.model=resnet18 --workdir=a
    python -m experiments.compare --config=… --config.model=wide_resnet --workdir=b
    python -m experiments.figures --comparison=a --comparison=b --workdir=figures

Figure 1 has one connected line per method, accuracy against training speed; Figure 2
the norms of gradient and PSF over training, and how much the latter changes.
Comparisons that differ in ``config.quantization.bits`` are drawn as accuracy over bits
instead.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.common import program
from experiments.report import comparison_plots
from experiments.report.comparison import load
from experiments.training import run_files

FILES = ('figure1.png', 'figure2.png')
BITS = 'bits.png'


def write(
    summaries: Sequence[dict[str, Any]], workdir: pathlib.Path
) -> list[pathlib.Path]:
    """Writes both figures, or the one over bits.

    Args:
        summaries: from :func:`load`.
        workdir: where they are written.

    Returns:
        The files.
    """
    if len(set(map(comparison_plots.bits_of, summaries))) > 1:
        comparison_plots.accuracy_against_bits(summaries, workdir / BITS)
        return [workdir / BITS]
    files = [workdir / name for name in FILES]
    comparison_plots.accuracy_against_speed(summaries, files[0])
    comparison_plots.norms(summaries, files[1])
    return files


def main() -> None:
    """Runs what the flags say."""
    summaries = load(flags.FLAGS.comparison)
    workdir = run_files.open_workdir(flags.FLAGS.workdir)
    files = write(summaries, workdir)
    print('written to ' + ', '.join(map(str, files)))


def define_flags() -> None:
    """Defines the flags; called by the program, not on import."""
    flags.DEFINE_multi_string('comparison', None, 'A finished comparison; repeatable.')
    flags.DEFINE_string('workdir', None, 'Where the figures are written.')
    flags.mark_flags_as_required(['comparison', 'workdir'])


if __name__ == '__main__':
    program.run(main, define_flags)
