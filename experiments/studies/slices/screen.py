"""Tunes each method on validation examples and measures it on test examples.

The networks of a task and method, which differ in seed, radius and learning rate, are
trained side by side by one program (``jax.vmap`` around ``jax.lax.scan``).
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.slices import methods, starts, tasks
from experiments.studies.slices.methods import Method, Pair
from experiments.studies.slices.tasks import PyTree, Task

# How many networks a call of the program trains: their numbers fit into a cache.
WIDTH = 15
# A seed, and the pair of radius and learning rate.
Run = tuple[int, Pair]


class Program:
    """Trains networks of one task with one method, :data:`WIDTH` at a time.

    Args:
        task: the task.
        method: the method.
        width: how many at a time.
        advance: called after each call of the program.
    """

    def __init__(
        self,
        task: Task,
        method: Method,
        width: int = WIDTH,
        advance: Callable[[], Any] = lambda: None,
    ):
        self._task = task
        self._width = width
        self._advance = advance
        self._examples = starts.examples(task)
        model = starts.network(task)
        run = methods.make_run(method, task, model)

        def measured(shared: tasks.Examples, *arguments: Any) -> jax.Array:
            variables = run(shared.train, *arguments)
            held = (shared.validation, shared.test)
            return jnp.stack([_accuracy(model, variables, *part) for part in held])

        self._program = jax.jit(jax.vmap(measured, in_axes=(None, 0, 0, 0)))

    def __call__(self, runs: Sequence[Run]) -> np.ndarray:
        """Accuracies after the last step.

        Args:
            runs: seeds and pairs.

        Returns:
            [runs, 2], on validation and on test examples.
        """
        parts = []
        for first in range(0, len(runs), self._width):
            part = list(runs[first : first + self._width])
            # The same shapes at each call.
            filled = part + part[-1:] * (self._width - len(part))
            seeds, pairs = zip(*filled, strict=True)
            rhos, rates = np.asarray(pairs, np.float32).T
            start = starts.starts(self._task, seeds)
            found = self._program(self._examples, start, rhos, rates)
            parts.append(np.asarray(found)[: len(part)])
            self._advance()
        return np.concatenate(parts)


def num_calls(
    task: Task, name: str, tuning: Sequence[int], seeds: Sequence[int]
) -> int:
    """How often the program of a unit is called, at most."""
    calls = lambda runs: -(-runs // WIDTH)
    is_slice = methods.METHODS[name].parts > 1
    measured = 1 if name in ('sam', 'sgd') else 2 + is_slice
    tried = len(methods.pairs_of(task, name)) * len(tuning)
    return calls(tried) + measured * calls(len(seeds))


def screen(
    task: Task,
    name: str,
    tuning: Sequence[int],
    seeds: Sequence[int],
    sam_pair: Pair | None,
    program: Program | None = None,
) -> dict[str, Any]:
    """Tunes and measures one method on one task.

    Args:
        task: the task.
        name: the method, of :data:`methods.METHODS`.
        tuning: seeds that the pair is chosen with.
        seeds: seeds that are reported.
        sam_pair: the pair that was chosen for SAM; None for SAM and SGD.
        program: trains; None makes one.

    Returns:
        The unit, as it stands in the result file: ``validation`` (the mean accuracy
        of each pair, in order), the pair ``chosen`` of them, and accuracies on test
        examples per seed, at the own pair and at SAM's; for a slice of 1/p of the
        examples also at SAM's rate and SAM's ρ / √p.
    """
    begun = time.perf_counter()
    program = program or Program(task, methods.METHODS[name])
    pairs = methods.pairs_of(task, name)
    tried = program(list(itertools.product(tuning, pairs)))
    means = tried[:, 0].reshape(len(tuning), len(pairs)).mean(0)
    chosen = pairs[int(np.argmax(means))]

    def at(pair: Pair) -> list[float]:
        return _rounded(program([(seed, pair) for seed in seeds])[:, 1])

    found = {
        'validation': _rounded(means),
        'chosen': list(chosen),
        'own': at(chosen),
    }
    if sam_pair is not None:
        rho, rate = sam_pair
        places = {'sam_pair': (rho, rate)}
        parts = methods.METHODS[name].parts
        if parts > 1:
            places['scaled_pair'] = (rho / math.sqrt(parts), rate)
        for place, pair in places.items():
            found[place] = found['own'] if pair == chosen else at(pair)
    return found | {'seconds': round(time.perf_counter() - begun, 1)}


def _rounded(accuracies: np.ndarray) -> list[float]:
    return [round(float(x), 4) for x in accuracies]


@functools.partial(jax.jit, static_argnums=0)
def _accuracy(
    model: nn.Module, variables: PyTree, images: jax.Array, labels: jax.Array
) -> jax.Array:
    logits = jnp.asarray(model.apply(variables, images, train=False))
    return jnp.mean(logits.argmax(-1) == labels)
