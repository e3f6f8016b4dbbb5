"""The benchmark of a step measures what it says it measures."""

from experiments import benchmark


def test_every_variant_is_timed_and_planned_steps_hold_no_conditional():
    rounds = []
    rows = benchmark.measure(
        benchmark.PROBLEMS['tiny'](),
        rounds=2,
        steps=1,
        advance=lambda: rounds.append(1),
    )
    assert list(rows) == list(benchmark.VARIANTS)
    assert len(rounds) == 2
    for name, row in rows.items():
        assert (row['conditionals'] > 0) == ('traced' in name)
        assert row['times_sgd']['median'] > 0
        assert row['compile_seconds'] > 0
    assert rows['SGD']['times_sgd']['median'] == 1
    assert rows['optax.contrib.sam']['times_optax_sam']['median'] == 1
