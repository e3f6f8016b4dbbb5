"""Compiled training steps in JAX, and the train states that they carry on."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.benchmark import variants
from experiments.benchmark.problems import Problem
from vsam_jax import convolutions, linen

TrainStep = Callable[..., tuple[linen.TrainState, Any]]


def train_step(problem: Problem, psf_share: float = 1) -> TrainStep:
    """``train_step(state, batch, *, sample) -> (state, loss)`` of a network."""
    built = linen.make_train_step(_loss_of(problem), psf_share=psf_share)
    # Builders take a second gradient for the methods of vsam_jax alone.
    gradient = convolutions.canonical(jax.grad(_loss_of(problem), has_aux=True))
    for_peers = _written(gradient)

    def step(
        state: linen.TrainState, batch: Any, *, sample: Any = None
    ) -> tuple[linen.TrainState, Any]:
        chosen = for_peers if variants.is_peer(state.opt_state) else built
        return chosen(state, batch, sample=sample)

    return step


def train_step_by_hand(problem: Problem) -> TrainStep:
    """The same without a builder: its convolutions are those that JAX makes."""
    return _written(jax.grad(_loss_of(problem), has_aux=True))


def _written(gradient: Any) -> TrainStep:
    """A step with a gradient of the parameters, which has the loss besides."""

    def step(
        state: linen.TrainState, batch: Any, *, sample: Any = None
    ) -> tuple[linen.TrainState, Any]:
        both = lambda params: gradient(params, state.batch_stats, batch, None)
        grads, (batch_stats, loss) = both(state.params)
        new_state = state.apply_gradients(
            grads=grads,
            grad_fn=lambda params: both(params)[0],
            sample=sample,
            batch_stats=batch_stats,
        )
        return new_state, loss

    return step


def _loss_of(problem: Problem) -> Any:
    """The loss of a network, as :func:`vsam_jax.linen.make_train_step` takes it."""

    def loss_fn(params: Any, batch_stats: Any, batch: Any, key: Any) -> Any:
        del key
        inputs, labels = batch
        logits, updated = problem.model.apply(
            {'params': params, 'batch_stats': batch_stats},
            inputs,
            train=True,
            mutable=['batch_stats'],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (updated.get('batch_stats', {}), losses.mean())

    return loss_fn


def new_state(problem: Problem, tx: optax.GradientTransformation) -> linen.TrainState:
    """The state of step 0."""
    inputs, _ = problem.batch()
    # Jitted, because op by op it would take minutes for a large network.
    init = jax.jit(lambda key, x: problem.model.init(key, x, train=True))
    variables = init(jax.random.key(0), jnp.asarray(inputs))
    return linen.TrainState.create(
        apply_fn=problem.model.apply,
        params=variables['params'],
        batch_stats=variables.get('batch_stats', {}),
        tx=tx,
    )


def abstract_state(problem: Problem, tx: optax.GradientTransformation) -> Any:
    """Shapes and dtypes of the state of step 0; nothing is computed."""
    return jax.eval_shape(lambda: new_state(problem, tx))


class Program:
    """One compiled step.

    Args:
        problem: the network.
        state: a state or its shapes.
        batch: a mini-batch or its shapes.
        decision: what decides the step.
        by_hand: whether the step is made without a builder of this project.
        psf_share: the share of the mini-batch that second gradients are taken of.

    Attributes:
        executable: what runs.
        arguments: its arguments after state and batch.
        compile_seconds: of tracing and compiling.
        flops: additions and multiplications of a call as the network is written,
            None where that is not known, as with a share. Of a traced step those of
            the branch that is taken.
        conditionals: how many there are in the program.
    """

    def __init__(
        self,
        problem: Problem,
        state: Any,
        batch: Any,
        decision: variants.Decision,
        by_hand: bool = False,
        psf_share: float = 1,
    ):
        written = train_step_by_hand(problem)
        step = written if by_hand else train_step(problem, psf_share)
        sample, self.arguments = variants.sample_of(decision)

        def program(state: Any, batch: Any, *traced: jax.Array) -> Any:
            return step(state, batch, sample=traced[0] if traced else sample)

        start = time.perf_counter()
        jitted = jax.jit(program, donate_argnums=0)
        lowered = jitted.lower(state, batch, *self.arguments)
        self.executable = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.conditionals = (self.executable.as_text() or '').count(' conditional(')
        # A conditional would count as both of its branches, and a loop, such as
        # builders make of some gradients, as one round.
        counted = variants.PLANNED_TWIN.get(decision, decision)
        # The step by hand takes second gradients of whole mini-batches.
        self.flops = None
        if psf_share == 1:
            self.flops = _operations(written, state, batch, counted)


def _operations(
    step: TrainStep, state: Any, batch: Any, decision: variants.Decision
) -> float | None:
    """Additions and multiplications of a step, None where XLA does not say."""
    sample, _ = variants.sample_of(decision)
    shapes = jax.eval_shape(lambda *arguments: arguments, state, batch)
    # Not every backend counts; what is counted is the program before any of them
    # optimizes it.
    with jax.default_device(jax.devices('cpu')[0]):
        lowered = jax.jit(functools.partial(step, sample=sample)).lower(*shapes)
        cost: Any = lowered.cost_analysis()
    return (cost or {}).get('flops')


class Session:
    """A train state and the programs that may carry it on.

    Args:
        problem: the network.
        tx: the optimizer.
        by_hand: whether the step is made without a builder of this project.
        psf_share: the share of the mini-batch that second gradients are taken of.
    """

    def __init__(
        self,
        problem: Problem,
        tx: optax.GradientTransformation,
        by_hand: bool = False,
        psf_share: float = 1,
    ):
        self.state = new_state(problem, tx)
        self._batch = jax.device_put(problem.batch())
        self._problem = problem
        self._by_hand = by_hand
        self._psf_share = psf_share
        self._programs: dict[str, Program] = {}

    def program(self, decision: variants.Decision) -> Program:
        """The program of a decision, compiled when it is first asked for."""
        if decision not in self._programs:
            self._programs[decision] = Program(
                self._problem,
                self.state,
                self._batch,
                decision,
                self._by_hand,
                self._psf_share,
            )
        return self._programs[decision]

    def call(self, program: Program) -> None:
        """Runs a program once; does not wait for it."""
        self.state, _ = program.executable(self.state, self._batch, *program.arguments)


class JaxRunner:
    """Times one variant.

    Args:
        session: whose state is carried on.
        variant: which programs are called, and how many steps that is.

    Attributes:
        steps: how many optimizer steps a cycle is.
        compile_seconds: of its programs.
        flops: of a step, or None.
        conditionals: in its programs.
    """

    library = 'JAX'

    def __init__(self, session: Session, variant: variants.Variant):
        self._session = session
        self._calls = [session.program(decision) for decision in variant.calls]
        programs = list(dict.fromkeys(self._calls))
        self.steps = variant.steps
        self.compile_seconds = sum(program.compile_seconds for program in programs)
        self.conditionals = sum(program.conditionals for program in programs)
        flops = [program.flops for program in self._calls if program.flops is not None]
        known = len(flops) == len(self._calls)
        self.flops = sum(flops) / variant.steps if known else None

    def run(self, cycles: int) -> float:
        """Makes some cycles of steps and returns the seconds that a step took."""
        start = time.perf_counter()
        for _ in range(cycles):
            for program in self._calls:
                self._session.call(program)
        jax.block_until_ready(self._session.state)
        return (time.perf_counter() - start) / (cycles * self.steps)


def runners(
    problem: Problem,
    names: tuple[str, ...] = tuple(variants.VARIANTS),
    **settings: Any,
) -> dict[str, JaxRunner]:
    """Runners of variants by title, those of one optimizer with one state.

    Args:
        problem: the network.
        names: which of :data:`variants.ALL`.
        **settings: of vSAM.

    Returns:
        A runner each; the first one is that of the base optimizer.
    """
    sessions: dict[tuple[str, bool, float], Session] = {}
    made: dict[str, JaxRunner] = {}
    for name in names:
        variant = variants.ALL[name]
        key = variant.optimizer, variant.by_hand, variant.share
        if key not in sessions:
            own = {'vsam': settings, 'lean': {'share': variant.share}}
            given = own.get(variant.optimizer, {})
            tx = variants.OPTIMIZERS[variant.optimizer](problem.base, **given)
            sessions[key] = Session(problem, tx, variant.by_hand, variant.share)
        title = problem.base if name == variants.BASE else name
        made[title] = JaxRunner(sessions[key], variant)
    return made
