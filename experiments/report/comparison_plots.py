"""Figures of comparisons, drawn from their JSON alone."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.text
import numpy as np
from matplotlib import ticker

from experiments.report import plots


def accuracy_against_cost(summary: dict[str, Any], path: pathlib.Path) -> None:
    """Test accuracy over time per step: one mark per method, a dot per seed.

    Args:
        summary: what :func:`experiments.compare.compare` returns.
        path: the PNG to write.
    """
    with matplotlib.rc_context(plots.SETTINGS):
        figure, axes = plots.new_figure(6.8, 4.2)
        labels = []
        for name, method in summary['methods'].items():
            color, marker, line = plots.style_of(name)
            fill = color if line == '-' else 'white'
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
                markerfacecolor=fill,
                capsize=3,
                elinewidth=1.4,
            )
            labels.append((f'{method["title"]}\n{y:.1f} %, {x:.2f}×', (x, y), color))
        axes.margins(x=0.2, y=0.15)
        base = summary['methods'][summary['baseline']]['title']
        axes.set_xlabel(f'time per step, as a multiple of {base}')
        axes.set_ylabel('test accuracy, %')
        axes.xaxis.set_major_locator(ticker.MaxNLocator(steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter('%.1f×'))
        seeds = len(next(iter(summary['methods'].values()))['seeds'])
        axes.set_title(
            f'{plots.title_of(summary["name"])}: accuracy against cost\n'
            f'(mean ± sd of {seeds} seeds; dots: single seeds)',
            loc='left',
        )
        plots.label_beside(figure, axes, labels)
        plots.save(figure, path)


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
    with matplotlib.rc_context(plots.SETTINGS):
        figure, panels = plots.new_figure(8.4, 6.0, 2, 2)
        for axes, (quantity, title) in zip(panels.flat, titles.items(), strict=True):
            for style, x, spread in _curves(summary, quantity):
                if quantity in ('test_accuracy', 'sampled'):
                    spread = {key: 100 * y for key, y in spread.items()}
                plots.band(axes, x, spread, **style)
            axes.set_title(title, loc='left')
            axes.set_xlabel('epoch')
            axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        panels[0, 1].set_ylim(-4, 104)
        for axes in panels[1]:
            # The two norms on one scale, so that they can be compared.
            axes.set_ylim(0, max(each.get_ylim()[1] for each in panels[1]))
        handles, labels = panels[0, 0].get_legend_handles_labels()
        columns = min(4, len(labels))
        figure.legend(handles, labels, loc='outside lower center', ncols=columns)
        network = summary['config']['model']
        figure.suptitle(
            f'{plots.title_of(summary["name"])}, {_NETWORKS.get(network, network)}:'
            f' {_spread([summary])}',
            x=0.01,
            ha='left',
            fontsize=11,
        )
        plots.save(figure, path)


def accuracy_against_speed(
    summaries: Sequence[dict[str, Any]], path: pathlib.Path
) -> None:
    """Figure 1: test accuracy over training speed, a mark per method and network.

    Args:
        summaries: what :func:`experiments.compare.compare` returns, of one network
            each; a method has a mark for each of them.
        path: the PNG to write.
    """
    # Methods have colours here, and networks markers.
    markers = dict(
        zip((each['config']['model'] for each in summaries), 'osD^vP', strict=False)
    )
    names = dict.fromkeys(name for each in summaries for name in each['methods'])
    with matplotlib.rc_context(plots.SETTINGS):
        figure, axes = plots.new_figure(7.6, 4.6)
        for name in names:
            color = plots.style_of(name)[0]
            known = [each for each in summaries if name in each['methods']]
            rows = [each['methods'][name] for each in known]
            accuracy = [100 * row['test_accuracy']['mean'] for row in rows]
            speed = [row['images_per_second']['median'] for row in rows]
            for each, row, x, y in zip(known, rows, speed, accuracy, strict=True):
                spread = row['images_per_second']
                axes.errorbar(
                    x,
                    y,
                    xerr=[[x - spread['low']], [spread['high'] - x]],
                    yerr=100 * (row['test_accuracy']['sd'] or 0),
                    color=color,
                    marker=markers[each['config']['model']],
                    markersize=7,
                    capsize=2,
                    elinewidth=1.0,
                )
            axes.plot([], [], color=color, linewidth=5, label=rows[0]['title'])
        for network, marker in markers.items():
            title = _NETWORKS.get(network, network)
            axes.plot([], [], marker, color=plots.INK, markersize=7, label=title)
        axes.set_xscale('log')
        _plain_numbers(axes.xaxis)
        axes.margins(x=0.1, y=0.1)
        axes.set_xlabel('training speed, images/s')
        axes.set_ylabel('test accuracy, %')
        axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))
        axes.set_title(
            f'{_titles(summaries)}: accuracy against training speed\n'
            f'(mean ± sd of {_seeds(summaries)}; speed: median and quartiles)',
            loc='left',
        )
        plots.save(figure, path)


def accuracy_against_bits(
    summaries: Sequence[dict[str, Any]], path: pathlib.Path
) -> None:
    """Test accuracy over the bits of weights and activations, a line per method.

    Args:
        summaries: what :func:`experiments.compare.compare` returns, of one network
            each in another number of bits; 0 bits are full precision.
        path: the PNG to write.
    """
    # Full precision comes last.
    bits = lambda summary: bits_of(summary) or 32
    ordered = sorted(summaries, key=bits)
    # What was not tried in few bits is of no interest here.
    names = dict.fromkeys(
        name for each in ordered if bits_of(each) for name in each['methods']
    )
    with matplotlib.rc_context(plots.SETTINGS):
        figure, axes = plots.new_figure(6.4, 3.8)
        for place, name in enumerate(names):
            known = [i for i, each in enumerate(ordered) if name in each['methods']]
            rows = [ordered[i]['methods'][name] for i in known]
            color, marker, line = plots.style_of(name)
            axes.errorbar(
                np.asarray(known) + 0.06 * (place - (len(names) - 1) / 2),
                [100 * row['test_accuracy']['mean'] for row in rows],
                yerr=[100 * (row['test_accuracy']['sd'] or 0) for row in rows],
                color=color,
                marker=marker,
                linestyle=line,
                capsize=2,
                elinewidth=1.0,
                label=rows[0]['title'],
            )
        labels = [
            f'{bits(each)} bits' if bits(each) < 32 else 'full precision'
            for each in ordered
        ]
        axes.set_xticks(range(len(ordered)), labels)
        axes.set_ylabel('test accuracy, %')
        axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))
        axes.set_title(
            f'{ordered[-1]["name"]}: accuracy in few bits\n'
            f'(mean ± sd of {_seeds(ordered)})',
            loc='left',
        )
        plots.save(figure, path)


def bits_of(summary: dict[str, Any]) -> int:
    """The bits of the networks of a comparison; 0 in full precision."""
    return summary['config']['quantization']['bits']


def norms(summaries: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Figure 2: ‖g‖, ‖s‖ and how much ‖s‖ changes, over training; a column a network.

    Lines are means over seeds, bands reach from the lowest to the highest.

    Args:
        summaries: what :func:`experiments.compare.compare` returns, of one network
            each.
        path: the PNG to write.
    """
    titles = {
        'grad_norm': 'gradient norm ‖g‖',
        'psf_norm': 'PSF norm ‖s‖',
        'psf_norm_change': 'change of ‖s‖ from\nsample to sample, %',
    }
    with matplotlib.rc_context(plots.SETTINGS):
        columns = len(summaries)
        figure, panels = plots.new_figure(
            2.2 + 2.7 * columns, 6.4, len(titles), columns
        )
        panels = np.reshape(panels, (len(titles), columns))
        for summary, column in zip(summaries, panels.T, strict=True):
            for (quantity, title), axes in zip(titles.items(), column, strict=True):
                for style, x, spread in _curves(summary, quantity):
                    if quantity == 'psf_norm_change':
                        spread = {key: 100 * y for key, y in spread.items()}
                    plots.band(axes, x, spread, **style)
                axes.set_ylim(bottom=0)
                axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
                if axes in panels[:, 0]:
                    axes.set_ylabel(title)
            network = summary['config']['model']
            column[0].set_title(_NETWORKS.get(network, network), loc='left')
            column[-1].set_xlabel('epoch')
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside right upper')
        figure.suptitle(
            f'{_titles(summaries)}: {_spread(summaries)}',
            x=0.01,
            ha='left',
            fontsize=11,
        )
        plots.save(figure, path)


