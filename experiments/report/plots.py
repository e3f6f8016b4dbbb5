"""Figures of comparisons, drawn from their JSON alone."""

from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.text
import numpy as np

# Colours that stay apart for colour-blind readers (Okabe and Ito), and markers
# that stay apart without any.
STYLES = {
    'sgd': ('#555555', 's'),
    'sam': ('#0072B2', 'o'),
    'vsam': ('#D55E00', 'D'),
    'steady_vsam': ('#5D3A9B', 'd'),
    'asam': ('#009E73', '^'),
    'looksam': ('#CC79A7', 'v'),
    'esam': ('#E69F00', 'P'),
    'saf': ('#56B4E9', 'X'),
}
# Of whatever else.
OTHER = ('#000000', '.')
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
    'savefig.dpi': 160,
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
    y: np.ndarray,
    color: str,
    label: str | None = None,
    **style: Any,
) -> None:
    """Mean and range over seeds, where all of them have a value.

    Args:
        axes: what is drawn on.
        x: [points].
        y: [seeds, points].
        color: of line and band.
        label: for a legend.
        **style: of the line, as matplotlib takes it.
    """
    known = np.isfinite(y).all(axis=0)
    if known.any():
        x, y = x[known], y[:, known]
        axes.plot(x, y.mean(axis=0), color=color, label=label, **style)
        axes.fill_between(
            x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, lw=0
        )
