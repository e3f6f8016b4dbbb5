"""Where the time and the memory of a planned step go.

    python -m experiments.benchmark.profile --output=runs/profile.json

What a window boundary costs, what the statistics cost, which tensors are copied,
how much memory programs need, how long they take to compile, and how many pages the
operating system has to find for them. Tables go beside the JSON file.
"""

import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from absl import flags
from rich import console

from experiments.benchmark import host, problems, programs, rounds
from experiments.common import files, program
from experiments.models import zoo
from experiments.report import provenance, tables

# As many tensors as the authors of vSAM measure.
_LAST = 10


def profile(
    problem: problems.Problem, *, number: int, steps: int, compilations: int
) -> dict[str, Any]:
    """Everything that is measured of one network.

    Args:
        problem: the network.
        number: of rounds.
        steps: least steps in a round.
        compilations: how often programs are compiled to time that.

    Returns:
        What the JSON holds of it.
    """
    found: dict[str, Any] = {'title': problem.full_title, 'base': problem.base}
    found |= programs.describe(problem)
    found['compile_seconds'] = {
        name: statistics.median(seconds)
        for name, seconds in programs.compile_seconds(problem, compilations).items()
    }
    found['resources'] = programs.resources(problem, max(2, steps))
    tensors = len(zoo.parameter_paths(problem.model, problem.shape[1:]))
    few = min(_LAST, tensors)
    last = zoo.last_tensors(problem.model, problem.shape[1:], few)
    masks = {'all tensors': None, f'the last {few}': last}
    runners = programs.statistics_cost(problem, masks)
    seconds = rounds.interleaved(runners, number, steps)
    found['statistics'] = {
        name: rounds.ratios(seconds, name, problem.base) for name in masks
    }
    found['idle_shares'] = host.idle_shares(problem, window=10, windows=3)
    return found


def markdown(content: Mapping[str, Any]) -> str:
    """All tables of a profile, from its JSON alone."""
    boundary = content['boundary']
    return ''.join(map(_of_problem, content['problems'].values())) + (
        f'A window boundary costs {1e6 * boundary["seconds_per_boundary"]:.0f} µs,'
        f' the driver {1e6 * boundary["seconds_per_call"]:.0f} µs a step (on a network'
        f' whose step takes {1e6 * boundary["step_seconds"]:.0f} µs).\n'
    )


def _of_problem(problem: Mapping[str, Any]) -> str:
    size = problem['parameter_bytes']
    rows = [
        [
            title,
            *(
                f'{program["memory"][part] / size:.2f}'
                for part in ('arguments', 'temporaries', 'outputs', 'peak')
            ),
            str(program['copies']['count']),
            f'{4 * program["copies"]["elements"] / size:.2f}',
        ]
        for title, program in problem['programs'].items()
    ]
    header = [
        'Program',
        'Arguments',
        'Temporaries',
        'Outputs',
        'Peak',
        'Copies',
        'Copied',
    ]
    text = (
        f'{problem["title"]}, memory as multiples of the parameters'
        f' ({size / 1e6:.1f} MB):\n\n{tables.markdown(header, rows)}\n'
    )
    header = ['Step', 'Page faults', 'User, ms', 'System, ms']
    rows = [
        [
            title,
            f'{row["page_faults"]:,.0f}',
            f'{1e3 * row["user_seconds"]:.1f}',
            f'{1e3 * row["system_seconds"]:.1f}',
        ]
        for title, row in problem['resources'].items()
    ]
    text += tables.markdown(header, rows) + '\n'
    compiled = ', '.join(
        f'{name}: {value:.1f} s' for name, value in problem['compile_seconds'].items()
    )
    measured = ', '.join(
        f'{name}: {cost["median"]:.2f}' for name, cost in problem['statistics'].items()
    )
    idle = ', '.join(
        f'{name}: {"unknown" if share is None else format(share, ".1%")}'
        for name, share in problem['idle_shares'].items()
    )
    return text + (
        f'Compilation: {compiled}. Sampled step × {problem["base"]}, statistics'
        f' over {measured}. Device idle, {idle}.\n\n'
    )


def main() -> None:
    """Makes the profile; see the flags."""
    options: Any = flags.FLAGS
    screen = console.Console()
    output = pathlib.Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        'command': provenance.command(),
        **provenance.environment(),
        'variables': provenance.system_variables(),
        'boundary': host.boundary(problems.PROBLEMS['tiny'](), rounds=options.rounds),
        'problems': {},
    }
    for name in options.problems or problems.default_names():
        screen.print(name)
        content['problems'][name] = profile(
            problems.PROBLEMS[name](),
            number=options.rounds,
            steps=options.steps,
            compilations=options.compilations,
        )
        files.write_json(output, content)
    output.with_suffix('.md').write_text(markdown(content))
    screen.print(markdown(content))
    screen.print(f'written to {output} and {output.with_suffix(".md")}')


def define_flags() -> None:
    """Defines the flags; called by the program, not on import."""
    flags.DEFINE_multi_enum(
        'problems',
        [],
        list(problems.PROBLEMS),
        'On what. By default what suits the device.',
    )
    flags.DEFINE_integer('rounds', 11, 'How many rounds.', lower_bound=1)
    flags.DEFINE_integer('steps', 2, 'Least steps in a round.', lower_bound=1)
    flags.DEFINE_integer('compilations', 3, 'How many are timed.', lower_bound=1)
    flags.DEFINE_string('output', 'runs/profile.json', 'The result file.')


if __name__ == '__main__':
    program.run(main, define_flags)
