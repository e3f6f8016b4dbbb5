r"""What there is to know of an accelerator, the most important first, in a given time.

    python -m experiments.studies.proof.gpu --pack=build/gpu --minutes=30

Steps of ResNet-18 and WideResNet-28-10 in bfloat16: the base optimizer, SAM, planned
and traced steps, slices, and the same networks in PyTorch; and ResNet-18 on CIFAR-100.
Each result is a line of ``gpu.jsonl`` as soon as it is there, and what is there is not
made again: the same command goes on where the time was over. Tables: ``gpu_steps.md``
and ``gpu_runs.md``.
``--tiny`` tries the command out on small networks and random images.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmark import problems, steps, variants
from experiments.benchmark.problems import Problem
from experiments.common import configuration, quantities
from experiments.common.ledger import Job, Ledger
from experiments.methods.compared import METHODS, config_of
from experiments.report import provenance
from experiments.studies.proof import gpu_report, measures, pack
from experiments.studies.proof.task import SEEDS, Task
from experiments.studies.proof.tasks import ON_GPU, TASKS
from experiments.training.loop import train
from experiments.training.many import Maker

EPOCHS = 30
ROUNDS = 5
# What is compiled takes most of the time; less of it for large networks and batches.
_ALWAYS = (
    variants.BASE,
    variants.SAM,
    *variants.SLICES.values(),
    *variants.LEAN.values(),
)
_TRACED = (variants.SAMPLED, variants.TRACED_SAMPLED)
STEPS = {
    'resnet18_128': (*_ALWAYS, *_TRACED, variants.REUSE, variants.LEAN_REUSE),
    'wide_resnet_28_10_128': (*_ALWAYS, *_TRACED),
    'resnet18_1024': _ALWAYS,
    'wide_resnet_28_10_1024': _ALWAYS,
}
TORCH = (variants.BASE, 'SAM')
# Made with all seeds.
REPEATED = ('sgd', 'sam', 'winner', 'eighth')


class TimeUp(BaseException):
    """The time is over; no error of what is being made."""


class Item(NamedTuple):
    """Something to be made.

    Attributes:
        key: what it is called in the ledger.
        make: makes it, and writes its line.
    """

    key: str
    make: Callable[[], Any]


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TimeUp inside of the block once so many seconds are over."""

    def over(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def work(items: Sequence[Item], ledger: Ledger, seconds: float) -> list[str]:
    """Makes what is not made yet, in order, until the time is over.

    What fails is written down with its error, and tried again by the next call.

    Args:
        items: the most important first.
        ledger: where their lines are.
        seconds: how long.

    Returns:
        The keys of what is still to be made.
    """
    done = lambda item: item.key in ledger and 'error' not in ledger[item.key]
    todo = [item for item in items if not done(item)]
    try:
        with within(seconds):
            for item in todo:
                print(f'{item.key} …', flush=True)
                begun = time.perf_counter()
                try:
                    item.make()
                except Exception as error:  # Whatever a device or a compiler may say.
                    text = f'{type(error).__name__}: {error}'[:500]
                    ledger.add(item.key, {'error': text})
                    print(f'{item.key} failed: {text}', flush=True)
                else:
                    taken = time.perf_counter() - begun
                    print(f'{item.key} took {taken:.0f} s', flush=True)
    except TimeUp:
        print('The time is over; the same command goes on.', flush=True)
    return [item.key for item in items if not done(item)]


# --- Steps --------------------------------------------------------------------


def time_steps(
    problem: Problem, names: tuple[str, ...], key: str, ledger: Ledger, rounds: int
) -> None:
    """Times the steps of a network, with peers in PyTorch where these can be made.

    Args:
        problem: the network.
        names: of the ways in JAX, that of the base optimizer first.
        key: of its line.
        ledger: where the line goes.
        rounds: how many rounds.
    """
    why: list[str] = []
    content = steps.measure(
        problem,
        names=names,
        number=rounds,
        steps=2,
        torch_runners=functools.partial(_torch_runners, why),
        advance=lambda: None,
    )
    ledger.add(
        key,
        {
            **content,
            'kind': 'steps',
            'no_torch': why[0] if why else None,
            'peak_memory_bytes': provenance.peak_memory(),
            **provenance.environment(),
        },
    )


def _torch_runners(why: list[str], problem: Problem) -> Mapping[str, Any]:
    """The peers; none, and the reason, where they cannot be made."""
    try:
        # Not there for most, and takes seconds to import.
        from experiments.benchmark import torch_steps

        return torch_steps.runners(problem, TORCH)
    except Exception as error:  # Steps in JAX are worth more than an error message.
        why.append(f'{type(error).__name__}: {error}'[:500])
        return {}


# --- Runs ---------------------------------------------------------------------


def run_of(task: Task, config: Any, entry: str, seed: int) -> Job:
    """A run of ResNet-18.

    Args:
        task: what ρ and learning rate are of.
        config: the configuration, whatever the method.
        entry: a key of :data:`ON_GPU`.
        seed: the seed.
    """
    method, multiple = ON_GPU[entry]
    plain = method == 'sgd'
    rho = 0.0 if plain else task.rho * METHODS[method].centre * multiple
    rate = task.sgd_rate if plain else task.rate
    notes = {'kind': 'run', 'entry': entry, 'seed': seed, 'judge': task.judge}
    return Job(
        f'runs/{entry}/seed{seed}',
        config_of(config, method, rho, rate, seed),
        {**notes, 'rho': rho, 'rate': rate},
    )


def config_of_runs(task: Task, folder: pathlib.Path, tiny: bool) -> Any:
    """The configuration of the runs, with the images of the pack."""
    values: dict[str, Any] = {
        'epochs': EPOCHS,
        'checkpoint_every': 5,
        'models.resnet18.dtype': 'bfloat16',
    }
    if tiny:
        values |= {'epochs': 2, 'models.resnet18.width': 4, 'batch_size': 16}
    config: Any = configuration.with_values(task.config(), values)
    if tiny:
        with config.unlocked():
            config.data = {'name': 'synthetic', 'train': 64, 'num_classes': 100}
    else:
        config.data.cache_dir = str(pack.unpack_images(folder))
    return config


# --- All of it ----------------------------------------------------------------


def items_of(
    folder: pathlib.Path, output: pathlib.Path, ledger: Ledger, tiny: bool
) -> list[Item]:
    """What there is to make, the most important first.

    Args:
        folder: the pack.
        output: where results and runs are.
        ledger: the results.
        tiny: whether to make small networks of it.
    """
    maker = Maker(ledger, output / 'runs', train, keep=True, more=measures.of_run)
    task = TASKS['resnet18']

    def timed(name: str) -> Item:
        key = f'steps/{name}'

        def make() -> None:
            problem = _tiny(name) if tiny else problems.PROBLEMS[name]()
            time_steps(problem, STEPS[name], key, ledger, 2 if tiny else ROUNDS)

        return Item(key, make)

    @functools.cache
    def config() -> Any:
        return config_of_runs(task, folder, tiny)

    def made(entry: str, seed: int) -> Item:
        return Item(
            f'runs/{entry}/seed{seed}',
            lambda: maker.make(run_of(task, config(), entry, seed)),
        )

    return [
        timed('resnet18_128'),
        timed('wide_resnet_28_10_128'),
        *(made(entry, SEEDS[0]) for entry in ON_GPU),
        timed('resnet18_1024'),
        timed('wide_resnet_28_10_1024'),
        *(made(entry, seed) for seed in SEEDS[1:] for entry in REPEATED),
    ]


def _tiny(name: str) -> Problem:
    size = 16 if name.endswith('1024') else 8
    model = problems.MLP(10, 16, 1, jnp.bfloat16)
    return Problem(f'MLP for {name}, bfloat16', model, (size, 16))


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes what the time suffices for."""
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--pack', type=pathlib.Path, default='build/gpu')
    parser.add_argument('--output', type=pathlib.Path, default='runs/gpu')
    parser.add_argument(
        '--minutes', type=quantities.positive, default=30.0, help='of all of it'
    )
    parser.add_argument('--items', default='', help='those that begin so, by commas')
    parser.add_argument('--report', action='store_true', help='only the tables')
    parser.add_argument('--tiny', action='store_true', help='try the command out')
    options = parser.parse_args(arguments)
    if options.report:
        gpu_report.write(options.output)
        return
    # Two libraries share a GPU's memory.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    if jax.default_backend() == 'cpu' and not options.tiny:
        parser.error('there is no accelerator here; --tiny tries the command out.')
    ledger = Ledger(options.output / 'gpu.jsonl')
    items = items_of(options.pack, options.output, ledger, options.tiny)
    begin = tuple(options.items.split(','))
    wanted = [item for item in items if item.key.startswith(begin)]
    if not wanted:
        known = ', '.join(item.key for item in items)
        parser.error(f'--items={options.items}: none begins so; there are {known}')
    options.output.mkdir(parents=True, exist_ok=True)
    # A call that goes on compiles nothing again.
    jax.config.update('jax_compilation_cache_dir', str(options.output / 'compiled'))
    left = 60 * options.minutes - (time.perf_counter() - begun)
    try:
        missing = work(wanted, ledger, left)
    except KeyboardInterrupt:
        sys.exit('Interrupted. The same command goes on.')
    gpu_report.write(options.output)
    if missing:
        sys.exit(f'not made: {", ".join(missing)}')


if __name__ == '__main__':
    main()
