"""What one optimizer step costs, as a multiple of the SGD step.

    python -m experiments.benchmark --output=experiments/results/benchmark.json

Every variant makes a few steps in turn, round after round, in a new order each
time; a cost is the median over the rounds of (its time / the time of SGD in the same
round), so that whatever else the machine does in a round touches both.
"""

import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from rich import console, progress, table

import vsam_jax
from experiments import models, results
from experiments.networks import vit

_RHO = 0.05
# A variant runs for about so many seconds in a round.
_SECONDS = 0.3
# A variant that is this many times slower than SGD is timed in few rounds.
_SLOW = 8.0
_ROUNDS_OF_SLOW = 3


class Problem(NamedTuple):
    """A network and the shape of its mini-batch.

    Attributes:
        title: for the table.
        model: called as ``model.apply(variables, images, train=True)``.
        shape: of a mini-batch of images.
        num_classes: the number of logits.
    """

    title: str
    model: nn.Module
    shape: tuple[int, ...]
    num_classes: int


class _MLP(nn.Module):
    width: int
    depth: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        del train
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.num_classes)(x)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    'convolutions': lambda: Problem(
        'small ResNet, width 32, 32×32 images, batch 128',
        models.create('small_resnet', {'width': 32}, num_classes=10),
        (128, 32, 32, 3),
        10,
    ),
    'transformer': lambda: Problem(
        'ViT of 4 blocks, width 192, 64 tokens, batch 64',
        vit.ViT(num_classes=10, depth=4),
        (64, 32, 32, 3),
        10,
    ),
    # The worst case: little computation for many parameters.
    'mlp': lambda: Problem(
        'MLP of 4 × 1024², batch 256',
        _MLP(width=1024, depth=4, num_classes=10),
        (256, 1024),
        10,
    ),
    # For trying the command out.
    'tiny': lambda: Problem(
        'MLP of 1 × 16², batch 8', _MLP(width=16, depth=1, num_classes=4), (8, 16), 4
    ),
}


def _base() -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9))


def optax_sam() -> optax.GradientTransformationExtraArgs:
    """The peer: optax.contrib.sam around the same base optimizer, opaque mode."""
    sam = optax.contrib.sam(
        _base(),
        optax.chain(optax.contrib.normalize(), optax.sgd(_RHO)),
        opaque_mode=True,
    )

    def update(
        grads: Any, state: Any, params: Any, *, grad_fn: Any, **_: Any
    ) -> tuple[Any, Any]:
        second: Any = lambda p, i: grad_fn(p)
        return sam.update(grads, state, params, grad_fn=second)

    return optax.GradientTransformationExtraArgs(sam.init, update)  # pyright: ignore[reportArgumentType]


class Variant(NamedTuple):
    """One way to make a step.

    Attributes:
        tx: the whole optimizer.
        sample: passed to ``update``: a Python bool makes a planned step.
        traced: the decision of a traced step, an argument of the program.
    """

    tx: Callable[[], optax.GradientTransformation]
    sample: bool | None = None
    traced: bool | None = None


def _vsam() -> optax.GradientTransformation:
    return optax.chain(vsam_jax.vsam(_RHO), _base())


VARIANTS: dict[str, Variant] = {
    'SGD': Variant(_base),
    'optax.contrib.sam': Variant(optax_sam),
    'vSAM planned, sampled step': Variant(_vsam, sample=True),
    'vSAM planned, reuse step': Variant(_vsam, sample=False),
    'vSAM traced, sampled step': Variant(_vsam, traced=True),
    'vSAM traced, reuse step': Variant(_vsam, traced=False),
}


