r"""Figures 1 and 2 over several networks, from finished comparisons of one each.

    python -m experiments.compare --config=… --config.model=resnet18 --workdir=a
    python -m experiments.compare --config=… --config.model=wide_resnet --workdir=b
    python -m experiments.figures --comparison=a --comparison=b --workdir=figures

Figure 1 has one connected line per method, accuracy against training speed; Figure 2
the norms of gradient and PSF over training, and how much the latter changes.
Comparisons that differ in ``config.quantization.bits`` are drawn as accuracy over bits
instead.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from experiments import configuration, plots, results
from experiments.compare import SUMMARY

FILES = ('figure1.png', 'figure2.png')
BITS = 'bits.png'


def load(workdirs: Sequence[str]) -> list[dict[str, Any]]:
    """The summaries of comparisons.

    Args:
        workdirs: what ``--workdir`` of :mod:`experiments.compare` was, or the file
            that it wrote.

    Returns:
        What :func:`experiments.compare.compare` returned.

    Raises:
        ConfigError: where there is no such file, or none of a comparison.
    """
    summaries = []
    for workdir in workdirs:
        path = pathlib.Path(workdir)
        path = path / SUMMARY if path.is_dir() else path
        try:
            summary = json.loads(path.read_text())
            complete = all('differences' in row for row in summary['methods'].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise configuration.ConfigError(
                f'comparison must be a workdir of experiments.compare, got {workdir!r}:'
                f' {error!r}.'
            ) from error
        if not complete:
            raise configuration.ConfigError(
                f'{path} is of an older version. Run the comparison again, which finds'
                ' its runs finished.'
            )
        summaries.append(summary)
    return summaries


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
    if len(set(map(plots.bits_of, summaries))) > 1:
        plots.accuracy_against_bits(summaries, workdir / BITS)
        return [workdir / BITS]
    files = [workdir / name for name in FILES]
    plots.accuracy_against_speed(summaries, files[0])
    plots.norms(summaries, files[1])
    return files


def main(arguments: Sequence[str]) -> None:
    """Runs what the flags say."""
    with configuration.usage(arguments):
        summaries = load(flags.FLAGS.comparison)
        workdir = results.open_workdir(flags.FLAGS.workdir)
    files = write(summaries, workdir)
    print('written to ' + ', '.join(map(str, files)))


if __name__ == '__main__':
    flags.DEFINE_multi_string('comparison', None, 'A finished comparison; repeatable.')
    flags.DEFINE_string('workdir', None, 'Where the figures are written.')
    flags.mark_flags_as_required(['comparison', 'workdir'])
    app.run(main)
