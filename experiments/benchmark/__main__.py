"""What one optimizer step costs, as a multiple of the base optimizer's step.

    python -m experiments.benchmark --output=experiments/results/benchmark/cpu.json

Every way to make a step makes a few in turn, round after round, in a new order each
time; a cost is the median over the rounds of (its time / the time of SGD in the same
round), so that whatever else the machine does in a round touches both. Peers in
PyTorch take part where ``torch`` and ``pytorch_optimizer`` are installed.
"""

import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from rich import console, progress

from experiments.benchmark import (
    peak,
    problems,
    report,
    steps,
    sweeps,
    variants,
    whole_runs,
)
from experiments.common import files, program
from experiments.report import provenance, tables

PARTS = ('steps', 'sweeps', 'runs')


def why_no_torch() -> str | None:
    """Why the peers in PyTorch cannot take part, None if they can."""
    if not all(map(importlib.util.find_spec, ('torch', 'pytorch_optimizer'))):
        return 'torch and pytorch_optimizer are not installed.'
    # Not there for most, and takes seconds to import.
    from experiments.benchmark import torch_steps

    try:
        torch_steps.device()
    except RuntimeError as error:
        return str(error)
    return None


class _Benchmark:
    """A benchmark that is under way; its file always holds what there is.

    Args:
        output: the JSON file.
        screen: what is printed on.
        bars: shows how far it is.
        number: of rounds.
    """

    def __init__(
        self,
        output: pathlib.Path,
        screen: console.Console,
        bars: progress.Progress,
        number: int,
    ):
        self._output = output
        self._screen = screen
        self._bars = bars
        self._number = number
        self.content: dict[str, Any] = {
            'command': provenance.command(),
            **provenance.environment(),
            'variables': provenance.system_variables(),
            'rounds': number,
        }

    def save(self) -> None:
        files.write_json(self._output, self.content)

    def bar(self, name: str, total: int) -> Any:
        """A bar's function that moves it on by one."""
        bar = self._bars.add_task(name, total=total)
        return lambda: self._bars.advance(bar)

    def steps(
        self, names: Sequence[str], ways: tuple[str, ...], least: int, with_torch: bool
    ) -> None:
        torch_runners = None
        if with_torch:
            # Not there for most, and takes seconds to import.
            from experiments.benchmark import torch_steps

            torch_runners = torch_steps.runners
            self.content['versions'] |= torch_steps.versions()
            self.content['torch_device'] = str(torch_steps.device())
        peaks = self.content['matrix_peak'] = peak.measure()
        found = self.content['problems'] = {}
        for name in names:
            problem = problems.PROBLEMS[name]()
            found[name] = steps.measure(
                problem,
                names=ways,
                number=self._number,
                steps=least,
                torch_runners=torch_runners,
                advance=self.bar(name, self._number),
            )
            model: Any = problem.model
            highest = peaks.get(jax.numpy.dtype(model.dtype).name)
            for row in found[name]['steps'].values():
                if highest and row['flops']:
                    rate = 1e3 * row['flops'] / row['step_milliseconds']
                    row['share_of_peak'] = rate / highest
            self.save()
            tables.show(problem.full_title, *report.on_screen(found[name]))

    def sweeps(self, largest: int) -> None:
        found = self.content['sweeps'] = {}
        for name, points in sweeps.points(largest).items():
            advance = self.bar(name, self._number * len(points))
            found[name] = []
            for point in points:
                found[name].append(sweeps.measure(point, self._number, advance))
                self.save()
            tables.show(name, *report.of_sweep(name, found[name]))

    def runs(
        self, names: Sequence[str], methods: Sequence[str], windows: int, chunk: int
    ) -> None:
        found = self.content['whole_runs'] = {}
        for name in names:
            problem = problems.PROBLEMS[name]()
            found[name] = {'title': problem.full_title, 'runs': {}}
            advance = self.bar(f'{name}: whole runs', len(methods))
            for method in methods:
                found[name]['runs'][method] = whole_runs.measure(
                    problem, method, windows=windows, chunk=chunk
                )
                advance()
                self.save()
        tables.show('Whole runs', *report.of_runs(found))


def main() -> None:
    """Runs the benchmark; see the flags."""
    options: Any = flags.FLAGS
    # Two libraries share a GPU's memory.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    names = options.problems or problems.default_names()
    ways = variants.FEW if options.few else tuple(variants.VARIANTS)
    output = pathlib.Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    screen = console.Console()
    # PyTorch is not even imported where only JAX is timed.
    wants_torch = options.torch and not options.few and 'steps' in options.parts
    missing = why_no_torch() if wants_torch else None
    with_torch = wants_torch and missing is None
    if missing:
        screen.print(f'PyTorch peers are left out: {missing}')
    with progress.Progress(console=screen) as bars:
        benchmark = _Benchmark(output, screen, bars, options.rounds)
        if 'steps' in options.parts:
            benchmark.steps(names, ways, options.steps, with_torch)
        if 'sweeps' in options.parts:
            benchmark.sweeps(options.largest)
        if 'runs' in options.parts:
            methods = [
                method
                for method in whole_runs.METHODS
                if method.startswith(options.runs_of)
            ]
            benchmark.runs(names, methods, options.windows, options.chunk)
    for file in (output, *report.write(benchmark.content, output)):
        screen.print(f'written to {file}')


def define_flags() -> None:
    """Defines the flags; called by the program, not on import."""
    flags.DEFINE_multi_enum('parts', ['steps'], list(PARTS), 'What to measure.')
    flags.DEFINE_multi_enum(
        'problems',
        [],
        list(problems.PROBLEMS),
        'On what. By default what suits the device.',
    )
    flags.DEFINE_bool(
        'few',
        False,
        'Only the base optimizer, SAM and steps of vSAM one by one, in JAX.',
    )
    flags.DEFINE_integer('rounds', 11, 'How many rounds.', lower_bound=1)
    flags.DEFINE_integer('steps', 2, 'Least steps in a round.', lower_bound=1)
    flags.DEFINE_integer(
        'windows', 5, 'Chunks of whole windows that a run is timed over.', lower_bound=1
    )
    flags.DEFINE_integer(
        'chunk', whole_runs.CHUNK, 'Steps of such a chunk.', lower_bound=1
    )
    flags.DEFINE_string('runs_of', '', 'How the names of methods in runs begin.')
    flags.DEFINE_integer(
        'largest',
        10**8,
        'Parameters of the largest MLP.',
        lower_bound=1000,
    )
    flags.DEFINE_bool('torch', True, 'Whether peers in PyTorch take part.')
    flags.DEFINE_string('output', 'runs/benchmark.json', 'The result file.')


if __name__ == '__main__':
    program.run(main, define_flags)
