"""The result file, and its table in the page."""

import json
import pathlib
import re
from typing import Any

from experiments.studies.defects.finding import Finding, shown

RESULTS = pathlib.Path(__file__).parent / 'results' / 'defects.json'

_BLOCK = re.compile(
    r'(<!-- begin: defects -->[^\n]*\n).*?(<!-- end: defects -->)', re.DOTALL
)


def content_of(
    findings: list[Finding], versions: dict[str, str], command: str
) -> dict[str, Any]:
    """What the result file holds.

    Args:
        findings: the measured numbers.
        versions: of Python and of the packages that were measured.
        command: the command line.

    Returns:
        A dictionary for JSON.
    """
    return {
        'command': command,
        'versions': versions,
        'defects': {finding.name: finding.as_json() for finding in findings},
    }


def load(path: pathlib.Path = RESULTS) -> dict[str, Any]:
    """Reads a result file."""
    return json.loads(path.read_text())


def block(content: dict[str, Any]) -> str:
    """The table of a result file, in Markdown.

    Args:
        content: as :func:`content_of` makes it.

    Returns:
        Lines that end with a newline.
    """
    versions = content['versions']
    lines = [
        '| Row | Package, method | Measured quantity | Printed | Right |',
        '| --- | --- | --- | --- | --- |',
    ]
    for name, row in content['defects'].items():
        package = row['package']
        # A bar would end the cell.
        quantity = row['quantity'].replace('|', r'\|')
        lines.append(
            f'| `{name}` | {package} {versions[package]}, {row["method"]} | {quantity}'
            f' | {shown(row["measured"])} | {shown(row["right"])} |'
        )
    others = ', '.join(
        f'{name} {version}' for name, version in versions.items() if name != 'python'
    )
    return (
        '\n'.join(lines) + '\n\nRight: what the formula of the authors gives.'
        f' Python {versions["python"]}, {others}. Command: `{content["command"]}`.\n'
    )


def with_block(page: str, content: dict[str, Any]) -> str:
    """The text of a page with the table made anew.

    Args:
        page: the old text, with the markers of the table in it.
        content: as :func:`content_of` makes it.

    Returns:
        The new text.

    Raises:
        ValueError: unless the markers are there once.
    """
    table = block(content)
    new, number = _BLOCK.subn(lambda found: f'{found[1]}{table}{found[2]}', page)
    if number != 1:
        raise ValueError(f'the page must have one table of defects, got {number}.')
    return new
