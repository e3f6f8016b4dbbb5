"""Planned runs: the host reads the plan and picks the program for each step."""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import core

from vsam_jax import _buffers, _checks, _decision
from vsam_jax._state import (
    VSAMState,
    check_alive,
    consumed,
    is_accumulated,
    is_consumed,
    is_state,
    states_in,
)


class PlannedStep:
    """Runs a training step as two programs instead of one with a conditional.

    Take it where a step that reuses should need no memory for a second pass, or where a
    conditional on a GPU costs time. The plan of a window is known before the window
    starts. The host reads it, and runs either a program that always takes the second
    gradient or one that never does. So no predicate travels from the GPU to the host.
    The step function is the same as in a traced run::

      step = vsam_jax.PlannedStep(train_step)   # instead of jax.jit(train_step)
      for batch in batches:
        params, opt_state, loss = step(params, opt_state, batch)

    The driver finds the state of the method anywhere in the arguments. It finds the new
    state in the result, or in the arguments if objects are updated in place (NNX). A
    step without a method, such as plain SGD, runs unchanged.

    *What is jitted.* A plain function is passed to ``jit``, once per program. A
    function that is already jitted (``@jax.jit``, ``@nnx.jit``, ``@eqx.filter_jit``) is
    called as it is, with its own options. It compiles one program per decision.

    *Contract.* Pass the state that a call returns to the next call. Each call must
    update it exactly once:

    - To skip bad updates put the guard after vsam, never around it, as in
      ``chain(vsam(...), apply_if_finite(sgd(...), ...))``.
    - A step that updates several times (a scan of steps) raises an error before it
      runs. Where it cannot be inspected in time (``eqx.filter_jit``, a longer scan in a
      later call), the error comes right after the call. Use plain ``jax.jit`` for such
      a step, or plan the step inside it.

    *Reading the plan.* The driver reads the plan once per window (K steps), and waits
    for the previous step to do so. Otherwise the host does not wait for the device. If
    a state did not come from the last call (a restored checkpoint, another run, a plan
    set by hand), the driver reads its plan again, even in the middle of a window. It
    recognizes such a state by the identity of its step counter and plan, without
    synchronization. (Code that copies the whole state between calls therefore forces a
    read at every step; ``num_reads`` shows it.)

    *Several processes.* Each process picks the program by its own copy of the plan, and
    all pick the same one. The plan is a function of seed, window and budget. The budget
    is a function of the norms of gradients that were reduced over all devices, and so
    has the same bits on each.

    Args:
        train_step: the step function of a traced run, with any arguments and any
            result.
        jit: the function that compiles it: ``jax.jit``, ``nnx.jit``,
            ``eqx.filter_jit``.
        donate_state: whether to donate the arguments that contain the state, so that
            their memory is reused for the result. Do not read them afterwards. To keep
            one, copy it first: ``jax.tree.map(jnp.copy, state)``. None means True if
            ``jit`` takes ``donate_argnums`` (``eqx.filter_jit`` has its own
            ``donate``). A function that is already jitted keeps its own setting.
        **jit_options: passed on to ``jit``, such as ``static_argnames``,
            ``out_shardings``, or ``donate_argnums`` for further arguments.

    Attributes:
        num_reads: how many times the plan has been read from the device.

    Raises:
        TypeError: from the constructor if ``train_step`` is not callable; from a call
            if the state is traced, or is neither returned nor updated in place.
        ValueError: from the constructor if options are given for a function that is
            already jitted; from a call if the arguments contain several methods,
            stacked plans or ``optax.MultiSteps`` around a method, or if the step
            updates the state several times.
        RuntimeError: from a call if the state did not advance with the calls, or was
            donated to an earlier one.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> loss = lambda w, x: jnp.sum((w - x) ** 2)
        >>> tx = optax.chain(vsam_jax.vsam(rho=0.05, window=10), optax.sgd(0.1))
        >>> def train_step(w, opt_state, batch):
        ...   value, grads = jax.value_and_grad(loss)(w, batch)
        ...   updates, opt_state = tx.update(
        ...       grads, opt_state, w, grad_fn=lambda w: jax.grad(loss)(w, batch))
        ...   return optax.apply_updates(w, updates), opt_state, value
        >>> w = jnp.zeros(3)
        >>> opt_state = tx.init(w)
        >>> step = vsam_jax.PlannedStep(train_step)
        >>> for _ in range(40):
        ...   w, opt_state, value = step(w, opt_state, jnp.ones(3))
        >>> print(step.num_reads, f'{value:.3f}')
        5 0.000
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        *,
        jit: Callable[..., Any] = jax.jit,
        donate_state: bool | None = None,
        **jit_options: Any,
    ):
        if not callable(train_step):
            raise TypeError(
                f'train_step must be a function, got {_checks.shown(train_step)}: give'
                ' the step that a traced run would jit.'
            )
        if isinstance(jit, functools.partial):
            jit_options = jit.keywords | jit_options
            jit = jit.func
        is_jitted = callable(getattr(_innermost(train_step), 'lower', None))
        if is_jitted and (
            donate_state is not None or jit_options or jit is not jax.jit
        ):
            options = _checks.shown(dict(donate_state=donate_state, **jit_options))
            raise ValueError(
                'train_step must not be jitted already where jit, donate_state or'
                f' options of jit are given, got {_checks.shown(train_step)} and'
                f' {options}: give them to that jit, or give the function before it'
                ' was jitted.'
            )
        takes_donations = 'donate_argnums' in inspect.signature(jit).parameters
        if donate_state and not takes_donations:
            raise ValueError(
                f'donate_state must be None or False for jit={jit!r}, which takes no'
                f' donate_argnums, got {_checks.shown(donate_state)}: use the'
                ' option of that jit.'
            )
        if donate_state is None:
            donate_state = takes_donations
        self._step = train_step
        self._jit = None if is_jitted else jit
        self._others_donated = (
            jit_options.pop('donate_argnums', ()),
            jit_options.pop('donate_argnames', ()),
        )
        self._jit_options = jit_options
        self._donates = donate_state and not is_jitted
        self._programs: dict[Any, Any] = {}
        self._layouts: dict[Any, _Layout] = {}
        self._checked: set[Any] = set()
        self._traces = 0
        self._window: _Window | None = None
        self.num_reads = 0

    def program(self, sample: bool) -> '_Program':
        """Returns the program of sampled (True) or reuse (False) steps.

        Call it with the arguments of the step, or use its ``lower`` or ``trace``. A
        call advances the state without this driver, whose next call then notices it.
        """
        return _Program(self, _decision_of(sample))

    def __call__(self, *args: Any, sample: bool | None = None, **kwargs: Any) -> Any:
        """Runs one step.

        Args:
            *args: the arguments of ``train_step``.
            sample: overrides the plan for this step only.
            **kwargs: keyword arguments of ``train_step``.

        Returns:
            The result of ``train_step``.
        """
        if sample is not None:
            sample = _decision_of(sample)
        leaves, layout = self._layout(args, kwargs)
        if layout.counter is None:
            return self._compiled(None, layout)(*args, **kwargs)
        own = leaves[layout.counter : layout.counter + 3]
        continues = self._window is not None and self._window.precedes(own)
        if not continues:
            check_alive(own[0])
        args, kwargs = self._own(args, kwargs, leaves, layout, continues)
        window = self._current_window(leaves, layout, continues)
        sample = window.plan[window.taken] if sample is None else sample
        program = self._compiled(sample, layout)
        counts = self._check_program(program, sample, layout, args, kwargs)
        traced = self._num_traced(program)
        try:
            output = program(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            _explain(error, args, kwargs)
            raise
        own = self._next_counters(output, args, kwargs, leaves, layout)
        window.follow(own)
        counter = own[0]
        # A program traced again, for other shapes or static arguments, may update more
        # often. Checking waits for the device, but compiling took longer.
        counts = counts and traced == self._num_traced(program)
        if not counts and int(counter) != window.next_step:
            self._window = None
            raise ValueError(_several(int(counter) - window.next_step + 1))
        return output

    # --- Programs ---

    def _compiled(self, sample: bool | None, layout: '_Layout') -> Any:
        """The program for one decision; None leaves it to the plan in the state."""
        if self._jit is None:
            return self._step if sample is None else _Told(self._step, sample)
        donated = self._donated(layout)
        key = sample, donated
        if key not in self._programs:
            options = dict(
                zip(('donate_argnums', 'donate_argnames'), donated, strict=True)
            )
            options = self._jit_options | {k: v for k, v in options.items() if v}
            step = _specialize(self._step, sample, self._note_trace)
            self._programs[key] = self._jit(step, **options)
        return self._programs[key]

    def _donated(self, layout: '_Layout') -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Which arguments are donated, by position and name: the state's and others."""
        places, names = map(_as_tuple, self._others_donated)
        if self._donates:
            places, names = (*layout.places, *places), (*layout.names, *names)
        return tuple(dict.fromkeys(places)), tuple(dict.fromkeys(names))

    def _check_program(
        self, program: Any, sample: bool, layout: '_Layout', args: Any, kwargs: Any
    ) -> bool:
        """Whether a program is known to update once; raises if it updates more often.

        This happens before the program first runs, so before anything is donated. jit
        caches the trace and does not repeat it.
        """
        key = sample, layout.structure
        if key in self._checked:
            return True
        counts = hasattr(program, 'trace')
        if counts:
            traced = program.trace(*args, **kwargs)
            # The result of nnx.jit's trace contains that of jax.jit's.
            traced = getattr(traced, 'traced', traced)
            number = _decision.num_updates(traced.jaxpr)
            if number > 1:
                raise ValueError(_several(number))
        self._checked.add(key)
        return counts

    def _note_trace(self) -> None:
        self._traces += 1

    def _num_traced(self, program: Any) -> int | None:
        """How often programs have been traced: more with each new signature."""
        return _cache_size(program) if self._jit is None else self._traces

    # --- Arguments ---

    def _layout(self, args: Any, kwargs: Any) -> tuple[list[Any], '_Layout']:
        """The leaves of a call's arguments, and the layout of these."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        layout = self._layouts.get(structure)
        if layout is None:
            layout = self._layouts[structure] = _Layout.of(args, kwargs, structure)
        return leaves, layout

    def _own(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
        layout: '_Layout',
        continues: bool,
    ) -> tuple[Any, Any]:
        """The arguments, with separate buffers where they are donated."""
        # The results of a program have separate buffers, unless the caller has since
        # put one of the arrays in a second place.
        if self._jit is None or (continues and not _buffers.repeats(leaves)):
            return args, kwargs
        places, names = self._donated(layout)
        number = len(args)
        places = [p % number for p in places if -number <= p < number]
        given = [name for name in names if name in kwargs]
        donated = [args[i] for i in places], [kwargs[name] for name in given]
        others = (
            [x for i, x in enumerate(args) if i not in places],
            [x for name, x in kwargs.items() if name not in given],
        )
        by_place, by_name = _buffers.make_own(donated, others)
        own = dict(zip(places, by_place, strict=True))
        args = tuple(own.get(i, x) for i, x in enumerate(args))
        return args, kwargs | dict(zip(given, by_name, strict=True))

    def _current_window(
        self, leaves: list[Any], layout: '_Layout', continues: bool
    ) -> '_Window':
        """The window of the next step, read from the device if it is not known."""
        window = self._window
        if window is not None and continues and window.taken < len(window.plan):
            return window
        if layout.is_accumulated:
            raise ValueError(
                'The state must not hold optax.MultiSteps around a method of vsam_jax,'
                ' got one: the plan counts updates, and this would be called once per'
                ' mini-step. Jit train_step as it is (traced), give num_micro_batches'
                ' to the function that builds it, or put optax.MultiSteps around what'
                ' comes after the method.'
            )
        if layout.decides:
            raise ValueError(
                'The state must hold a method that plans its samples, got one that'
                ' decides from the gradient of each step (aesam), so there is no plan'
                ' to read. Jit train_step as it is, jax.jit(train_step).'
            )
        assert layout.counter is not None
        check_alive(leaves[layout.counter])
        new = _Window.read(*leaves[layout.counter : layout.counter + 3])
        self.num_reads += 1
        if window is not None and continues and new.step != window.next_step:
            self._window = None
            raise RuntimeError(
                f'The state is at step {new.step} of vsam, but after the calls of this'
                f' PlannedStep it should be at step {window.next_step}: some calls did'
                ' not advance it. Every call must; skip a bad update after vsam, as'
                ' in chain(vsam(...), apply_if_finite(sgd(...), ...)), not around'
                ' it. To go on, make a new PlannedStep or restore a checkpoint.'
            )
        self._window = new
        return new

    def _next_counters(
        self, output: Any, args: Any, kwargs: Any, leaves: list[Any], layout: '_Layout'
    ) -> list[Any]:
        """Step counter, position and plan of the state that a step returned."""
        assert layout.counter is not None
        new, structure = jax.tree.flatten(output)
        places = self._layouts.get(structure)
        if places is None:
            places = self._layouts[structure] = _Layout.of((output,), {}, structure)
        if places.counter is not None:
            return new[places.counter : places.counter + 3]
        after, place = self._layout(args, kwargs)
        if place.counter is None or after[place.counter] is leaves[layout.counter]:
            self._window = None
            raise TypeError(_not_returned(output))
        return after[place.counter : place.counter + 3]


class _Program:
    """One of the two programs of a driver, for any layout of its arguments."""

    def __init__(self, driver: PlannedStep, sample: bool):
        self._driver = driver
        self._sample = sample
        self.__name__ = _name(sample)

    def _of(self, args: Any, kwargs: Any) -> Any:
        _, layout = self._driver._layout(args, kwargs)
        return self._driver._compiled(self._sample, layout)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._of(args, kwargs)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``lower`` of a jitted function."""
        return self._of(args, kwargs).lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``trace`` of a jitted function."""
        return self._of(args, kwargs).trace(*args, **kwargs)

    def _cache_size(self) -> int:
        """How often it was compiled, like ``_cache_size`` of a jitted function."""
        programs = self._driver._programs.items()
        return sum(p._cache_size() for key, p in programs if key[0] is self._sample)


class _Told:
    """A function that is already jitted, called within the context of a decision."""

    def __init__(self, function: Any, sample: bool):
        self._function = function
        self._sample = sample
        if hasattr(_innermost(function), 'trace'):
            self.trace = self._within(_bound(function, 'trace'))
        self.lower = self._within(_bound(function, 'lower'))

    def _within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def told(*args: Any, **kwargs: Any) -> Any:
            with _decision.decided(self._sample):
                return function(*args, **kwargs)

        return told

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _decision.decided(self._sample):
            return self._function(*args, **kwargs)


def _bound(function: Any, name: str) -> Callable[..., Any]:
    """An attribute of a jitted function; that of a jitted method gets its object."""
    if isinstance(function, functools.partial):  # nnx.jit binds methods like this.
        inner = _bound(function.func, name)
        return functools.partial(inner, *function.args, **function.keywords)
    attribute = getattr(function, name)
    if inspect.ismethod(function):
        return functools.partial(attribute, function.__self__)
    return attribute


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _cache_size(program: Any) -> int | None:
    """How many programs a jitted function has compiled; None if that is unknown."""
    function = _innermost(getattr(program, '_function', program))
    # The function of jax.jit inside those of nnx.jit and eqx.filter_jit.
    for name in ('jitted_fn', '_cached'):
        function = getattr(function, name, function)
    size: Any = getattr(function, '_cache_size', None)
    return None if size is None else size()


def _specialize(
    train_step: Callable[..., Any], sample: bool | None, note: Callable[[], None]
) -> Callable[..., Any]:
    """The step with its decision fixed; calls ``note`` whenever it is traced."""

    @functools.wraps(train_step)
    def program(*args: Any, **kwargs: Any) -> Any:
        note()
        before = _counters((args, kwargs))
        with _decision.decided(sample):
            output = train_step(*args, **kwargs)
        after = _counters(output) or _counters((args, kwargs))
        if len(after) > 1:
            raise ValueError(_several_states(len(after)))
        # This runs during tracing, so before anything is donated.
        if before and (not after or after[0] is before[0]):
            raise TypeError(_not_returned(output))
        return output

    if sample is not None:
        program.__name__ = _name(sample)
    return program


def _name(sample: bool) -> str:
    return 'sampled_step' if sample else 'reuse_step'


def _counters(tree: Any) -> list[Any]:
    return [jax.tree.leaves(state.step)[0] for state in states_in(tree)]


def _not_returned(output: Any) -> str:
    return (
        'train_step must return the new state, with its VSAMState in it, or update an'
        ' object of NNX in place, which takes jit=nnx.jit,'
        f' got a result of type {type(output).__name__} without'
        ' a new one, and the state among the arguments as it was: return what tx.update'
        ' returned as its second value.'
    )


def _several_states(number: int) -> str:
    return (
        'Arguments and result of train_step must hold one VSAMState each, got'
        f' {number} in one of them: PlannedStep follows one plan. Put one'
        ' sharpness-aware transformation, outside optax.partition, into the'
        ' optimizer, or jit train_step as it is (traced).'
    )


def _several(number: int) -> str:
    return (
        'train_step must update the state once a call, because the plan says what one'
        f' update does, but it updates {number} times or more (in a scan, in'
        ' several epochs?). Jit it as it is, jax.jit(train_step): traced, every'
        ' update follows the plan. Or give PlannedStep the step inside of it.'
    )


def _as_tuple(given: Any) -> tuple[Any, ...]:
    return (given,) if isinstance(given, (int, str)) else tuple(given or ())


def _decision_of(sample: Any) -> bool:
    if not isinstance(sample, (bool, np.bool_)):
        raise TypeError(
            f'sample must be None or a Python bool, got {_checks.shown(sample)}.'
        )
    return bool(sample)


class _Layout(NamedTuple):
    """Where things are in the arguments or the result of a step, for one structure.

    Attributes:
        structure: the tree structure of positional and keyword arguments.
        counter: the index of the step counter among the leaves; position and plan
            follow it. None if there is no method.
        places: the indices of the positional arguments that contain the state.
        names: the names of the keyword arguments that contain it.
        is_accumulated: whether ``optax.MultiSteps`` is around the method.
        decides: whether the method decides from the gradient, without a plan.
    """

    structure: Any
    counter: int | None
    places: tuple[int, ...]
    names: tuple[str, ...]
    is_accumulated: bool
    decides: bool

    @classmethod
    def of(cls, args: Any, kwargs: Any, structure: Any) -> '_Layout':
        nodes = jax.tree.leaves((args, kwargs), is_leaf=is_state)
        found = [i for i, node in enumerate(nodes) if is_state(node)]
        if len(found) > 1:
            raise ValueError(_several_states(len(found)))
        return cls(
            structure=structure,
            counter=len(jax.tree.leaves(nodes[: found[0]])) if found else None,
            places=tuple(i for i, x in enumerate(args) if states_in(x)),
            names=tuple(name for name, x in kwargs.items() if states_in(x)),
            is_accumulated=is_accumulated((args, kwargs)),
            decides=any(nodes[i].sampling_memory is not None for i in found),
        )


@dataclasses.dataclass
class _Window:
    """What the host knows about the current window.

    Attributes:
        plan: the decisions for the rest of the window, from the step of the read.
        step: the step counter of the state at the read.
        last: counter, position and plan of the latest returned state; () before the
            first step. They are compared by identity and never read, so they may have
            been donated since.
        taken: how many steps have run since the read.
    """

    plan: list[bool]
    step: int
    last: Sequence[Any] = ()
    taken: int = 0

    @property
    def next_step(self) -> int:
        return self.step + self.taken

    @classmethod
    def read(cls, step: jax.Array, position: jax.Array, plan: jax.Array) -> '_Window':
        """Reads the plan of the state's current window; waits for the device."""
        _check_plan(plan)
        plan, position, step = jax.device_get((plan, position, step))
        decisions = [bool(sample) for sample in plan[int(position) :]]
        return cls(plan=decisions, step=int(step))

    def precedes(self, own: Sequence[Any]) -> bool:
        """Whether the last step returned the state with this counter and plan."""
        # A step that failed returned no state.
        return self.taken > 0 and all(map(operator.is_, own, self.last))

    def follow(self, own: Sequence[Any]) -> None:
        """Notes that a step has run and returned a state with these arrays."""
        self.last = own
        self.taken += 1


def _explain(error: Exception, args: Any, kwargs: Any) -> None:
    """Raises a clearer error if this one was raised for donated arrays."""
    if 'deleted' not in str(error):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path((args, kwargs)):
        if is_consumed(leaf):
            place, *rest = path[1:]
            name = f'argument {_checks.where((place,))}, at {_checks.where(rest)},'
            raise RuntimeError(consumed(name)) from error


def _check_plan(plan: jax.Array) -> None:
    """Raises unless the host can read ``plan`` and it is a single plan."""
    if isinstance(plan, core.Tracer):
        raise TypeError(
            'The state must hold concrete arrays, got traced ones: PlannedStep reads'
            ' the plan on the host. Inside jit, scan or vmap call train_step itself.'
        )
    if plan.ndim != 1:
        raise ValueError(
            'The state must hold one plan, an array [window], but its plan has shape'
            f' {plan.shape}: stacked states, from vmap for instance, have one plan'
            ' each. Run them traced, inside one program.'
        )


assert VSAMState._fields[:3] == ('step', 'position', 'plan')  # Layouts rely on it.
