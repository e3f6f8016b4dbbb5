"""Two ways to run a step that is sometimes sampled.

*Traced*: one program; ``jax.lax.cond`` picks the half to run. The form for
programs that must be one: scan, vmap, export, a TPU step.

*Planned*: two programs without a conditional; the host, which knows the plan of
a window before it starts, picks one. The fast form: a reuse step needs no memory
for a second pass, and no predicate has to travel from a GPU to the host.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from vsam_jax import convolutions
from vsam_jax.state import (
    VSAMState,
    holds_an_array_twice,
    is_accumulated,
    locate_state,
    with_own_buffers,
)

T = TypeVar('T')


def resolve(sample: Any, state: VSAMState, *, always: bool) -> bool | jax.Array:
    """What decides this step: a Python bool (planned) or a traced bool.

    Args:
        sample: the caller's decision: None follows the plan in the state.
        state: holds the plan.
        always: whether every step is sampled anyway.

    Returns:
        A Python bool if the decision is known while tracing, else a bool scalar.
    """
    if sample is None:
        return True if always else state.plan[state.position]
    if isinstance(sample, (bool, np.bool_)):
        return bool(sample)
    if isinstance(sample, (jax.Array, np.ndarray)) and sample.dtype == jnp.bool_:
        if sample.shape:
            raise ValueError(
                'sample must be None, a Python bool or a boolean scalar array, got an'
                f' array of shape {sample.shape}.'
            )
        return jnp.asarray(sample)
    raise TypeError(
        f'sample must be None, a Python bool or a boolean scalar array, got {sample!r}.'
    )


def choose(
    sample: bool | jax.Array,
    sampled: Callable[[], T],
    unsampled: Callable[[], T],
) -> T:
    """Runs one of two functions; a conditional is made only if it must be."""
    if isinstance(sample, bool):
        return sampled() if sample else unsampled()
    # The first pass may stand in the outermost computation, this one does not.
    return jax.lax.cond(sample, convolutions.canonical(sampled), unsampled)


class PlannedStep:
    """Runs a training step planned: the host picks between two programs.

    ``train_step(state, *args, sample)`` is a pure function that returns
    ``(new_state, anything)`` and passes ``sample`` on to ``tx.update``. It is
    compiled twice, with ``sample=True`` and with ``sample=False``, each when it is
    first needed. Calling this object runs the one that the plan names:

      step = vsam_jax.PlannedStep(train_step)
      for batch in batches:
        state, metrics = step(state, batch)

    The plan is read from the state once a window (K steps), which waits for the
    step before; between two readings the host does not wait for the device.

    *Contract.* The state that a call returns goes into the next call, and every
    call advances the transformation: to skip a bad update put the guard after
    vsam, ``chain(vsam(...), apply_if_finite(sgd(...), ...))``, never around it.
    A state whose counter did not follow the calls raises at the next window.
    A state that did not come from the last call (a restored checkpoint, another
    run) is noticed by the identity of its step counter, without a
    synchronisation, and its plan is read anew, from the middle of a window too.
    (Code that copies the whole state between two calls therefore makes the host
    read the plan at every step; ``num_reads`` shows it.)

    *Several processes.* Each of them picks the program by its own copy of the
    plan, and all pick the same one: the plan is a function of seed, window and
    budget, and the budget of norms of gradients that were reduced over all
    devices, which leaves the same bits on each. (Under ``shard_map`` that is what
    ``axis_name`` is for, see :func:`vsam_jax.vsam`.)

    Args:
        train_step: a pure function ``(state, *args, sample) -> (state, anything)``,
            not jitted: ``sample`` decides what is traced. ``state`` is any pytree
            with exactly one :class:`vsam_jax.VSAMState` in it.
        donate_state: whether the buffers of ``state`` are reused for the new state.
            The state passed in must not be read afterwards. True by default.
        **jit_options: passed on to :func:`jax.jit`, such as ``out_shardings``.

    Attributes:
        num_reads: how many times the plan has been read from the device.

    Raises:
        TypeError: from the constructor if ``train_step`` is not callable; from a
            call if the state is traced or the result is not a pair.
        ValueError: from the constructor if ``jit_options`` say whether the state is
            donated; from a call if the state holds no plan or several of them, or
            ``optax.MultiSteps`` around one.
        RuntimeError: from a call if the state did not advance with the calls.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> loss = lambda w, x: jnp.sum((w - x) ** 2)
        >>> tx = optax.chain(vsam_jax.vsam(rho=0.05, window=10), optax.sgd(0.1))
        >>> def train_step(state, batch, *, sample=None):
        ...   w, opt_state = state
        ...   value, grads = jax.value_and_grad(loss)(w, batch)
        ...   updates, opt_state = tx.update(
        ...       grads, opt_state, w, sample=sample,
        ...       grad_fn=lambda w: jax.grad(loss)(w, batch))
        ...   return (optax.apply_updates(w, updates), opt_state), value
        >>> w = jnp.zeros(3)
        >>> state = (w, tx.init(w))
        >>> step = vsam_jax.PlannedStep(train_step)
        >>> for _ in range(40):
        ...   state, value = step(state, jnp.ones(3))
        >>> print(step.num_reads, f'{value:.3f}')
        5 0.000
    """

    def __init__(
        self,
        train_step: Callable[..., tuple[Any, Any]],
        *,
        donate_state: bool = True,
        **jit_options: Any,
    ):
        if not callable(train_step):
            raise TypeError(
                'train_step must be a function (state, *args, sample) -> (state,'
                f' anything), got {train_step!r}.'
            )
        self._programs = programs(jax.jit, train_step, (0,), donate_state, jit_options)
        self._donates = donate_state
        self._windows = Windows()

    @property
    def num_reads(self) -> int:
        """How many times the plan has been read from the device."""
        return self._windows.num_reads

    def program(self, sample: bool) -> Any:
        """The jitted function of sampled (True) or reuse (False) steps.

        It takes ``(state, *args)``; use it to lower, compile or time one of the
        two. Calling it advances the state past this driver's knowledge, which the
        next call notices.
        """
        return self._programs[_decision(sample)]

    def __call__(
        self, state: Any, *args: Any, sample: bool | None = None
    ) -> tuple[Any, Any]:
        """Runs one step.

        Args:
            state: the train state.
            *args: passed on to ``train_step``, the batch for instance.
            sample: overrides the plan for this one step.

        Returns:
            What ``train_step`` returns.
        """
        continues = self._windows.precede(state)
        # What came out of a program has buffers of its own, unless somebody put one
        # of its arrays into a second place since.
        if self._donates and (not continues or holds_an_array_twice(state)):
            state = with_own_buffers(state)
        sample = self._windows.decide(state, sample, continues)
        output = self._programs[sample](state, *args)
        if not (isinstance(output, tuple) and len(output) == 2):
            raise TypeError(
                'train_step must return a pair (state, anything), got'
                f' {type(output).__name__}.'
            )
        self._windows.follow(output[0])
        return output


class Windows:
    """What the host knows of the plans of a run, window after window.

    Attributes:
        num_reads: how many times a plan has been read from the device.
    """

    def __init__(self):
        self._window: _Window | None = None
        self.num_reads = 0

    def precede(self, state: Any) -> bool:
        """Whether ``state`` is the one that the last step returned."""
        return self._window is not None and self._window.precedes(state)

    def decide(self, state: Any, sample: Any, continues: bool) -> bool:
        """Whether the next step is sampled.

        Args:
            state: what the step starts from, with a :class:`VSAMState` in it.
            sample: the caller's decision, None for that of the plan.
            continues: what :meth:`precede` says of the state.

        Returns:
            The decision.
        """
        if sample is not None:
            sample = _decision(sample)
        window = self._window
        if window is None or not continues or window.taken == len(window.plan):
            new = _Window.read(state)
            self.num_reads += 1
            if window is not None and continues and new.step != window.next_step:
                raise RuntimeError(
                    f'The state is at step {new.step} of vsam, but {window.next_step}'
                    ' is what the calls of this PlannedStep add up to: some calls did'
                    ' not advance it. Every call must; skip a bad update after vsam, as'
                    ' in chain(vsam(...), apply_if_finite(sgd(...), ...)), not around'
                    ' it. To go on, make a new PlannedStep or restore a checkpoint.'
                )
            self._window = window = new
        return window.plan[window.taken] if sample is None else sample

    def follow(self, state: Any) -> None:
        """Notes that the step was run and ``state`` came out of it."""
        assert self._window is not None
        self._window.follow(state)


def programs(
    jit: Callable[..., Any],
    train_step: Callable[..., Any],
    places: tuple[int, ...],
    donate_state: bool,
    options: dict[str, Any],
) -> dict[bool, Any]:
    """The two programs of a step, by whether it is sampled.

    Args:
        jit: ``jax.jit`` or ``nnx.jit``.
        train_step: takes ``sample``, by name.
        places: which arguments of it are the state.
        donate_state: whether they are donated.
        options: of ``jit``; they may donate other arguments.

    Returns:
        Jitted functions of the arguments without ``sample``.
    """
    given = options.get('donate_argnums')
    others = (given,) if isinstance(given, int) else tuple(given or ())
    if {*places} & {*others} or options.get('donate_argnames') is not None:
        named = {k: v for k, v in options.items() if k.startswith('donate_')}
        raise ValueError(
            'donate_argnums must name arguments after the state, by their places, got'
            f' {named}: donate_state says whether the state is donated.'
        )
    donated = (*places, *others) if donate_state else others
    options = {**options, 'donate_argnums': donated}
    return {
        sample: jit(_specialize(train_step, sample), **options)
        for sample in (True, False)
    }


def _decision(sample: Any) -> bool:
    if not isinstance(sample, (bool, np.bool_)):
        raise TypeError(f'sample must be None or a Python bool, got {sample!r}.')
    return bool(sample)


def _specialize(train_step: Callable[..., Any], sample: bool) -> Callable[..., Any]:
    """The step of which it is known whether it is sampled."""

    @functools.wraps(train_step)
    def program(*args: Any) -> Any:
        return train_step(*args, sample=sample)

    # A jit looks through __wrapped__ for a signature; ours has no `sample`.
    del program.__wrapped__
    program.__name__ = 'sampled_step' if sample else 'reuse_step'
    return program


@dataclasses.dataclass
class _Window:
    """What the host knows of the window that is being run.

    Attributes:
        plan: the decisions for the rest of the window, from where it was read.
        step: the step counter of the state that it was read from.
        leaf: where that counter stands among the leaves of the train state.
        last: the counter array of the state returned last, None before a step was
            run. It is compared by identity and never read, so it may have been
            donated since.
        taken: how many steps were run since the plan was read.
    """

    plan: list[bool]
    step: int
    leaf: int
    last: Any = None
    taken: int = 0

    @property
    def next_step(self) -> int:
        return self.step + self.taken

    @classmethod
    def read(cls, state: Any) -> '_Window':
        """Reads the plan of the window that the state stands in; synchronises."""
        leaf, vsam_state = locate_state(state)
        _check_plan(vsam_state)
        if is_accumulated(state):
            raise ValueError(
                'state must not hold optax.MultiSteps around a method of vsam_jax, got'
                ' one: the plan counts updates, and this would be called once per'
                ' mini-step. Jit train_step as it is (traced), give num_micro_batches'
                ' to the function that builds it, or put optax.MultiSteps around what'
                ' comes after the method.'
            )
        plan, position, step = jax.device_get(
            (vsam_state.plan, vsam_state.position, vsam_state.step)
        )
        return cls(
            plan=[bool(sample) for sample in plan[int(position) :]],
            step=int(step),
            leaf=leaf,
        )

    def precedes(self, state: Any) -> bool:
        """Whether ``state`` is the one that the last step returned."""
        # A step that failed returned none.
        if not self.taken:
            return False
        leaves = jax.tree.leaves(state)
        return len(leaves) > self.leaf and leaves[self.leaf] is self.last

    def follow(self, state: Any) -> None:
        """Notes that a step was run and ``state`` came out of it."""
        leaves = jax.tree.leaves(state)
        self.last = leaves[self.leaf] if len(leaves) > self.leaf else None
        self.taken += 1


def _check_plan(vsam_state: VSAMState) -> None:
    """Raises unless the state holds one plan that the host can read."""
    shape = jnp.shape(vsam_state.plan)
    if len(shape) != 1:
        raise ValueError(
            'state must hold one plan, an array [window], but its plan has shape'
            f' {shape}: states that were stacked, by vmap for instance, have a plan'
            ' each. Run them traced (sample=None) inside one program.'
        )
    if isinstance(vsam_state.plan, core.Tracer):
        raise TypeError(
            'state must hold concrete arrays, got traced ones: PlannedStep reads'
            ' the plan on the host. Inside jit, scan or vmap call train_step itself'
            ' with sample=None.'
        )
