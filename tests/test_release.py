"""The files around the code: version, changelog, citation, workflows, issue forms."""

import re
import shutil

import pytest
import yaml

import vsam_jax
from experiments.methods import registry
from tests import problems, release
from tests.library import conformance

ROOT = release.ROOT
WORKFLOWS = sorted((ROOT / '.github/workflows').glob('*.yml'))
FORMS = sorted((ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml'))


def test_version_and_date_agree():
    assert release.found(ROOT)['vsam_jax/__init__.py'][0] == vsam_jax.__version__
    # While one works there are entries that no version has yet.
    assert [line for line in release.disagreements(ROOT) if 'must be' in line] == []


@pytest.mark.parametrize(
    ('name', 'old', 'new', 'message'),
    [
        ('CITATION.cff', r'^version: .*', 'version: 9.9.9', 'CITATION.cff: 9.9.9'),
        ('CHANGELOG.md', r'^## \[\d.*', '## [9.9.9] - 2000-01-01', 'version .*9.9.9'),
        ('CHANGELOG.md', r'^(## \[\d.*\]) - .*', r'\1 - soon', 'date .*: soon'),
        ('CHANGELOG.md', r'^## \[Unr.*', '## [Unreleased]\n\n- More', 'has entries'),
        ('vsam_jax/__init__.py', '^__version__.*', '', '__init__.py: None'),
    ],
)
def test_what_disagrees_is_named(name, old, new, message, tmp_path):
    for place in release.PLACES:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / place, tmp_path / place)
    file = tmp_path / name
    file.write_text(re.sub(old, new, file.read_text(), count=1, flags=re.M))
    lines = release.disagreements(tmp_path)
    assert re.search(message, '\n'.join(lines))


def test_the_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['type'] == 'software'
    (paper,) = citation['references']
    assert paper['url'] == 'https://arxiv.org/abs/2403.08821'


def test_what_contributing_names_exists():
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    paths = re.findall(r'`((?:vsam_jax|tests|experiments)/[\w./]+)`', text)
    assert len(paths) > 10
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert missing == ['tests/library/golden/authors/newsam.npz']  # To be made.
    for name in ('METHODS', *re.findall(r'`([A-Z_]{5,})`', text)):
        places = (problems, conformance, registry)
        assert any(hasattr(place, name) for place in places), name


def test_workflows_call_make_and_nothing_else():
    assert [path.stem for path in WORKFLOWS] == ['check', 'docs', 'test']
    for path in WORKFLOWS:
        text = path.read_text()
        (job,) = yaml.safe_load(text)['jobs'].values()
        runs = [step['run'] for step in job['steps'] if 'run' in step]
        assert runs == [f'make {path.stem}']
        assert 'secrets' not in text


def test_workflows_run_on_every_python_that_is_supported():
    supported = set(
        re.findall(r'Python :: (3\.\d+)"', (ROOT / 'pyproject.toml').read_text(), re.M)
    )
    for name in ('check', 'test'):
        workflow = yaml.safe_load((ROOT / f'.github/workflows/{name}.yml').read_text())
        versions = workflow['jobs'][name]['strategy']['matrix']['python']
        assert set(versions) == supported


@pytest.mark.parametrize('path', FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_complete(path):
    form = yaml.safe_load(path.read_text())
    assert {'name', 'description', 'body'} <= form.keys()
    ids = [part['id'] for part in form['body']]
    assert len(set(ids)) == len(ids) > 0
    assert all(part['attributes']['label'] for part in form['body'])
