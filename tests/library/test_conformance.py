"""Runs that programs of the authors recorded come out again."""

import pytest

from tests import problems
from tests.library import conformance

pytestmark = pytest.mark.around
# One record of each program; those with other settings are slow.
FIRST = set(conformance.CASES) - set(conformance.AGAIN)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', problems.slow_but(FIRST, conformance.CASES))
def test_a_recorded_run_comes_out_again(name):
    tolerance = conformance.CASES[name].tolerance
    assert conformance.largest_difference(name) < tolerance


def test_the_page_shows_every_record():
    text = conformance.PAGE.read_text()
    for name, case in conformance.CASES.items():
        assert f'| {name} | {case.method} |' in text
