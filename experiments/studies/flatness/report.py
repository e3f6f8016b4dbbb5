"""Tables and figures of flatness, made from the JSON of a measurement alone."""

import math
import pathlib
from typing import Any

from experiments.methods import titles
from experiments.report import statistics, tables
from experiments.studies.flatness import plots

# What says nothing about how a run went.
_ASIDE = (
    'name',
    'seed',
    'dispatch',
    'log_every',
    'eval_every',
    'checkpoint_every',
    'checkpoint_keep',
)


def groups(summary: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs that differ in nothing but the seed, by a title that tells them apart.

    Args:
        summary: what :func:`experiments.studies.flatness.measure.measure` returns.

    Returns:
        Runs by title, in the order in which they come: ``'SAM'``, or ``'SAM, rho 0.1'``
        where there are runs of the same method with other settings.
    """
    flat = [_flat(run['config']) for run in summary['runs']]
    titled: dict[str, list[dict[str, Any]]] = {}
    for run, own in zip(summary['runs'], flat, strict=True):
        alike = [other for other in flat if other['method'] == run['method']]
        keys = dict.fromkeys(key for other in alike for key in other)
        name = run['method']
        kind = titles.title(name, run['config']['methods'][name]) + ''.join(
            f', {key.rsplit(".", 1)[-1]} {own.get(key)}'
            for key in keys
            if any(other.get(key) != own.get(key) for other in alike)
        )
        titled.setdefault(kind, []).append(run)
    # Others after those that have a title.
    order = {name: place for place, name in enumerate(titles.TITLES)}
    place = lambda item: order.get(item[1][0]['method'], len(order))
    return dict(sorted(titled.items(), key=place))


def _flat(settings: Any, where: str = '') -> dict[str, Any]:
    """Settings by their dotted path, without those that say nothing of a run."""
    if not isinstance(settings, dict):
        return {where: settings}
    return {
        path: value
        for key, item in settings.items()
        if where or key not in _ASIDE
        for path, value in _flat(item, f'{where}.{key}' if where else key).items()
    }


def measures(summary: dict[str, Any]) -> dict[str, Any]:
    """What the table shows: a function of a run, by title."""
    rises = {
        f'loss rise at ρ = {rho:g}': lambda run, i=i: run['loss_rise'][i]
        for i, rho in enumerate(summary['settings']['rhos'])
    }
    return {
        'test accuracy, %': lambda run: 100 * run['test_accuracy'],
        'loss': lambda run: run['loss'],
        'weight norm': lambda run: run['weight_norm'],
        'λ max': lambda run: run['eigenvalues'][0],
        'λ max, per filter': lambda run: run['relative_eigenvalue'],
        'λ min': lambda run: run['smallest_eigenvalue'],
        'trace': lambda run: run['trace'],
        **rises,
    }


# Of these a ratio says nothing.
_NO_RATIO = ('test accuracy, %', 'loss', 'weight norm', 'λ min')


def table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a measure per row, methods and their ratios in columns."""
    runs = groups(summary)
    reference = _reference(runs)
    others = [title for title in runs if title != reference]
    header = ['', *runs, *(f'{title} / {reference}' for title in others)]
    rows = []
    for name, value in measures(summary).items():
        row = [name]
        for group in runs.values():
            numbers = statistics.summary(map(value, group))
            sd = numbers['sd']
            spread = '' if sd is None else f' ± {_short(sd, 2)}'
            row.append(_short(numbers['mean']) + spread)
        for title in others:
            text = (
                '' if name in _NO_RATIO else _ratio(runs[title], runs[reference], value)
            )
            row.append(text)
        rows.append(row)
    return header, rows


def _reference(runs: dict[str, list[dict[str, Any]]]) -> str:
    """SAM's runs, the first if there are several kinds; else the first of all."""
    sam = [title for title, group in runs.items() if group[0]['method'] == 'sam']
    return (sam or list(runs))[0]


def _ratio(
    group: list[dict[str, Any]], reference: list[dict[str, Any]], value: Any
) -> str:
    """Geometric mean of the ratios of runs of the same seed, with its interval."""
    theirs = {run['seed']: value(run) for run in reference}
    pairs = [(value(run), theirs.get(run['seed'], math.nan)) for run in group]
    pairs = [pair for pair in pairs if not math.isnan(pair[1])]
    if not pairs or min(min(pair) for pair in pairs) <= 0:
        return '–'
    logs = [[math.log(number) for number in side] for side in zip(*pairs, strict=True)]
    difference = statistics.paired(*logs)
    text = _short(math.exp(difference['mean']))
    # That of two seeds spans a factor of thousands.
    if len(pairs) < 3:
        return text
    low, high = (_short(math.exp(difference[end])) for end in ('low', 'high'))
    return f'{text} [{low}, {high}]'


def _short(value: float, digits: int = 3) -> str:
    """A number with so many digits; thousands whole."""
    whole = 1000 <= abs(value) < 1e6
    text = f'{value:,.0f}' if whole else f'{value:.{digits}g}'
    return text.replace('-', '−')


def footnote(summary: dict[str, Any]) -> str:
    """What the numbers of the table are."""
    run, mode = summary['runs'][0], summary['settings']['mode']
    normalised = {'train': 'of the mini-batch', 'eval': 'that run along'}[mode]
    return (
        'Mean ± sd over seeds, at the end of training, of the loss on'
        f' {run["examples"]} training examples with the labels of the run, in'
        ' mini-batches of'
        f' {run["config"]["batch_size"]}, BatchNorm with the statistics {normalised}.'
        ' λ: eigenvalues of the Hessian; per filter: where the length of each filter is'
        ' the unit, which does not depend on scales that a normalisation takes away.'
        ' Loss rise: L(w + ρ g/‖g‖) − L(w), each mini-batch along its own gradient.'
        ' Ratios: geometric means over seeds, with 95 % intervals (t) from three'
        ' seeds on.'
    )


def markdown(summary: dict[str, Any]) -> str:
    """The table, what its numbers are, and how they were made."""
    return (
        f'{tables.markdown(*table(summary))}\n{footnote(summary)} Command:'
        f' `{summary["command"]}`.\n'
    )


def lemma(summary: dict[str, Any]) -> str:
    """How Lemma 1 held, in a sentence."""
    margins = [
        bound / norm
        for run in summary['runs']
        for row in run['lemma']
        for bound, norm in zip(row['bound'], row['psf_norm'], strict=True)
    ]
    held = sum(margin >= 1 for margin in margins)
    spread = statistics.quartiles(margins)
    return (
        f'The bound held on {held} of {len(margins)} mini-batches; it is'
        f' {spread["median"]:.1f} times ‖s‖ (quartiles {spread["low"]:.1f} and'
        f' {spread["high"]:.1f}). Command: `{summary["command"]}`.\n'
    )


def write(summary: dict[str, Any], path: pathlib.Path) -> list[pathlib.Path]:
    """Writes the table and the figures beside the JSON."""
    files = [path / 'table.md', path / 'flatness.png']
    files[0].write_text(markdown(summary))
    runs = groups(summary)
    plots.minima(summary, runs, files[1])
    runs = {
        title: with_lemma
        for title, group in runs.items()
        if (with_lemma := [run for run in group if run['lemma']])
    }
    if runs:
        files += [path / 'lemma1.png', path / 'lemma1.md']
        plots.lemma(summary, runs, files[-2])
        files[-1].write_text(lemma(summary))
    return files
