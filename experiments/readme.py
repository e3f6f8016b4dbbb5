"""Puts measured tables into README.md, so that none is typed by hand.

    python -m experiments.readme            # writes README.md
    python -m experiments.readme --check    # fails if it would change

A table stands between ``<!-- begin: name -->`` and ``<!-- end: name -->`` and is made
from a result file in ``experiments/results``.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

from experiments import compare

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = pathlib.Path(__file__).parent / 'results'


def _digits() -> str:
    summary = _load('digits/compare.json')
    seeds = len(summary['methods']['sgd']['seeds'])
    versions = summary['versions']
    return (
        compare.markdown(*compare.rows_of(summary))
        + f'\n{compare.FOOTNOTE} Mean ± sd of {seeds} seeds; {_device(summary)}, jax'
        f' {versions["jax"]}.'
        f' Command: `{summary["command"]}`.\n'
    )


def _benchmark() -> str:
    content = _load('benchmark.json')
    problems = content['problems']
    names = list(next(iter(problems.values()))['steps'])
    header = ['Step', *(problem['title'] for problem in problems.values())]
    rows = []
    for name in names:
        cells = []
        for problem in problems.values():
            cost = problem['steps'][name]['times_sgd']
            spread = f'{cost["low"]:.2f} to {cost["high"]:.2f}'
            cells.append(f'{cost["median"]:.2f} ({spread})')
        rows.append([name, *cells])
    return (
        compare.markdown(header, rows)
        + f'\nMultiples of the SGD step, median (quartiles) of {content["rounds"]}'
        f' interleaved rounds; {_device(content)}, jax {content["versions"]["jax"]}.'
        f' Command: `{content["command"]}`.\n'
    )


TABLES: dict[str, Callable[[], str]] = {'digits': _digits, 'benchmark': _benchmark}


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def _device(content: dict[str, Any]) -> str:
    device = content['device']
    if device['platform'] == 'cpu':
        return f'{device["cpu_cores"]} CPU cores ({device["machine"]})'
    return f'{device["count"]} × {device["kind"]}'


def render(text: str) -> str:
    """The text with every table made anew."""

    def table(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f'README.md: table must be one of {list(TABLES)}: {name}.')
        return f'{begin}\n{TABLES[name]()}{end}'

    pattern = r'(<!-- begin: (\w+) -->)\n.*?(<!-- end: \2 -->)'
    return re.sub(pattern, table, text, flags=re.DOTALL)


def main() -> int:
    """Writes or checks README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing')
    check = parser.parse_args().check
    file = ROOT / 'README.md'
    old = file.read_text()
    new = render(old)
    if check:
        print('README.md is ' + ('up to date' if new == old else 'out of date'))
        return int(new != old)
    file.write_text(new)
    return 0


if __name__ == '__main__':
    sys.exit(main())
