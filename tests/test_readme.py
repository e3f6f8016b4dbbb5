"""What README.md says: its examples run, its tables are those of the result files."""

import re

import pytest

from experiments import readme

TEXT = (readme.ROOT / 'README.md').read_text()
EXAMPLES = re.findall(r'^```python\n(.*?)^```', TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize('number', range(len(EXAMPLES)))
def test_an_example_runs_as_it_stands(number):
    exec(compile(EXAMPLES[number], f'README.md, example {number}', 'exec'), {})


def test_tables_are_made_from_the_result_files():
    assert readme.render(TEXT) == TEXT


def test_local_links_lead_somewhere():
    for link in re.findall(r'\]\(([^)#]+)\)', TEXT):
        if '://' not in link:
            assert (readme.ROOT / link).exists(), link
