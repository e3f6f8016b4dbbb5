"""What planning a step costs on the host, for a state of many arrays.

    python -m experiments.benchmark.driver \
        --output=experiments/results/benchmark/cpu_driver.json

A step that computes next to nothing, so that what is timed is the way into it and out
of it: ``jax.jit`` alone, ``PlannedStep`` around it, and a first call, in which memory
that arguments share is looked for.
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags

import vsam_jax
from experiments.common import files, program, timing
from experiments.report import provenance, statistics

_CALLS = 30


def measure(leaves: int, rounds: int) -> dict[str, Any]:
    """Times calls of a step whose parameters are ``leaves`` small arrays.

    Args:
        leaves: how many.
        rounds: how many rounds of each way.

    Returns:
        Milliseconds a call, medians and quartiles, by the way of calling: ``jit``,
        ``planned`` and ``planned, a state from elsewhere``.
    """
    tx = vsam_jax.steady_vsam()
    params = {str(i): jnp.ones(2) for i in range(leaves)}

    def step(params: Any, opt_state: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(params, opt_state, params, grad_fn=lambda p: p)
        return optax.apply_updates(params, updates), opt_state

    planned = vsam_jax.PlannedStep(step)
    jitted = jax.jit(lambda *state: step(*state), donate_argnums=1)
    states = {name: (params, tx.init(params)) for name in ('jit', 'planned')}

    def chunk(name: str, call: Callable[..., Any]) -> float:
        state = states[name]
        start = time.perf_counter()
        for _ in range(_CALLS):
            state = call(*state)
        taken = time.perf_counter() - start
        states[name] = jax.block_until_ready(state)
        return taken / _CALLS

    def from_elsewhere() -> float:
        state = jax.block_until_ready((params, tx.init(params)))
        start = time.perf_counter()
        planned(*state)
        return time.perf_counter() - start

    seconds = timing.interleaved(
        {
            'jit': lambda: chunk('jit', jitted),
            'planned': lambda: chunk('planned', planned),
            'planned, a state from elsewhere': from_elsewhere,
        },
        rounds,
        skipped=2,
    )
    return {
        name: statistics.quartiles(1e3 * taken for taken in values)
        for name, values in seconds.items()
    }


def main() -> None:
    """Measures and writes the result file; see the flags."""
    options: Any = flags.FLAGS
    content = {
        'command': provenance.command(),
        **provenance.environment(),
        'variables': provenance.system_variables(),
        'leaves': options.leaves,
        'rounds': options.rounds,
        'milliseconds': measure(options.leaves, options.rounds),
    }
    files.write_json(pathlib.Path(options.output), content)
    print(f'written to {options.output}')


def define_flags() -> None:
    """Defines the flags; called by the program, not on import."""
    flags.DEFINE_integer('leaves', 1000, 'Arrays of the parameters.', lower_bound=1)
    flags.DEFINE_integer('rounds', 31, 'How many rounds.', lower_bound=1)
    flags.DEFINE_string('output', 'runs/driver.json', 'The result file.')


if __name__ == '__main__':
    program.run(main, define_flags)
