"""The site: the reference has every public name; what a page loads is seen.

That pages build, that their links lead somewhere and that notebooks run is checked by
``make docs``.
"""

import collections
import importlib
import pathlib
import re
import types

import pytest

import vsam_jax
from docs._ext import offline

ROOT = pathlib.Path(__file__).parents[1]
MODULES = [
    'vsam_jax',
    *(
        f'vsam_jax.{file.stem}'
        for file in sorted((ROOT / 'vsam_jax').glob('*.py'))
        if not file.stem.startswith('_')
    ),
]


def _documented():
    """How often each name stands in the reference, by its full name."""
    found = collections.Counter()
    for page in sorted((ROOT / 'docs' / 'api').glob('*.md')):
        module = ''
        for kind, name in re.findall(
            r'^\.\. (\w+):: (vsam_jax[\w.]*|\w+)$', page.read_text(), re.MULTILINE
        ):
            if kind in ('currentmodule', 'automodule'):
                module = name
            if kind == 'automodule':
                found[name] += 1
            elif kind.startswith('auto'):
                found[f'{module}.{name}'] += 1
    return found


@pytest.mark.parametrize('module', MODULES)
def test_every_public_name_stands_in_the_reference_once(module):
    imported = importlib.import_module(module)
    documented = _documented()
    for name in imported.__all__:
        assert documented[f'{module}.{name}'] == 1, name


def test_submodules_are_public_where_the_package_says_so():
    public = {
        f'vsam_jax.{name}'
        for name in vsam_jax.__all__
        if isinstance(getattr(vsam_jax, name), types.ModuleType)
    }
    assert public == set(MODULES) - {'vsam_jax'}


LOADED = {
    'a script': '<script src="https://x.org/a.js"></script>',
    'a style': '<link rel="stylesheet" href="//x.org/a.css">',
    'a font': '<link rel="preload" as="font" href="https://x.org/a.woff2">',
    'an image': '<img src="http://x.org/a.png">',
    'one of several images': '<img srcset="a.png 1x, https://x.org/a.png 2x">',
    'a frame': '<iframe src="https://x.org"></iframe>',
    'an image in a style': '<p style="background: url(https://x.org/a.png)">',
    'a style in the page': '<style>@import "https://x.org/a.css";</style>',
    'a module': '<script>import("https://x.org/a.js")</script>',
}


@pytest.mark.parametrize('name', LOADED)
def test_what_a_page_loads_from_elsewhere_is_found(name):
    assert offline.in_page(f'<html>{LOADED[name]}</html>')


@pytest.mark.parametrize(
    'text',
    [
        '<a href="https://arxiv.org/abs/2403.08821">paper</a>',
        '<link rel="canonical" href="https://x.org/">',
        '<script src="_static/a.js"></script>',
        '<img src="data:image/png;base64,AA//">',
        '<svg xmlns="http://www.w3.org/2000/svg"></svg>',
        '<script>// see https://x.org/license</script>',
    ],
)
def test_what_a_reader_follows_is_left_alone(text):
    assert not offline.in_page(text)


def test_every_file_of_a_site_is_looked_at(tmp_path):
    (tmp_path / 'below').mkdir()
    (tmp_path / 'index.html').write_text('<p>')
    (tmp_path / 'below' / 'a.css').write_text('a { src: url("https://x.org/f.woff") }')
    (tmp_path / 'a.js').write_text('fetch("https://x.org/a")')
    found = list(offline.external(tmp_path))
    assert found == [
        (tmp_path / 'a.js', 'https://x.org/a'),
        (tmp_path / 'below' / 'a.css', 'https://x.org/f.woff'),
    ]
