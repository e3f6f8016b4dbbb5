r"""What the published controller makes of norms that are nothing but noise.

    python -m experiments.studies.noise \
        --output=experiments/studies/noise/results/noise.json

‖s‖ is drawn from a log-normal distribution that never changes and ‖g‖ is 1: there is
nothing to follow, so a controller of the sampling rate should leave it alone. The
mean relative change of noise is above 0, however, and scales the budget window by
window.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import files, program
from experiments.report import provenance, statistics, tables
from vsam_jax import sampling

SIGMAS = (0.1, 0.2, 0.5, 1.0)
# After so many windows the budgets are looked at.
WINDOWS = (10, 30, 60, 120)


@functools.partial(jax.jit, static_argnames=('rule', 'windows'))
def budgets(
    rule: sampling.ByVariation, sigma: jax.Array | float, key: jax.Array, windows: int
) -> jax.Array:
    """The budgets of a run on noise.

    Args:
        rule: the controller; its warm-up is as long as it says.
        sigma: the standard deviation of log ‖s‖.
        key: what norms are drawn with.
        windows: how many windows come after the warm-up.

    Returns:
        [windows], the budget b in each of them.
    """
    norms = jnp.exp(
        sigma * jax.random.normal(key, (rule.warmup_steps + windows * rule.window,))
    )
    one = jnp.ones(())

    def observe(rings: Any, step: tuple[jax.Array, Any]) -> tuple[Any, None]:
        norm, taken = step
        seen = rule.observe(rings, one, norm)
        return jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), seen, rings
        ), None

    def window(carry: Any, step: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        budget, rings = carry
        index, own = step
        budget = rule.next_budget(budget, rings)
        rings, _ = jax.lax.scan(observe, rings, (own, rule.plan(budget, index)))
        return (budget, rings), budget

    first, rest = jnp.split(norms, [rule.warmup_steps])
    rings, _ = jax.lax.scan(
        observe, rule.init_rings(jnp.float32), (first, jnp.ones(first.shape, bool))
    )
    start = (rule.init_budget(jnp.float32), rings)
    steps = (jnp.arange(windows), rest.reshape(windows, rule.window))
    return jax.lax.scan(window, start, steps)[1]


def measure(
    sigmas: Sequence[float] = SIGMAS, window: int = 50, seeds: int = 20
) -> dict[str, Any]:
    """Budgets on noise of several widths, over many seeds.

    Args:
        sigmas: standard deviations of log ‖s‖.
        window: K.
        seeds: how many runs each.

    Returns:
        By σ, medians and quartiles of the budget after each of :data:`WINDOWS`.
    """
    rule = sampling.ByVariation(
        window=window,
        segments=5,
        warmup_steps=2 * window - 1,
        norm_gain=0.13,
        variance_gain=0.13,
        max_rate=0.8,
        seed=0,
    )
    keys = jax.random.split(jax.random.key(0), seeds)
    after = np.asarray(WINDOWS) - 1
    run = jax.vmap(
        lambda sigma, key: budgets(rule, sigma, key, max(WINDOWS)), in_axes=(None, 0)
    )
    return files.jsonable(
        {
            'window': window,
            'max_budget': rule.max_budget,
            'seeds': seeds,
            'budgets': {
                f'{sigma:g}': {
                    str(number): statistics.quartiles(values)
                    for number, values in zip(
                        WINDOWS, np.asarray(run(sigma, keys))[:, after].T, strict=True
                    )
                }
                for sigma in sigmas
            },
            'command': provenance.command(),
            **provenance.environment(),
        }
    )


def rows_of(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the medians: a σ per row."""
    header = ['σ of log ‖s‖', *(f'b after {number} windows' for number in WINDOWS)]
    rows = [
        [sigma, *(f'{row["median"]:.1f}' for row in budget.values())]
        for sigma, budget in summary['budgets'].items()
    ]
    return header, rows


def markdown(summary: dict[str, Any]) -> str:
    """The table, and what it is of."""
    return (
        f'{tables.markdown(*rows_of(summary))}\nThe published controller on log-normal'
        f' noise without a trend, K = {summary["window"]}, at most'
        f' {summary["max_budget"]}: medians of {summary["seeds"]} runs. Command:'
        f' `{summary["command"]}`.\n'
    )


def main() -> None:
    """Measures and writes the numbers, and the table beside them."""
    summary = measure()
    output = pathlib.Path(flags.FLAGS.output)
    files.write_json(output, summary)
    output.with_suffix('.md').write_text(markdown(summary))
    tables.show(f'Budget of K = {summary["window"]} on noise', *rows_of(summary))


def define_flags() -> None:
    """Defines the flags; called by the program, not on import."""
    flags.DEFINE_string('output', None, 'The JSON file to write.', required=True)


if __name__ == '__main__':
    program.run(main, define_flags)
