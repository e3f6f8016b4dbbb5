"""Figures of flatness, drawn from the JSON of :mod:`.measure` alone."""

import pathlib
from typing import Any

import matplotlib
import numpy as np

from experiments.report import plots, statistics

Runs = dict[str, list[dict[str, Any]]]
_DASHES = ('-', '--', ':', '-.')


def minima(summary: dict[str, Any], runs: Runs, path: pathlib.Path) -> None:
    """How the loss rises around where runs ended, in three ways.

    Lines are means over seeds, bands reach from the lowest to the highest.

    Args:
        summary: what :func:`experiments.studies.flatness.measure.measure` returns.
        runs: its runs by title, from :func:`.report.groups`.
        path: the PNG to write.
    """
    settings = summary['settings']
    titles = {
        'leading': ('along the leading eigenvector', 'distance ‖Δw‖'),
        'random': ('along a random direction', 'distance, relative to each filter'),
        'loss_rise': ('along the gradient, as SAM looks', 'radius ρ'),
    }
    reach = {'leading': 'distance', 'random': 'relative_distance'}
    with matplotlib.rc_context(plots.SETTINGS):
        figure, panels = plots.new_figure(10.5, 3.9, 1, len(titles))
        for axes, (name, (title, label)) in zip(panels, titles.items(), strict=True):
            for group, (color, dashes) in zip(
                runs.values(), _styles(runs), strict=True
            ):
                y = np.asarray([run[name] for run in group], float)
                if name in reach:
                    end = settings[reach[name]]
                    x = np.linspace(-end, end, settings['points'])
                    y = y - np.asarray([[run['loss']] for run in group])
                else:
                    order = np.argsort(settings['rhos'])
                    x, y = np.asarray(settings['rhos'])[order], y[:, order]
                style: dict[str, Any] = {'linestyle': dashes}
                if name not in reach:
                    style['marker'] = 'o'
                plots.band(axes, x, statistics.band(y), color, **style)
            axes.set_title(title, loc='left')
            axes.set_xlabel(label)
            if name not in reach:
                axes.set_xscale('log')
                axes.set_yscale('log')
                axes.set_xticks(settings['rhos'], [f'{x:g}' for x in settings['rhos']])
                axes.set_xticks([], minor=True)
        panels[0].set_ylabel('loss − loss at the end of training')
        for title, (color, dashes) in zip(runs, _styles(runs), strict=True):
            panels[0].plot([], [], color=color, linestyle=dashes, label=title)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside upper right', ncols=len(labels))
        figure.suptitle(
            f'{plots.title_of(summary["name"])}: mean over seeds, band from lowest to'
            ' highest',
            x=0.01,
            ha='left',
            fontsize=11,
        )
        plots.save(figure, path)


def lemma(summary: dict[str, Any], runs: Runs, path: pathlib.Path) -> None:
    """‖s‖ and its bound ρ ‖H‖ along runs: a panel for each kind of them.

    Thick lines are geometric means over seeds and mini-batches, thin ones those of
    single seeds.

    Args:
        summary: what :func:`experiments.studies.flatness.measure.measure` returns.
        runs: those of its runs that have the numbers, by title.
        path: the PNG to write.
    """
    lines = {
        'bound': ('ρ λ, the bound', '--', '#333333'),
        'first_order': ('ρ ‖H g‖ / ‖g‖, what ‖s‖ is to first order', ':', '#009E73'),
        'psf_norm': ('‖s‖, the PSF', '-', '#CC79A7'),
    }
    with matplotlib.rc_context(plots.SETTINGS):
        figure, panels = plots.new_figure(3.0 + 3.2 * len(runs), 4.2, 1, len(runs))
        panels = np.atleast_1d(panels)
        for axes, (title, group) in zip(panels, runs.items(), strict=True):
            x = [row['step'] for row in group[0]['lemma']]
            for name, (label, dashes, color) in lines.items():
                # [seeds, checkpoints]
                y = np.exp(
                    [
                        [np.mean(np.log(row[name])) for row in run['lemma']]
                        for run in group
                    ]
                )
                style: Any = {'color': color, 'linestyle': dashes}
                axes.plot(x, y.T, **style, linewidth=0.8, alpha=0.6)
                middle = np.exp(np.mean(np.log(y), axis=0))
                axes.plot(x, middle, **style, label=label, marker='o', markersize=3.5)
            axes.set_yscale('log')
            axes.set_title(title, loc='left')
            axes.set_xlabel('step')
        low = min(axes.get_ylim()[0] for axes in panels)
        high = max(axes.get_ylim()[1] for axes in panels)
        for axes in panels:
            axes.set_ylim(low, high)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower left', ncols=len(labels))
        several = any(len(group) > 1 for group in runs.values())
        over = 'seeds, thin: single ones, and ' if several else ''
        figure.suptitle(
            f'{plots.title_of(summary["name"])}: Lemma 1 along training'
            f' (geometric mean over {over}mini-batches)',
            x=0.01,
            ha='left',
            fontsize=11,
        )
        plots.save(figure, path)


def _styles(runs: Runs) -> list[tuple[str, str]]:
    """A colour for each method, a way of dashing for each of its settings."""
    seen: dict[str, int] = {}
    styles = []
    for group in runs.values():
        method = group[0]['method']
        number = seen.get(method, 0)
        seen[method] = number + 1
        color = plots.STYLES.get(method, plots.OTHER)[0]
        styles.append((color, _DASHES[number % len(_DASHES)]))
    return styles
