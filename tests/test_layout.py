"""What may import what, in the tests and in the experiments; and their examples."""

import doctest
import importlib.metadata
import pathlib
import re
import sys

import pytest

from tests import house

ROOT = pathlib.Path(__file__).parent.parent
TESTS = {
    str(path.relative_to(ROOT / 'tests')): path
    for path in sorted((ROOT / 'tests').rglob('*.py'))
}

# From the ground up: a part may import those of its own floor and of floors below.
FLOORS = (
    ('common',),
    ('data', 'models'),
    ('methods',),
    ('report', 'configs'),
    ('training',),
    ('benchmark',),
    ('train', 'tune', 'compare', 'figures', 'prepare', 'documents'),
    ('studies',),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
LEVELS = 6


# Imported where it is used; what is missing then says how to get it.
LATE = {'matplotlib'}


def test_the_library_imports_nothing_but_what_it_requires():
    required = LATE | {
        re.match(r'[\w-]+', text)[0]
        for text in importlib.metadata.requires('vsam-jax') or ()
        if 'extra ==' not in text
    }
    made_by = importlib.metadata.packages_distributions()
    for name, path in house.modules(ROOT, 'vsam_jax').items():
        for package in {x.split('.')[0] for x in house.named(path, ROOT)}:
            if package != 'vsam_jax' and package not in sys.stdlib_module_names:
                assert required & set(made_by[package]), f'{name} imports {package}'


@pytest.fixture(scope='module')
def experiments() -> dict[str, set[str]]:
    """The modules of the experiments and those that each imports."""
    return house.imports(ROOT, 'experiments')


@pytest.mark.parametrize('name', TESTS)
def test_no_file_imports_a_test(name):
    tests = [m for m in house.named(TESTS[name], ROOT) if '.test_' in f'.{m}']
    assert tests == []


@pytest.mark.parametrize('name', [n for n in TESTS if n.startswith('library')])
def test_tests_of_the_library_import_no_experiment(name):
    imported = house.named(TESTS[name], ROOT)
    assert 'experiments' not in {module.split('.')[0] for module in imported}
    assert [m for m in imported if m.startswith('tests.exp')] == []


def test_nothing_imports_upwards(experiments):
    upwards = [
        f'{name} imports {other}'
        for name, others in experiments.items()
        for other in others
        if name != 'experiments' and _floor(other) > _floor(name)
    ]
    assert upwards == []


def _floor(name: str) -> int:
    return FLOOR[name.split('.')[1]]


def test_no_study_imports_another(experiments):
    study = lambda name: name.split('.')[2] if name.count('.') > 1 else name
    between = [
        f'{name} imports {other}'
        for name, others in experiments.items()
        for other in others
        if other.startswith('experiments.studies.') and study(name) != study(other)
    ]
    assert between == []


def test_every_study_has_a_readme_that_the_house_names():
    house_text = (ROOT / 'experiments/README.md').read_text()
    for path in sorted((ROOT / 'experiments/studies').iterdir()):
        if (path / '__init__.py').exists():
            assert (path / 'README.md').exists(), path.name
            assert f'](studies/{path.name}/README.md)' in house_text, path.name


def test_chains_of_imports_are_short(experiments):
    deep = {
        name: level
        for name, level in house.levels(experiments).items()
        if level > LEVELS
    }
    assert deep == {}


def test_every_module_is_imported_or_a_program(experiments):
    # What only tests import is of no use.
    used = {other for others in experiments.values() for other in others}
    paths = house.modules(ROOT, 'experiments')
    texts = {name: path.read_text() for name, path in paths.items()}
    programs = {
        name
        for name, text in texts.items()
        if paths[name].stem == '__init__'
        or '\nif __name__ ==' in text
        or '\ndef get_config(' in text  # A configuration.
        or any(f"'{name}'" in other for other in texts.values())  # Named by one.
    }
    assert sorted(experiments.keys() - used - programs) == []


def test_imports_of_all_kinds_are_seen(tmp_path):
    path = tmp_path / 'tests' / 'library' / 'test_a.py'
    path.parent.mkdir(parents=True)
    path.write_text(
        'import a.b as c\n'
        'from tests import test_d\n'
        'def f():\n'
        '    from . import e\n'
        '    from ..g import h\n'
    )
    assert house.named(path, tmp_path) >= {
        'a.b',
        'tests.test_d',
        'tests.library.e',
        'tests.g.h',
    }
    (path.parent / 'e.py').write_text('')
    assert house.imports(tmp_path, 'tests')['tests.library.test_a'] == {
        'tests.library.e'
    }


def test_a_level_is_the_longest_way_down():
    imported = {'a': set(), 'b': {'a'}, 'c': {'a', 'b'}, 'd': {'c', 'a'}}
    assert house.levels(imported) == {'a': 1, 'b': 2, 'c': 3, 'd': 4}


EXAMPLES = [
    name
    for name, path in house.modules(ROOT, 'experiments').items()
    if '>>> ' in path.read_text()
]


# Those of the library are found by pytest.
@pytest.mark.parametrize('name', EXAMPLES)
def test_examples_of_the_experiments_run(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed
