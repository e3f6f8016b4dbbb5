"""The result file, and its table."""

import json
import pathlib
from typing import Any

from experiments.studies.defects.finding import Finding, shown

RESULTS = pathlib.Path(__file__).parent / 'results' / 'defects.json'


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


def table(content: dict[str, Any]) -> str:
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
