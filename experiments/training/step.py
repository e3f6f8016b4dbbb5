"""The compiled step of a run."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import vsam_jax
from experiments.common.devices import Devices
from experiments.methods.method import Method
from experiments.training.state import COLUMNS, RunState

PyTree = Any


class Step:
    """One step of a method, which also writes a row of ``state.record``.

    Args:
        method: the optimizer and what goes with it.
        loss_fn: as :func:`vsam_jax.linen.make_train_step` takes it.
        devices: each computes its share of the examples.
        planned: whether a program for each decision is compiled, where the method has
            a plan, or one program that holds both.

    Attributes:
        compile_seconds: the time that compilation took, by program.
        function: what is called, compiled.
    """

    def __init__(
        self,
        method: Method,
        loss_fn: Callable[..., Any],
        devices: Devices,
        planned: bool,
    ):
        train_step = _recorded(method.make_step(_spread(loss_fn, devices)))
        self._decisions = method.programs if planned else ()
        self.function: Any
        if self._decisions:
            self.function = vsam_jax.PlannedStep(
                train_step, out_shardings=devices.whole
            )
        else:
            self.function = jax.jit(
                train_step, donate_argnums=0, out_shardings=devices.whole
            )
        self.compile_seconds: dict[str, float] = {}

    def __call__(self, state: RunState, batch: PyTree, **keywords: Any) -> RunState:
        """The next state; the one that is passed in is consumed."""
        return self.function(state, batch, **keywords)

    def compile(self, state: RunState, batch: PyTree) -> None:
        """Compiles the programs of a run, once; ``state`` is left as it is.

        The difference between a first and a second call is the time it took.
        """
        if self.compile_seconds:
            return
        programs = {
            'sampled' if sample else 'reuse': self.function.program(sample)
            for sample in self._decisions
        }
        for name, program in (programs or {'step': self.function}).items():
            first, second = (_seconds(program, state, batch) for _ in range(2))
            self.compile_seconds[name] = max(first - second, 0.0)


def _spread(loss_fn: Callable[..., Any], devices: Devices) -> Callable[..., Any]:
    """The same loss, of which each device computes its share of the examples."""

    def spread_loss(params: PyTree, batch_stats: PyTree, batch: Any, key: Any, /):
        return loss_fn(params, batch_stats, devices.spread(batch), key)

    return spread_loss


def _recorded(train_step: Any) -> Any:
    """The same step, which also writes a row of ``state.record``."""

    def recorded_step(state: RunState, batch: Any) -> RunState:
        new, aux = train_step(state, batch)
        samples = optax.tree.get(new.opt_state, 'num_samples') is not None
        numbers = aux | (vsam_jax.metrics(new.opt_state) if samples else {})
        row = [jnp.asarray(numbers.get(name, jnp.nan), jnp.float32) for name in COLUMNS]
        index = state.step % state.record.shape[0]
        return new.replace(record=state.record.at[index].set(jnp.stack(row)))

    return recorded_step


def _seconds(program: Any, state: RunState, batch: PyTree) -> float:
    """The time of one call on a copy of the state, which the call consumes."""
    copy = jax.block_until_ready(jax.tree.map(jnp.copy, state))
    start = time.perf_counter()
    jax.block_until_ready(program(copy, batch))
    return time.perf_counter() - start
