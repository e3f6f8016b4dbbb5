"""The rule by which a method becomes the recommended default."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report import statistics

TEXT = """\
Pooled over all tasks, a method is compared with SAM on the same seeds, in points of
test accuracy; of text that is the accuracy of the next byte. Intervals of a task are
those of a t test over seeds, the pooled one that of a hierarchical bootstrap: tasks are
drawn with replacement, then seeds of each. All are of 95 %. A method passes if

1. the lower end of its mean difference from SAM is at least −0.5 points;
2. on average it keeps at least 80 % of what SAM gains over SGD: its mean difference
   from SGD divided by SAM's;
3. on no task the upper end of its difference from SAM is below −1 point.

The cheapest method that passes is the recommended default, whoever made it. How cheap
it is, is the measured time of whole runs as a multiple of SGD's, the geometric mean
over networks; where costs are within 1 % of each other, the one with the better mean
difference is taken. If none passes, that is the result.

Nothing is decided about a method while a run of it that was planned is missing, or its
time. One that was planned for some of the tasks alone fails if it fails there; if it
passes there it is open, and no dearer one is recommended before it is run on the rest.
"""
# In shares, not points.
LOWEST = -0.005
KEPT = 0.8
WORST = -0.01
# Costs closer than that are the same.
SAME_COST = 0.01
DRAWS = 10_000

PASSES, FAILS, OPEN = 'passes', 'fails', 'not decided'

# By task and method the accuracy of each seed, None where runs are missing; a method is
# not there where it was not planned.
Accuracies = Mapping[str, Mapping[str, Sequence[float] | None]]


def decide(accuracies: Accuracies, costs: Mapping[str, float]) -> dict[str, Any]:
    """Applies the rule (:data:`TEXT`).

    Args:
        accuracies: by task and method, shares, one per seed; seeds of a task are the
            same for all methods. SGD (``'sgd'``) and SAM (``'sam'``) are among them.
        costs: measured times of whole runs by method, SGD's being 1.

    Returns:
        ``verdict``: ``'recommended'``, ``'none passes'`` or ``'not decided'``;
        ``recommended``, a method or None; ``tied``, those that cost the same; ``open``,
        those that must be decided first; and ``methods``: what :func:`judge` says of
        each, with its ``cost``.

    Raises:
        ValueError: if a task lacks SAM or SGD, or seeds do not match.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> seeds = rng.normal(0, 0.002, 5)
        >>> found = decide(
        ...     {
        ...         task: {'sgd': 0.9 + seeds, 'sam': sam + seeds, 'lean': sam + seeds}
        ...         for task, sam in (('one', 0.93), ('two', 0.95))
        ...     },
        ...     {'sgd': 1.0, 'sam': 2.0, 'lean': 1.1},
        ... )
        >>> found['verdict'], found['recommended']
        ('recommended', 'lean')
    """
    _check(accuracies)
    names = dict.fromkeys(name for row in accuracies.values() for name in row)
    judged = {
        name: {**judge(accuracies, name), 'cost': costs.get(name)}
        for name in names
        if name not in ('sgd', 'sam')
    }
    for row in judged.values():
        if row['cost'] is None and row['status'] == PASSES:
            row.update(status=OPEN, reasons=['its time was not measured'])
    passing = {name: row for name, row in judged.items() if row['status'] == PASSES}
    least = min((row['cost'] for row in passing.values()), default=math.inf)
    same = lambda cost: cost <= least * (1 + SAME_COST)
    rivals = [
        name
        for name, row in judged.items()
        if row['status'] == OPEN and (row['cost'] is None or same(row['cost']))
    ]
    tied = [name for name, row in passing.items() if same(row['cost'])]
    best = max(tied, key=lambda name: passing[name]['minus_sam']['mean'], default=None)
    verdict = 'not decided' if rivals else 'recommended' if best else 'none passes'
    return {
        'verdict': verdict,
        'recommended': None if rivals else best,
        'tied': tied if len(tied) > 1 else [],
        'open': rivals,
        'methods': judged,
    }


def judge(accuracies: Accuracies, name: str) -> dict[str, Any]:
    """What the rule says of one method, whatever it costs.

    Args:
        accuracies: as in :func:`decide`.
        name: the method.

    Returns:
        ``status`` and ``reasons``; ``tasks``, on how many of those ``planned`` no run
        is missing; and of these, if there are any, the numbers of the conditions that
        are ``broken``, ``minus_sam`` (mean, ``low`` and ``high``), ``kept``, the share
        of SAM's gain, ``each``, the difference on each task, and ``worst``, the one
        whose upper end is lowest.
    """
    planned = {task: row for task, row in accuracies.items() if name in row}
    missing = [
        task
        for task, row in planned.items()
        if any(row[other] is None for other in ('sgd', 'sam', name))
    ]
    complete = {task: row for task, row in planned.items() if task not in missing}
    found = {'tasks': len(complete), 'planned': len(planned)}
    unknown = [f'runs are missing: {", ".join(missing)}'] if missing else []
    if not complete:
        return {**found, 'status': OPEN, 'reasons': unknown}
    minus_sam = _differences(complete, name, 'sam')
    gain = np.mean([np.mean(x) for x in _differences(complete, 'sam', 'sgd').values()])
    pooled = bootstrap(list(minus_sam.values()))
    kept = 1 + pooled['mean'] / gain if gain > 0 else None
    intervals = {
        task: statistics.paired(values.tolist(), [0.0] * len(values))
        for task, values in minus_sam.items()
    }
    upper = lambda task: (
        intervals[task]['mean']
        if intervals[task]['high'] is None
        else intervals[task]['high']
    )
    worst = min(intervals, key=upper)
    # By the number that the condition has in the text.
    broken = {}
    if pooled['low'] < LOWEST:
        broken[1] = 'the lower end of the mean difference is too low'
    if kept is not None and kept < KEPT:
        broken[2] = "too little of SAM's gain is kept"
    if upper(worst) < WORST:
        broken[3] = f'too bad on {worst}'
    reasons = [*broken.values()]
    status = FAILS if reasons else PASSES
    if not reasons and kept is None:
        status, reasons = OPEN, ['SAM gains nothing that could be kept']
    if not reasons and len(planned) < len(accuracies):
        lacking = [task for task in accuracies if task not in planned]
        status, reasons = OPEN, [f'was not run on {", ".join(lacking)}']
    if unknown:
        status, reasons = OPEN, unknown
    return {
        **found,
        'status': status,
        'reasons': reasons,
        'broken': [*broken],
        'minus_sam': pooled,
        'kept': kept,
        'worst': {'task': worst, **intervals[worst]},
        'each': intervals,
    }


def bootstrap(
    differences: Sequence[np.ndarray], draws: int = DRAWS, seed: int = 0
) -> dict[str, float]:
    """The mean over tasks, and its 95 % interval by a hierarchical bootstrap.

    Args:
        differences: of each task, [seeds].
        draws: how many samples are drawn.
        seed: of the random numbers.

    Returns:
        ``mean``, ``low`` and ``high``. Every task counts the same, however many seeds
        it has.
    """
    rng = np.random.default_rng(seed)
    number = len(differences)
    # Wherever a task is drawn it has seeds of its own.
    means = np.stack(
        [
            values[rng.integers(len(values), size=(draws, number, len(values)))].mean(2)
            for values in differences
        ]
    )
    tasks = rng.integers(number, size=(draws, number))
    drawn = np.take_along_axis(means, tasks[None], axis=0)[0].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    mean = float(np.mean([np.mean(values) for values in differences]))
    return {'mean': mean, 'low': float(low), 'high': float(high)}


def _differences(rows: Any, name: str, other: str) -> dict[str, np.ndarray]:
    return {task: np.subtract(row[name], row[other]) for task, row in rows.items()}


def _check(accuracies: Accuracies) -> None:
    if not accuracies:
        raise ValueError('accuracies must hold at least one task, got none.')
    for task, row in accuracies.items():
        for name in ('sgd', 'sam'):
            if name not in row:
                raise ValueError(f'accuracies of {task} must hold {name!r}.')
        lengths = {name: len(x) for name, x in row.items() if x is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f'all methods on {task} must have the same seeds, got {lengths} values.'
            )
