"""What the documents say: examples run, tables are those of the result files.

Pages in docs/start and docs/guides run when the site is built.
"""

import importlib.util
import json
import re

import pytest

from experiments import documents
from experiments.studies.controllers import report as controllers_report
from experiments.studies.defects import report as defects
from experiments.studies.flatness import report as flatness
from experiments.studies.noise import __main__ as noise

FILES = {file.name: file for file in documents.documents()}
# What people read besides, by its place.
READ = {
    str(file.relative_to(documents.ROOT)): file
    for file in (
        *FILES.values(),
        *documents.MEASURED.glob('*.md'),
        *documents.EXPERIMENTS.rglob('README.md'),
    )
}
RESULTS = sorted(
    str(file.relative_to(documents.ROOT))
    for file in documents.EXPERIMENTS.rglob('results/**/*.json')
)
EXAMPLES = [
    pytest.param(file, example, id=f'{name} {number}')
    for name, file in FILES.items()
    for number, example in enumerate(
        re.findall(r'^```python\n(.*?)^```', file.read_text(), re.DOTALL | re.MULTILINE)
    )
]


@pytest.mark.parametrize(('file', 'example'), EXAMPLES)
def test_an_example_runs_as_it_stands(file, example):
    exec(compile(example, str(file), 'exec'), {})


def test_tables_are_made_from_the_result_files():
    for file, text in documents.made().items():
        assert file.read_text() == text, file


def test_pages_include_the_tables_that_are_made():
    included = set()
    for page in (documents.ROOT / 'docs').rglob('*.md'):
        for place in re.findall(
            r'^```{include} (\S*measured/\S+)', page.read_text(), re.M
        ):
            file = (page.parent / place).resolve()
            assert file.exists(), (page, place)
            included.add(file)
    assert included <= documents.made().keys()
    assert set(documents.MEASURED.iterdir()) <= documents.made().keys()


def test_what_studies_wrote_is_made_from_their_numbers():
    studies = documents.EXPERIMENTS / 'studies'
    minima, lemma, controllers = (
        studies / name / 'results' / place
        for name, place in (
            ('flatness', 'noisy'),
            ('flatness', 'lemma1'),
            ('controllers', ''),
        )
    )
    measured = {
        path: json.loads((path / 'flatness.json').read_text())
        for path in (minima, lemma)
    }
    drawn = json.loads((studies / 'noise/results/noise.json').read_text())
    made = {
        minima / 'table.md': flatness.markdown(measured[minima]),
        lemma / 'table.md': flatness.markdown(measured[lemma]),
        lemma / 'lemma1.md': flatness.lemma(measured[lemma]),
        studies / 'noise/results/noise.md': noise.markdown(drawn),
        studies / 'defects/results/table.md': defects.table(defects.load()),
        controllers / 'summary.md': controllers_report.summary(
            controllers_report.load(controllers),
            controllers_report.load(controllers / controllers_report.FRESH),
        ),
    }
    for file, text in made.items():
        assert file.read_text() == text, file


@pytest.mark.parametrize('name', READ)
def test_local_links_lead_somewhere(name):
    for link in re.findall(r'\]\(([^)]+)\)', READ[name].read_text()):
        if '://' not in link:
            path, _, anchor = link.partition('#')
            target = READ[name].parent / path if path else READ[name]
            assert target.exists(), link
            if anchor:
                assert anchor in _anchors(target.read_text()), link


@pytest.mark.parametrize('name', [*READ, 'Makefile', *RESULTS])
def test_commands_name_programs_and_configurations_that_are_there(name):
    text = (documents.ROOT / name).read_text()
    for module in set(re.findall(r'-m (experiments(?:\.\w+)+)', text)):
        assert importlib.util.find_spec(module), module
    for file in set(re.findall(r'--config=(experiments/[\w/]+\.py)', text)):
        assert (documents.ROOT / file).exists(), file


def _anchors(text: str) -> set[str]:
    """Those of the headings, as code hosts name them."""
    headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
    kept = (re.sub(r'[^\w\- ]', '', heading.lower()) for heading in headings)
    return {heading.replace(' ', '-') for heading in kept}
