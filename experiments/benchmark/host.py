"""What the host adds to planned steps: the driver, window boundaries, idle time."""

import functools
import glob
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

import vsam_jax
from experiments.benchmark import jax_steps, variants
from experiments.benchmark.problems import Problem
from experiments.common import timing


class _Reuse:
    """Reuse steps, with the driver or without one."""

    def __init__(self, problem: Problem, window: int):
        # No step is a sample, whatever the plan says: its reading is what counts.
        tx = variants.vsam(problem.base, window=window, segments=1, warmup_steps=0)
        self._driver = vsam_jax.PlannedStep(jax_steps.train_step(problem))
        self._state = jax_steps.new_state(problem, tx)
        self._batch = jax.device_put(problem.batch())

    def run(self, steps: int, with_driver: bool) -> float:
        """Seconds of a step."""
        program = self._driver.program(False)
        start = time.perf_counter()
        for _ in range(steps):
            if with_driver:
                self._state, _ = self._driver(self._state, self._batch, sample=False)
            else:
                self._state, _ = program(self._state, self._batch)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - start) / steps


def boundary(
    problem: Problem,
    *,
    rounds: int,
    steps: int = 100,
    windows: tuple[int, int] = (2, 50),
) -> dict[str, float]:
    """Seconds that a window boundary costs, and those of the driver at each step.

    With windows of K steps the driver adds o + c / K to a step, c for reading the
    plan; two different K give both.

    Args:
        problem: the network; a small one, whose steps do not hide the host's work.
        rounds: how often it is timed; the median counts.
        steps: of each timing.
        windows: the two K.

    Returns:
        ``seconds_per_boundary``, ``seconds_per_call``, and for scale
        ``step_seconds`` of a step without a driver.
    """
    runs = {window: _Reuse(problem, window) for window in windows}
    seconds = timing.interleaved(
        {
            f'{window} {driven}': functools.partial(run.run, steps, driven)
            for window, run in runs.items()
            for driven in (False, True)
        },
        rounds,
    )
    added = {
        window: statistics.median(
            driven - plain
            for driven, plain in zip(
                seconds[f'{window} True'], seconds[f'{window} False'], strict=True
            )
        )
        for window in windows
    }
    few, many = windows
    per_boundary = (added[few] - added[many]) / (1 / few - 1 / many)
    return {
        'seconds_per_boundary': per_boundary,
        'seconds_per_call': added[many] - per_boundary / many,
        'step_seconds': statistics.median(
            plain for window in windows for plain in seconds[f'{window} False']
        ),
    }


def idle_shares(problem: Problem, window: int, windows: int) -> dict[str, float | None]:
    """The share of a run in which the device had nothing to do.

    Args:
        problem: the network.
        window: K.
        windows: how many are run.

    Returns:
        For the base optimizer and for planned vSAM the share between the first and
        the last thing that the device did, as JAX's profiler recorded it; None
        where it recorded nothing of the device.
    """
    train_step = jax_steps.train_step(problem)
    vsam = variants.vsam(problem.base, window=window, segments=1, warmup_steps=0)
    base = variants.base(problem.base)
    runs = {
        problem.base: (jax.jit(train_step, donate_argnums=0), base),
        'planned vSAM': (vsam_jax.PlannedStep(train_step), vsam),
    }
    batch = jax.device_put(problem.batch())
    return {
        # All programs are compiled in the first window.
        name: _idle_share(
            step, jax_steps.new_state(problem, tx), batch, window, windows * window
        )
        for name, (step, tx) in runs.items()
    }


def _idle_share(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batch: Any,
    unrecorded: int,
    steps: int,
) -> float | None:
    """The idle share of ``steps`` steps, after some that are not recorded."""
    for _ in range(unrecorded):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(steps):
                state, _ = step(state, batch)
            jax.block_until_ready(state)
        (file,) = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
        return idle(_device_work(jax.profiler.ProfileData.from_file(file)))


def _device_work(profile: Any) -> Iterable[tuple[float, float]]:
    """Start and end, in nanoseconds, of what a device did."""
    for plane in profile.planes:
        accelerator = plane.name.startswith('/device:')
        for line in plane.lines:
            # On the CPU programs run in threads of the host.
            if not accelerator and not line.name.startswith('tf_XLA'):
                continue
            for event in line.events:
                # Loops and what is shared among threads stand apart from the program.
                if accelerator or 'wait' not in event.name.lower():
                    yield event.start_ns, event.start_ns + event.duration_ns


def idle(intervals: Iterable[tuple[float, float]]) -> float | None:
    """The share of the time from the first start to the last end that none covers.

    Args:
        intervals: pairs of start and end, in any order; they may overlap.

    Returns:
        The share in [0, 1], None without intervals.
    """
    ordered = sorted(intervals)
    if not ordered:
        return None
    first, reached, busy = ordered[0][0], ordered[0][0], 0.0
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - first)
