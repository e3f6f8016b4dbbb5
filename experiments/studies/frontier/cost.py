r"""What runs cost: time and memory of each method as multiples of SGD's.

    python -m experiments.studies.frontier.cost

Each method trains a network from its first step on, a chunk of steps in turn, in a new
order each round, so that whatever else the machine does touches all of them. Written to
``results/cost.json``, network by network; what is there is not measured again.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments.benchmark import programs
from experiments.common import configuration, files, names, progress, quantities, timing
from experiments.configs import cifar100_small
from experiments.data import sources
from experiments.methods.compared import METHODS, config_of
from experiments.report import provenance, statistics, tables
from experiments.studies.frontier.tasks import TASKS
from experiments.training.experiment import build
from experiments.training.speed import Running

RESULTS = pathlib.Path(__file__).parent / 'results' / 'cost.json'
# A multiple of how often each method takes a second gradient.
CHUNK = 30


class Network(NamedTuple):
    """What is trained.

    Attributes:
        title: how it is called in tables.
        config: makes the configuration.
        pair: ρ of SAM and the learning rate.
        steps: the length of the run; None for that of the configuration.
    """

    title: str
    config: Callable[[], Any]
    pair: tuple[float, float]
    steps: int | None = None


def _task(name: str, pair: tuple[float, float], steps: int | None = None) -> Network:
    return Network(TASKS[name].title, TASKS[name].config, pair, steps)


def _images(model: str, batch_size: int, **settings: Any) -> Any:
    """Random images in the size of CIFAR's."""
    config: Any = cifar100_small.get_config('few')
    config.data = {'name': 'synthetic', 'train': 10 * batch_size, 'num_classes': 20}
    config.model, config.batch_size = model, batch_size
    config.models[model].update(settings)
    return configuration.with_values(
        config, {'eval_every': 1, 'log_every': 1, 'checkpoint_every': 0}
    )


NETWORKS = {
    'cnn': _task('cnn_600', (1.0, 0.06)),
    'small_resnet': _task('cifar', (0.2, 0.2), 300),
    'decoder': _task('bytes_256', (0.2, 1e-3), 150),
    'wide_resnet': Network(
        'WideResNet-16-2, batch 64',
        functools.partial(_images, 'wide_resnet', 64, depth=16, width=2, stem_stride=1),
        (0.1, 0.1),
        90,
    ),
}


def _sampled(run: Running) -> float:
    return run.experiment.counts(run.state)['num_samples'] / run.step


def _memory(run: Running) -> int:
    """Bytes of the largest of its programs, as the compiler counts them."""
    function: Any = run.experiment.step.function
    decisions = run.experiment.method.programs
    jitted = [function.program(d) for d in decisions] or [function]
    compiled = [p.lower(run.state, run.batch).compile() for p in jitted]
    return max(programs.memory(executable)['peak'] for executable in compiled)


def measure(
    network: Network,
    methods: Iterable[str],
    repeats: int = 1,
    advance: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Times and memory of methods on a network.

    Args:
        network: the network.
        methods: names, ``'sgd'`` among them.
        repeats: how often each of them trains the network.
        advance: called after every round.

    Returns:
        Its ``title``, ``parameters``, ``steps``, ``repeats``, and for each of the
        ``methods`` ``times_sgd`` (the time of all steps), ``of_chunks`` (median and
        quartiles of the ratios of a round), ``step_milliseconds``, ``sampled``,
        ``memory_bytes`` and ``memory_times_sgd``.
    """
    config = network.config()
    dataset = sources.load(config.data)
    per_epoch = dataset.train.size // config.batch_size
    steps = network.steps or config.epochs * per_epoch
    rounds = max(steps // CHUNK, 1)
    config = configuration.with_values(
        config, {'epochs': -(-rounds * CHUNK // per_epoch)}
    )
    rho, rate = network.pair
    experiments = {
        name: build(
            config_of(config, name, rho * METHODS[name].centre, rate, seed=0), dataset
        )
        for name in methods
    }
    runs: dict[str, Running] = {}
    seconds: dict[str, list[float]] = {name: [] for name in experiments}
    for _ in range(repeats):
        # From their first steps on: what a method does changes in a run.
        runs = {name: Running(each) for name, each in experiments.items()}
        chunks = {
            name: functools.partial(
                timing.seconds_of, functools.partial(run.chunk, CHUNK)
            )
            for name, run in runs.items()
        }
        taken = timing.interleaved(chunks, rounds, skipped=0, advance=advance)
        for name, found in taken.items():
            seconds[name] += found
    memory = {name: _memory(run) for name, run in runs.items()}
    sgd = seconds['sgd']
    leaves = jax.tree.leaves(runs['sgd'].state.params)
    return {
        'title': network.title,
        'parameters': sum(leaf.size for leaf in leaves),
        'steps': rounds * CHUNK,
        'repeats': repeats,
        'methods': {
            name: {
                'times_sgd': sum(taken) / sum(sgd),
                'of_chunks': statistics.quartiles(
                    a / b for a, b in zip(taken, sgd, strict=True)
                ),
                'step_milliseconds': 1e3 * sum(taken) / len(taken) / CHUNK,
                'sampled': _sampled(runs[name]),
                'memory_bytes': memory[name],
                'memory_times_sgd': memory[name] / memory['sgd'],
            }
            for name, taken in seconds.items()
        },
    }


def rows_of(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the times: a method per row, a network per column."""
    networks = content['networks'].values()
    header = ['Time × SGD', *(network['title'] for network in networks)]
    rows = [
        [
            METHODS[name].title,
            *(
                f'{network["methods"][name]["times_sgd"]:.2f}'
                if name in network['methods']
                else '–'
                for network in networks
            ),
        ]
        for name in METHODS
    ]
    return header, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the arguments say."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    for flag, known in (('--networks', NETWORKS), ('--methods', METHODS)):
        parser.add_argument(flag, type=names.of(known), default=list(known))
    parser.add_argument('--repeats', type=quantities.count, default=3)
    parser.add_argument('--output', type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    path = options.output
    content: dict[str, Any] = {'networks': {}}
    if path.exists():
        content = json.loads(path.read_text())
    with progress.bar(len(options.networks), 'cost') as bar:
        for name in options.networks:
            bar.note(name)
            if name not in content['networks']:
                methods = dict.fromkeys(('sgd', *options.methods))
                content['networks'][name] = measure(
                    NETWORKS[name], methods, options.repeats
                )
                content |= {
                    'command': provenance.command(),
                    **provenance.environment(),
                    'variables': provenance.system_variables(),
                }
                path.parent.mkdir(parents=True, exist_ok=True)
                files.write_json(path, content)
            bar.advance()
    tables.show('cost', *rows_of(content))


if __name__ == '__main__':
    main()
