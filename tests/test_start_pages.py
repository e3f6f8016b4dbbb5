"""The tutorials' marked changes are the changes between their programs, and small."""

import pathlib
import re

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / 'docs/start'
PAGES = sorted(path for path in FOLDER.glob('*.md') if path.stem != 'index')


def blocks(text: str, kind: str) -> list[tuple[int, str]]:
    """The fenced blocks of a kind, with their places."""
    found = re.finditer(rf'^```{re.escape(kind)}\n(.*?)^```', text, re.DOTALL | re.M)
    return [(match.start(), match[1]) for match in found]


def cells(text: str) -> list[tuple[int, str]]:
    return blocks(text, '{code-cell} ipython3')


def side(diff: str, marks: str) -> set[str]:
    """The lines of a diff with such marks, as they stand in a program."""
    lines = [line for line in diff.splitlines() if line and line[0] in marks]
    return {line[1:].rstrip() for line in lines if line[1:].strip()}


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_marked_changes_lead_from_one_program_to_the_next(path):
    text = path.read_text(encoding='utf-8')
    diffs = blocks(text, 'diff')
    assert diffs
    for place, diff in diffs:
        before = {x for at, cell in cells(text) if at < place for x in cell.split('\n')}
        after = next(cell for at, cell in cells(text) if at > place).split('\n')
        assert side(diff, ' -') <= before
        assert side(diff, ' +') <= set(after)
        assert not side(diff, '-') & set(after)
        assert len(side(diff, '+')) <= 3


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_they_need_what_a_user_installs(path):
    text = path.read_text(encoding='utf-8')
    assert 'file_format: mystnb' in text
    for _, cell in cells(text):
        compile(cell, path.name, 'exec')
        assert not re.search(r'\bexperiments\b', cell)
