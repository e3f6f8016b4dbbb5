"""What tests may import: no other test, and those of the library no experiment."""

import ast
import pathlib

import pytest

TESTS = pathlib.Path(__file__).parent
FILES = {str(path.relative_to(TESTS)): path for path in sorted(TESTS.rglob('*.py'))}


def imported(path: pathlib.Path) -> set[str]:
    """The modules that a file names where it imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(TESTS.parent).parts[: -node.level]
            base = '.'.join((*(package if node.level else ()), *_parts(node.module)))
            # What is imported from a package may be a module of it.
            found |= {base, *(f'{base}.{alias.name}' for alias in node.names)}
    return found


def _parts(name: str | None) -> list[str]:
    return name.split('.') if name else []


@pytest.mark.parametrize('name', FILES)
def test_no_file_imports_a_test(name):
    tests = [m for m in imported(FILES[name]) if '.test_' in f'.{m}']
    assert tests == []


@pytest.mark.parametrize('name', [n for n in FILES if n.startswith('library')])
def test_tests_of_the_library_import_no_experiment(name):
    modules = {module.split('.')[0] for module in imported(FILES[name])}
    experiments = [m for m in imported(FILES[name]) if m.startswith('tests.exp')]
    assert 'experiments' not in modules
    assert experiments == []


def test_imports_of_all_kinds_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr('tests.test_layout.TESTS', tmp_path / 'tests')
    path = tmp_path / 'tests' / 'library' / 'test_a.py'
    path.parent.mkdir(parents=True)
    path.write_text(
        'import a.b as c\n'
        'from tests import test_d\n'
        'def f():\n'
        '    from . import e\n'
        '    from ..g import h\n'
    )
    assert imported(path) >= {
        'a.b',
        'tests.test_d',
        'tests.library.e',
        'tests.g.h',
    }
