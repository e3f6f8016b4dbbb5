"""How figures look, and how they are written."""

import io
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib.figure
import matplotlib.text
import numpy as np
from PIL import Image

from experiments.common import files

# Colours that stay apart for colour-blind readers (Okabe and Ito), and markers
# that stay apart without any.
STYLES = {
    'sgd': ('#555555', 's'),
    'sam': ('#0072B2', 'o'),
    'vsam': ('#D55E00', 'D'),
    'steady_vsam': ('#5D3A9B', 'd'),
    'asam': ('#009E73', '^'),
    'looksam': ('#CC79A7', 'v'),
    'lean_sam': ('#117733', '*'),
    'esam': ('#E69F00', 'P'),
    'saf': ('#56B4E9', 'X'),
}
# Of whatever else.
OTHER = ('#000000', 'o')
INK = '#333333'
# Matplotlib's, for every figure.
SETTINGS: Any = {
    'font.size': 10,
    'axes.titlesize': 11,
    'axes.labelsize': 10,
    'axes.edgecolor': '#999999',
    'axes.labelcolor': INK,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#E6E6E6',
    'text.color': INK,
    'xtick.color': INK,
    'ytick.color': INK,
    'xtick.major.size': 0,
    'ytick.major.size': 0,
    'legend.frameon': False,
    'lines.linewidth': 1.8,
    'savefig.dpi': 110,
}


def style_of(method: str) -> tuple[str, str, str]:
    """Colour, marker and line of a method, by its name in a configuration."""
    # The same colour for the same method with other settings.
    base = method.split('_steps')[0]
    return *STYLES.get(base, OTHER), '-' if base == method else ':'


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[matplotlib.figure.Figure, Any]:
    """A figure of so many inches with rows × columns of axes."""
    # Not through pyplot, which keeps figures in a global list.
    figure = matplotlib.figure.Figure(figsize=(width, height), layout='constrained')
    return figure, figure.subplots(rows, columns)


def title_of(name: str) -> str:
    """The name of a configuration for people."""
    return name.replace('_', ' ')


def band(
    axes: Any,
    x: np.ndarray,
    spread: Mapping[str, Any],
    color: str,
    label: str | None = None,
    **style: Any,
) -> None:
    """A line for a mean and a band for a range, where there are numbers.

    Args:
        axes: what is drawn on.
        x: [points].
        spread: ``mean``, ``low`` and ``high``, each [points], as
            :func:`.statistics.band` makes them; null counts as NaN.
        color: of line and band.
        label: for a legend.
        **style: of the line, as matplotlib takes it.
    """
    mean, low, high = (
        np.asarray(spread[name], float) for name in ('mean', 'low', 'high')
    )
    known = np.isfinite(mean)
    if known.any():
        axes.plot(x[known], mean[known], color=color, label=label, **style)
        axes.fill_between(
            x[known], low[known], high[known], color=color, alpha=0.15, lw=0
        )


def label_beside(
    figure: matplotlib.figure.Figure,
    axes: Any,
    labels: Iterable[tuple[str, tuple[float, float], str]],
    **style: Any,
) -> None:
    """Writes labels at marks, each at the corner where it covers least.

    Args:
        figure: finished but for the labels.
        axes: where the marks are.
        labels: text, place and color of each.
        **style: of the texts, as matplotlib takes it.
    """
    figure.draw_without_rendering()  # Places are known only then.
    marks = [
        artist.get_window_extent()
        for artist in (*axes.lines, *axes.collections)
        if artist.get_visible()
    ]
    inside = axes.get_window_extent()
    written: list[Any] = []
    corners = [(1, -1), (1, 1), (-1, -1), (-1, 1)]
    offsets = [(9 * n * x, 9 * n * y) for n in (1, 3, 5, 7) for x, y in corners]
    for text, place, color in labels:
        drawn = []
        for right, up in offsets:
            label = axes.annotate(
                text,
                place,
                xytext=(right, up),
                textcoords='offset points',
                ha='left' if right > 0 else 'right',
                va='bottom' if up > 0 else 'top',
                color=color,
                **{'fontweight': 'bold', **style},
                # Back to its mark, where it stands far from it.
                arrowprops={'arrowstyle': '-', 'color': color, 'lw': 0.6}
                if abs(up) > 9
                else None,
            )
            label.get_window_extent()  # Puts it in its place; holds the line, too.
            text_alone = matplotlib.text.Text.get_window_extent(label)
            drawn.append((label, text_alone.padded(2)))
        # Under another label or outside nothing can be read.
        covered = [
            sum(_overlap(box, other) for other in marks)
            + 10 * sum(_overlap(box, other) for other in written)
            + 10 * (box.width * box.height - _overlap(box, inside))
            for _, box in drawn
        ]
        best = int(np.argmin(covered))
        written.append(drawn.pop(best)[1])
        for label, _ in drawn:
            label.remove()


def _overlap(one: Any, other: Any) -> float:
    """The area that two boxes share, at least a little if they touch."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    # A line has no area of its own.
    return max(width, 1.0) * max(height, 1.0) if width >= 0 and height >= 0 else 0.0


def save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> None:
    """Writes a PNG of few bytes, of the size at which documents show it."""
    picture = io.BytesIO()
    figure.savefig(picture, format='png')
    # 256 colours are all that lines, marks and their edges have.
    with Image.open(picture) as image:
        few = image.convert('RGB').quantize(256, dither=Image.Dither.NONE)
    with files.replacing(path) as file:
        few.save(file, format='png', optimize=True)
