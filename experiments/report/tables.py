"""Tables of results, on a terminal and in Markdown."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

FOOTNOTE = (
    'Accuracy on test examples after the last epoch; * at the epoch that was best on'
    ' the validation examples, as with early stopping. Time of a training step:'
    ' median and quartiles of interleaved rounds. Sampled: the share of steps with a'
    ' second gradient.'
)
DIFFERENCES = (
    ' Differences are those of runs of the same seed, in points of accuracy, with'
    ' 95 % intervals (t).'
)


def quartiles(cost: Mapping[str, Any] | None) -> str:
    """Median and, if known, quartiles as text; a dash where nothing was measured."""
    if cost is None:
        return '–'
    if 'low' not in cost:
        return f'{cost["median"]:.2f}'
    return f'{cost["median"]:.2f} ({cost["low"]:.2f}–{cost["high"]:.2f})'


def of_comparison(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of a comparison."""
    baseline = summary['methods'][summary['baseline']]['title']
    # Narrow enough for a terminal of 80 columns.
    on_test = any(row['best_on'] == 'test' for row in summary['methods'].values())
    header = [
        'Method',
        'ρ',
        'Accuracy, %',
        'Best on test, %' if on_test else 'Best epoch*, %',
        f'Time ({baseline} = 1)',
        'Sampled',
    ]
    rows = []
    for method in summary['methods'].values():
        rows.append(
            [
                method['title'],
                str(method['settings'].get('rho', '–')),
                percent(method['test_accuracy']),
                percent(method['best_test_accuracy']),
                quartiles(method['relative_time']),
                f'{method["sampling_rate"]["mean"]:.2f}',
            ]
        )
    return header, rows


def of_differences(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the paired differences of a comparison."""
    methods = summary['methods']
    compared = {other for row in methods.values() for other in row['differences']}
    others = [name for name in methods if name in compared]
    header = ['Method', *(f'− {methods[other]["title"]}, points' for other in others)]
    rows = [
        [
            method['title'],
            *(points(method['differences'].get(other)) for other in others),
        ]
        for name, method in methods.items()
        if name != summary['baseline']
    ]
    return header, rows


def percent(accuracy: dict[str, Any]) -> str:
    """Mean ± standard deviation of shares, in per cent."""
    sd = accuracy['sd']
    spread = '' if sd is None else f' ± {100 * sd:.1f}'
    return f'{100 * accuracy["mean"]:.1f}{spread}'


def points(difference: dict[str, Any] | None) -> str:
    """Mean difference of shares and its interval, in points."""
    return _difference(difference, 100, 1)


def bits(difference: dict[str, Any] | None) -> str:
    """Mean difference of losses per byte in nats and its interval, in bits."""
    return _difference(difference, 1 / math.log(2), 3)


def _difference(difference: dict[str, Any] | None, scale: float, digits: int) -> str:
    if difference is None:
        return '–'
    mean, low, high = (
        None if value is None else f'{scale * value:+.{digits}f}'
        for value in (difference['mean'], difference['low'], difference['high'])
    )
    text = str(mean) if low is None else f'{mean} [{low}, {high}]'
    return text.replace('-', '−')


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table as Markdown."""
    lines = [header, ['---'] * len(header), *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal."""
    table = Table(title=title, title_justify='left')
    for name in header:
        table.add_column(name, justify='left' if name == header[0] else 'right')
    for row in rows:
        table.add_row(*row)
    Console().print(table)
