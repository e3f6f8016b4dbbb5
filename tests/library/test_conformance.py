"""Runs that programs of the authors recorded come out again."""

import pytest

from tests.library import conformance


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', conformance.CASES)
def test_a_recorded_run_comes_out_again(name):
    tolerance = conformance.CASES[name].tolerance
    assert conformance.largest_difference(name) < tolerance
