"""Figures of a comparison, drawn from its JSON alone."""

import pathlib
from collections.abc import Iterator
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib import ticker

# Colours that stay apart for colour-blind readers (Okabe and Ito), and markers
# that stay apart without any.
STYLES = {
    'sgd': ('#555555', 's'),
    'sam': ('#0072B2', 'o'),
    'vsam': ('#D55E00', 'D'),
    'asam': ('#009E73', '^'),
    'looksam': ('#CC79A7', 'v'),
    'esam': ('#E69F00', 'P'),
    'saf': ('#56B4E9', 'X'),
}
_OTHER = ('#000000', '.')
_INK = '#333333'
_SETTINGS: Any = {
    'font.size': 10,
    'axes.titlesize': 11,
    'axes.labelsize': 10,
    'axes.edgecolor': '#999999',
    'axes.labelcolor': _INK,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#E6E6E6',
    'text.color': _INK,
    'xtick.color': _INK,
    'ytick.color': _INK,
    'xtick.major.size': 0,
    'ytick.major.size': 0,
    'legend.frameon': False,
    'lines.linewidth': 1.8,
    'savefig.dpi': 160,
}


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[matplotlib.figure.Figure, Any]:
    # Not through pyplot, which keeps figures in a global list.
    figure = matplotlib.figure.Figure(figsize=(width, height), layout='constrained')
    return figure, figure.subplots(rows, columns)


def accuracy_against_cost(summary: dict[str, Any], path: pathlib.Path) -> None:
    """Test accuracy over time per step: one mark per method, a dot per seed.

    Args:
        summary: what :func:`experiments.compare.compare` returns.
        path: the PNG to write.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _figure(6.8, 4.2)
        for name, method in summary['methods'].items():
            color, marker = STYLES.get(name, _OTHER)
            cost, accuracy = method['relative_time'], method['test_accuracy']
            x, y = cost['median'], 100 * accuracy['mean']
            axes.plot(
                np.full(len(accuracy['values']), x),
                100 * np.asarray(accuracy['values']),
                '.',
                color=color,
                alpha=0.35,
                markeredgewidth=0,
                markersize=9,
            )
            axes.errorbar(
                x,
                y,
                xerr=[[x - cost['low']], [cost['high'] - x]],
                yerr=100 * (accuracy['sd'] or 0),
                color=color,
                marker=marker,
                markersize=9,
                capsize=3,
                elinewidth=1.4,
            )
            axes.annotate(
                f'{method["title"]}\n{y:.1f} %, {x:.2f}×',
                (x, y),
                xytext=(9, -9),
                textcoords='offset points',
                va='top',
                color=color,
                fontweight='bold',
            )
        axes.margins(x=0.2, y=0.15)
        base = summary['methods'][summary['baseline']]['title']
        axes.set_xlabel(f'time per step, as a multiple of {base}')
        axes.set_ylabel('test accuracy, %')
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter('%.1f×'))
        seeds = len(next(iter(summary['methods'].values()))['seeds'])
        axes.set_title(
            f'{summary["name"]}: accuracy against cost'
            f' (mean ± sd of {seeds} seeds; dots: single seeds)',
            loc='left',
        )
        figure.savefig(path)


def training_curves(summary: dict[str, Any], path: pathlib.Path) -> None:
    """Test accuracy, sampling rate and the norms ‖g‖ and ‖s‖ over training.

    Lines are means over seeds, bands reach from the lowest to the highest.

    Args:
        summary: what :func:`experiments.compare.compare` returns.
        path: the PNG to write.
    """
    titles = {
        'test_accuracy': 'test accuracy, %',
        'sampled': 'steps with a second gradient, %',
        'grad_norm': 'gradient norm ‖g‖',
        'psf_norm': 'PSF norm ‖s‖',
    }
    with matplotlib.rc_context(_SETTINGS):
        figure, panels = _figure(8.4, 6.0, 2, 2)
        for axes, (quantity, title) in zip(panels.flat, titles.items(), strict=True):
            for label, color, x, y in _curves(summary, quantity):
                if quantity == 'sampled':
                    # No plan, no second gradient.
                    y = np.nan_to_num(y)
                if quantity in ('test_accuracy', 'sampled'):
                    y = 100 * y
                if np.isfinite(y).all():
                    _band(axes, x, y, color, label)
            axes.set_title(title, loc='left')
            axes.set_xlabel('epoch')
        panels[0, 1].set_ylim(-4, 104)
        for axes in panels[1]:
            # The two norms on one scale, so that they can be compared.
            axes.set_ylim(0, max(each.get_ylim()[1] for each in panels[1]))
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside upper right', ncols=len(labels))
        figure.suptitle(
            f'{summary["name"]}: mean over seeds, band from lowest to highest',
            x=0.01,
            ha='left',
            fontsize=11,
        )
        figure.savefig(path)


def _curves(
    summary: dict[str, Any], quantity: str
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Title, colour, epochs and [seeds, epochs] values, for each method."""
    for name, method in summary['methods'].items():
        logs = [[entry for entry in log if quantity in entry] for log in method['logs']]
        x = np.asarray([entry['epoch'] for entry in logs[0]])
        y = np.asarray([[entry[quantity] for entry in log] for log in logs], float)
        yield method['title'], STYLES.get(name, _OTHER)[0], x, y


def _band(axes: Any, x: np.ndarray, y: np.ndarray, color: str, label: str) -> None:
    axes.plot(x, y.mean(axis=0), color=color, label=label)
    axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, lw=0)
