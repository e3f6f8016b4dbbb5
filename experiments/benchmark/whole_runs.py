"""Planned runs over whole windows against the sum of their steps.

A run of vSAM in which a share p of the steps is sampled should take

    (1 + p · (T_sampled / T_base − 1)) · T_base

a step. What is above that is what steps without a second gradient cost more than
those of the base optimizer, the host's reading of the plan between two windows, and
the bookkeeping of the driver.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import vsam_jax
from experiments.benchmark import jax_steps, variants
from experiments.benchmark.problems import Problem
from experiments.common import timing
from experiments.report import statistics


class Method(NamedTuple):
    """A method, and what is to be known of it.

    Attributes:
        make: makes its transformation.
        psf_share: the share of the mini-batch that it measures the PSF on.
        period: after how many steps its plan repeats itself; None for a window.
    """

    make: Callable[[], optax.GradientTransformation]
    psf_share: float = 1
    period: int | None = None


_STEADY = functools.partial(vsam_jax.steady_vsam, variants.RHO, every=3)

# From the first step on as in the first window after warm-up: one step in K sampled.
METHODS: dict[str, Method] = {
    'vSAM, K = 50': Method(
        functools.partial(vsam_jax.vsam, variants.RHO, window=50, warmup_steps=0)
    ),
    'vSAM, K = 10': Method(
        functools.partial(vsam_jax.vsam, variants.RHO, window=10, warmup_steps=0)
    ),
    'steady vSAM, every 3rd step': Method(_STEADY),
    'steady vSAM, every 3rd step, a quarter of the mini-batch': Method(
        _STEADY, 1 / 4, period=3
    ),
    'steady vSAM, every 3rd step, an eighth of the mini-batch': Method(
        _STEADY, 1 / 8, period=3
    ),
}
# About so many steps are timed together.
CHUNK = 20


class _Run:
    """A planned run that stops at the ends of chunks."""

    def __init__(self, driver: vsam_jax.PlannedStep, problem: Problem, state: Any):
        self.state = state
        self.driver = driver
        self._batch = jax.device_put(problem.batch())

    def chunk(self, steps: int, sample: bool | None = None) -> Any:
        """Makes some steps, planned, or all with or all without a sample."""
        for _ in range(steps):
            if sample is None:
                self.state, _ = self.driver(self.state, self._batch)
            else:
                self.state, _ = self.driver.program(sample)(self.state, self._batch)
        return self.state

    def num_samples(self) -> int:
        return int(optax.tree.get(self.state, 'num_samples'))


def measure(
    problem: Problem, method: str, *, windows: int, chunk: int = CHUNK
) -> dict[str, Any]:
    """Times planned runs beside their steps.

    Args:
        problem: the network.
        method: which of :data:`METHODS`.
        windows: how many chunks of the run are timed, one a round.
        chunk: steps of each, rounded up to whole windows of the method.

    Returns:
        ``sampling_rate``; the quotients of a run's time and what it should take,
        ``times_expected``, of a run's and the base optimizer's, ``times_base``, and of
        a run's and that of its own steps made without a driver, ``times_steps``
        (medians and quartiles); ``windows``, ``steps`` and ``plan_reads``; the bytes
        of temporaries of each program, ``temporaries``.
    """
    make, psf_share, period = METHODS[method]
    tx = optax.chain(make(), variants.base(problem.base))
    driver = vsam_jax.PlannedStep(jax_steps.train_step(problem, psf_share))
    # Two states, so that steps made by themselves leave the run's plan alone.
    run, parts = (
        _Run(driver, problem, jax_steps.new_state(problem, tx)) for _ in range(2)
    )
    base = jax_steps.JaxRunner(
        jax_steps.Session(problem, variants.base(problem.base)),
        variants.VARIANTS[variants.BASE],
    )
    window = period or optax.tree.get(run.state, 'plan').size
    chunk = math.ceil(chunk / window) * window
    # To wait for the last of a few steps costs an accelerator a part of a step; a CPU,
    # where a chunk takes a minute, nothing to speak of.
    few = max(1, chunk // 5) if jax.default_backend() == 'cpu' else chunk
    counts = [run.num_samples()]

    def whole() -> float:
        taken = timing.seconds_of(lambda: run.chunk(chunk))
        counts.append(run.num_samples())
        return taken / chunk

    def part(sample: bool) -> float:
        return timing.seconds_of(lambda: parts.chunk(few, sample)) / few

    seconds = timing.interleaved(
        {
            'whole': whole,
            'base': lambda: base.run(chunk),
            'sampled': lambda: part(True),
            'reuse': lambda: part(False),
        },
        rounds=windows,
    )
    # The first round is not timed; by then both programs have run.
    samples = [new - old for old, new in itertools.pairwise(counts[1:])]
    quotients: dict[str, list[float]] = {
        'times_expected': [],
        'times_base': [],
        'times_steps': [],
    }
    for number, taken in enumerate(samples):
        step, plain, sampled, reuse = (
            seconds[name][number] for name in ('whole', 'base', 'sampled', 'reuse')
        )
        rate = taken / chunk
        quotients['times_expected'].append(
            step / ((1 + rate * (sampled / plain - 1)) * plain)
        )
        quotients['times_base'].append(step / plain)
        quotients['times_steps'].append(step / (rate * sampled + (1 - rate) * reuse))
    return {
        'sampling_rate': sum(samples) / (windows * chunk),
        'windows': windows * chunk // window,
        'steps': windows * chunk,
        'plan_reads': run.driver.num_reads,
        'temporaries': _temporaries(driver, problem, tx),
        **{name: statistics.quartiles(values) for name, values in quotients.items()},
    }


def _temporaries(
    driver: vsam_jax.PlannedStep, problem: Problem, tx: optax.GradientTransformation
) -> dict[str, int | None]:
    """Bytes that the programs of a run need beside arguments and results."""
    state = jax_steps.abstract_state(problem, tx)
    sizes = {}
    for name, sample in (('sampled', True), ('reuse', False)):
        compiled = driver.program(sample).lower(state, problem.batch()).compile()
        analysis = compiled.memory_analysis()
        sizes[name] = getattr(analysis, 'temp_size_in_bytes', None)
    return sizes