class Runner:
    """A compiled step and the state that it carries on.

    Args:
        problem: the network.
        variant: how to make a step.
    """

    def __init__(self, problem: Problem, variant: Variant):
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.normal(size=problem.shape), jnp.float32)
        labels = jnp.asarray(rng.integers(problem.num_classes, size=problem.shape[0]))
        self._batch = (images, labels)
        variables = problem.model.init(jax.random.key(0), images, train=True)

        def loss_fn(params: Any, batch_stats: Any, batch: Any, key: Any) -> Any:
            del key
            images, labels = batch
            logits, updated = problem.model.apply(
                {'params': params, 'batch_stats': batch_stats},
                images,
                train=True,
                mutable=['batch_stats'],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (updated.get('batch_stats', {}), losses.mean())

        tx = variant.tx()
        self._state = vsam_jax.TrainState.create(
            apply_fn=problem.model.apply,
            params=variables['params'],
            batch_stats=variables.get('batch_stats', {}),
            tx=tx,
        )
        train_step = vsam_jax.make_train_step(loss_fn)
        self._decision = () if variant.traced is None else (jnp.array(variant.traced),)

        def step(state: Any, batch: Any, *decision: jax.Array) -> Any:
            sample = decision[0] if decision else variant.sample
            return train_step(state, batch, sample=sample)

        start = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=0)
        self._step = jitted.lower(self._state, self._batch, *self._decision).compile()
        self.compile_seconds = time.perf_counter() - start
        self.conditionals = (self._step.as_text() or '').count(' conditional(')

    def run(self, steps: int) -> float:
        """Makes some steps and returns the seconds that one took."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state, _ = self._step(self._state, self._batch, *self._decision)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - start) / steps


def measure(
    problem: Problem, *, rounds: int, steps: int, advance: Callable[[], None]
) -> dict[str, Any]:
    """Times all variants on one problem.

    Args:
        problem: the network.
        rounds: how many rounds.
        steps: how many steps a variant makes in a round, or more if they are short.
        advance: called after every round, for a progress bar.

    Returns:
        For each variant its cost as a multiple of SGD (median, quartiles and the
        number of rounds), its cost as a multiple of optax.contrib.sam, seconds of
        compilation and of a step, and the number of conditionals in its program.
    """
    runners = {name: Runner(problem, variant) for name, variant in VARIANTS.items()}
    warm = {name: runner.run(1) for name, runner in runners.items()}
    steps = max(steps, math.ceil(_SECONDS / runners['SGD'].run(1)))
    slow = {name for name in runners if warm[name] > _SLOW * warm['SGD']}
    seconds: dict[str, dict[int, float]] = {name: {} for name in runners}
    order = np.random.default_rng(0)
    for number in range(rounds):
        for name in order.permutation(list(runners)):
            if name not in slow:
                seconds[name][number] = runners[name].run(steps)
            elif number < _ROUNDS_OF_SLOW:
                seconds[name][number] = runners[name].run(1)
        advance()

    def ratios(name: str, to: str) -> list[float]:
        return [seconds[name][i] / seconds[to][i] for i in seconds[name]]

    return {
        name: {
            'times_sgd': results.quartiles(ratios(name, 'SGD')),
            'times_optax_sam': results.quartiles(ratios(name, 'optax.contrib.sam')),
            'rounds': len(seconds[name]),
            'steps_per_round': 1 if name in slow else steps,
            'compile_seconds': runner.compile_seconds,
            'step_milliseconds': 1e3 * statistics.median(seconds[name].values()),
            'conditionals': runner.conditionals,
        }
        for name, runner in runners.items()
    }


def show(title: str, rows: dict[str, Any]) -> table.Table:
    """The table of one problem."""
    view = table.Table(title=title)
    for header in ('step', '× SGD', 'quartiles', '× optax SAM', 'ms', 'compile, s'):
        view.add_column(header, justify='left' if header == 'step' else 'right')
    for name, row in rows.items():
        cost = row['times_sgd']
        view.add_row(
            name,
            f'{cost["median"]:.2f}',
            f'{cost["low"]:.2f}–{cost["high"]:.2f}',
            f'{row["times_optax_sam"]["median"]:.2f}',
            f'{row["step_milliseconds"]:.1f}',
            f'{row["compile_seconds"]:.1f}',
        )
    return view


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see the flags."""
    if len(arguments) > 1:
        raise app.UsageError(f'unknown arguments: {" ".join(arguments[1:])}')
    options: Any = flags.FLAGS
    rounds, steps = options.rounds, options.steps
    output = pathlib.Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    measured = {}
    screen = console.Console()
    with progress.Progress(console=screen) as bars:
        for name in options.problems:
            problem = PROBLEMS[name]()
            bar = bars.add_task(name, total=rounds)
            rows = measure(
                problem,
                rounds=rounds,
                steps=steps,
                advance=lambda b=bar: bars.advance(b),
            )
            measured[name] = {'title': problem.title, 'steps': rows}
            screen.print(show(problem.title, rows))
            results.write_json(
                output,
                {
                    'command': results.command(),
                    **results.environment(),
                    'rounds': rounds,
                    'problems': measured,
                },
            )
    screen.print(f'written to {output}')


def define_flags() -> None:
    """Defines the flags; called by the program, not on import."""
    flags.DEFINE_multi_enum(
        'problems',
        ['convolutions', 'transformer', 'mlp'],
        list(PROBLEMS),
        'What to measure.',
    )
    flags.DEFINE_integer('rounds', 11, 'How many rounds.', lower_bound=1)
    flags.DEFINE_integer('steps', 2, 'Least steps in a round.', lower_bound=1)
    flags.DEFINE_string('output', 'runs/benchmark.json', 'The result file.')


if __name__ == '__main__':
    define_flags()
    app.run(main)