# How networks are written in figures.
_NETWORKS = {
    'mlp': 'MLP',
    'cnn': 'CNN',
    'small_resnet': 'small ResNet',
    'resnet18': 'ResNet-18',
    'resnet50': 'ResNet-50',
    'wide_resnet': 'WideResNet',
    'pyramidnet': 'PyramidNet',
    'mobilenet': 'MobileNet',
    'vit': 'ViT',
}


def _titles(summaries: Sequence[dict[str, Any]]) -> str:
    return ', '.join(dict.fromkeys(plots.title_of(each['name']) for each in summaries))


def _seeds(summaries: Sequence[dict[str, Any]]) -> str:
    counts = {
        len(method['seeds'])
        for summary in summaries
        for method in summary['methods'].values()
    }
    text = '–'.join(map(str, sorted({min(counts), max(counts)})))
    return f'{text} seed' if counts == {1} else f'{text} seeds'


def _spread(summaries: Sequence[dict[str, Any]]) -> str:
    """What lines and bands are."""
    seeds = _seeds(summaries)
    if seeds == '1 seed':
        return seeds
    return f'mean over {seeds}, band from lowest to highest'


def _plain_numbers(axis: Any) -> None:
    """Few round numbers, written out, on a logarithmic axis."""
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.StrMethodFormatter('{x:,.0f}'))
    axis.set_minor_formatter(ticker.NullFormatter())


def _curves(
    summary: dict[str, Any], quantity: str
) -> Iterator[tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray]]]:
    """Label, colour and line, epochs, and mean and range, for each method."""
    for name, method in summary['methods'].items():
        curve = method['curves'][quantity]
        # null, where it was not finite, becomes NaN.
        spread = {key: np.asarray(curve[key], float) for key in ('mean', 'low', 'high')}
        if quantity == 'sampled':
            # Without a plan: SGD and SAF take no second gradient, ESAM always one.
            rate = method['sampling_rate']['mean']
            spread = {
                key: np.where(np.isfinite(values), values, rate)
                for key, values in spread.items()
            }
        color, _, line = plots.style_of(name)
        style = {'label': method['title'], 'color': color, 'linestyle': line}
        yield style, np.asarray(curve['epoch']), spread
