"""The rows of a table of steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.benchmark import jax_steps, rounds, variants
from experiments.benchmark.problems import Problem


def measure(
    problem: Problem,
    *,
    names: tuple[str, ...] = tuple(variants.VARIANTS),
    number: int,
    steps: int,
    torch_runners: Callable[[Problem], Mapping[str, Any]] | None,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Times all ways to make a step on one problem.

    Args:
        problem: the network.
        names: of the ways in JAX, that of the base optimizer first.
        number: of rounds.
        steps: how many steps each makes in a round, or more if they are short.
        torch_runners: makes the peers in PyTorch, None where it is not installed.
        advance: called after every round, for a progress bar.

    Returns:
        What the JSON holds of a problem.
    """
    runners: dict[str, Any] = dict(jax_steps.runners(problem, names))
    if torch_runners is not None:
        runners.update(torch_runners(problem))
    seconds = rounds.interleaved(runners, number, steps, advance)
    return {
        'title': problem.full_title,
        'base': problem.base,
        'parameters': problem.num_parameters,
        'batch_size': problem.batch_size,
        'steps': rows(problem, runners, seconds),
    }


def rows(
    problem: Problem,
    runners: Mapping[str, Any],
    seconds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """What was measured of each runner.

    Args:
        problem: the network.
        runners: by title, those of a library after that of its base optimizer.
        seconds: from :func:`rounds.interleaved`.

    Returns:
        For each title the cost as a multiple of the base optimizer of the same
        library (median and quartiles) and of ``optax.contrib.sam`` (where it is
        there), the number of rounds, milliseconds of a step, examples a second,
        seconds of compilation, operations of a step and conditionals.
    """
    bases: dict[str, str] = {}
    found = {}
    for title, runner in runners.items():
        base = bases.setdefault(runner.library, title)
        milliseconds = rounds.milliseconds(seconds[title])
        row = {
            'library': runner.library,
            'times_base': rounds.ratios(seconds, title, base),
            'rounds': len(seconds[title]),
            'step_milliseconds': milliseconds,
            'examples_per_second': 1e3 * problem.batch_size / milliseconds,
            'compile_seconds': runner.compile_seconds,
            'flops': runner.flops,
            'conditionals': runner.conditionals,
        }
        if variants.OPTAX_SAM in seconds:
            row['times_optax_sam'] = rounds.ratios(seconds, title, variants.OPTAX_SAM)
        found[title] = row
    return found
