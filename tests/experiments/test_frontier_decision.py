"""The rule by which a method becomes the recommended default, on made-up results."""

import numpy as np
import pytest

from experiments.studies.frontier import decision

COSTS = {'sgd': 1.0, 'sam': 2.0, 'steady': 1.33, 'lean': 1.1, 'rival': 1.0}


def made_up(tasks=6, seeds=5, spread=0.002, **minus_sam):
    """Accuracies: SAM gains four points, others differ from it as they are told.

    A number holds on all tasks, a list on one each; None is a missing unit.
    """
    rng = np.random.default_rng(0)
    found = {}
    for task in range(tasks):
        common = rng.normal(0, 0.02, seeds)
        noise = lambda common=common: common + rng.normal(0, spread, seeds)
        row = {'sgd': 0.86 + noise(), 'sam': 0.9 + noise()}
        for name, value in minus_sam.items():
            at = value[task] if isinstance(value, list) else value
            row[name] = None if at is None else 0.9 + at + noise()
        found[f'task{task}'] = row
    return found


def without(accuracies, name, tasks):
    """The method was not planned on some tasks."""
    return {
        task: {n: x for n, x in row.items() if n != name or task not in tasks}
        for task, row in accuracies.items()
    }


def test_the_cheapest_that_passes_is_recommended():
    found = decision.decide(made_up(steady=0.0, lean=0.001, rival=-0.03), COSTS)
    assert (found['verdict'], found['recommended']) == ('recommended', 'lean')
    assert found['methods']['rival']['status'] == decision.FAILS
    assert found['methods']['steady']['status'] == decision.PASSES
    assert found['tied'] == []


def test_a_rival_is_recommended_where_it_passes():
    found = decision.decide(made_up(lean=0.0, rival=0.0), COSTS)
    assert found['recommended'] == 'rival'


def test_if_none_passes_that_is_the_result():
    found = decision.decide(made_up(lean=-0.03, rival=-0.03), COSTS)
    assert (found['verdict'], found['recommended']) == ('none passes', None)


def test_a_mean_difference_that_may_be_below_the_margin_fails():
    # The mean is above the margin, but it is not certain.
    row = decision.judge(made_up(lean=[0.01, 0.01, 0.01, 0.01, 0.0, -0.06]), 'lean')
    assert row['minus_sam']['mean'] > decision.LOWEST > row['minus_sam']['low']
    assert 'the lower end of the mean difference is too low' in row['reasons']


def test_too_little_of_the_gain_fails():
    accuracies = made_up(lean=-0.0035)
    for row in accuracies.values():  # SAM gains one point alone.
        row['sgd'] = row['sgd'] + 0.03
    row = decision.judge(accuracies, 'lean')
    assert row['status'] == decision.FAILS
    assert row['reasons'] == ["too little of SAM's gain is kept"]
    assert row['kept'] == pytest.approx(0.65, abs=0.15)


def test_one_bad_task_fails():
    good = [0.006] * 11
    row = decision.judge(made_up(tasks=12, lean=[-0.016, *good]), 'lean')
    assert row['reasons'] == ['too bad on task0']
    assert row['broken'] == [3]
    assert row['worst']['high'] < decision.WORST
    # An interval that reaches as far as the limit does not.
    row = decision.judge(made_up(tasks=12, lean=[-0.005, *good]), 'lean')
    assert row['status'] == decision.PASSES


def test_of_equal_costs_the_better_mean_is_taken():
    accuracies = made_up(steady=0.001, lean=0.004)
    costs = {**COSTS, 'steady': 1.1, 'lean': 1.105}
    found = decision.decide(accuracies, costs)
    assert (found['recommended'], found['tied']) == ('lean', ['steady', 'lean'])
    costs['lean'] = 1.15  # No tie any more.
    assert decision.decide(accuracies, costs)['recommended'] == 'steady'


def test_nothing_is_decided_while_runs_of_a_cheaper_one_are_missing():
    accuracies = made_up(steady=0.0, lean=[0, 0, None, 0, 0, 0])
    found = decision.decide(accuracies, COSTS)
    assert (found['verdict'], found['recommended']) == ('not decided', None)
    assert found['open'] == ['lean']
    row = found['methods']['lean']
    assert row['reasons'] == ['runs are missing: task2']
    # What there is can be looked at.
    assert (row['tasks'], row['planned'], len(row['each'])) == (5, 6, 5)
    assert abs(row['minus_sam']['mean']) < 0.005
    # A dearer one that is missing changes nothing.
    found = decision.decide(accuracies, {**COSTS, 'lean': 1.5})
    assert found['recommended'] == 'steady'


def test_nothing_is_decided_without_sam_or_times():
    accuracies = made_up(lean=0.0)
    found = decision.decide(accuracies, {'sgd': 1.0})
    assert (found['verdict'], found['open']) == ('not decided', ['lean'])
    accuracies['task0']['sam'] = None
    assert decision.decide(accuracies, COSTS)['verdict'] == 'not decided'


def test_one_that_was_not_planned_everywhere_is_open_or_fails():
    lacking = ('task0', 'task1')
    passing = without(made_up(steady=0.0, rival=0.0), 'rival', lacking)
    found = decision.decide(passing, COSTS)
    assert (found['verdict'], found['open']) == ('not decided', ['rival'])
    assert found['methods']['rival']['reasons'] == ['was not run on task0, task1']
    failing = without(made_up(steady=0.0, rival=-0.03), 'rival', lacking)
    assert decision.decide(failing, COSTS)['recommended'] == 'steady'


def test_the_bootstrap_draws_tasks_and_seeds():
    # All spread is between tasks: as if each had a single seed.
    tasks = [np.full(4, value) for value in (-0.02, 0.0, 0.02, 0.04)]
    found = decision.bootstrap(tasks)
    assert found['mean'] == pytest.approx(0.01)
    error = np.std([x[0] for x in tasks]) / 2
    assert found['high'] - found['low'] == pytest.approx(3.9 * error, rel=0.15)
    # All of it is within the task.
    seeds = [np.array([-0.1, 0.1])]
    assert decision.bootstrap(seeds)['high'] == pytest.approx(0.1)
    assert decision.bootstrap([np.zeros(3)]) == {'mean': 0, 'low': 0, 'high': 0}


def test_results_that_do_not_match_are_refused():
    accuracies = made_up(lean=0.0)
    accuracies['task0']['lean'] = accuracies['task0']['lean'][:3]
    with pytest.raises(ValueError, match='task0 must have the same seeds'):
        decision.decide(accuracies, COSTS)
    with pytest.raises(ValueError, match="must hold 'sam'"):
        decision.decide({'one': {'sgd': [0.5]}}, COSTS)
    with pytest.raises(ValueError, match='at least one task'):
        decision.decide({}, COSTS)
