"""The rows of a table of steps."""

from collections.abc import Callable, Mapping
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
        'steps': rounds.rows(problem, runners, seconds),
    }
