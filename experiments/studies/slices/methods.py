r"""What is compared: one step of each method, for any radius and learning rate.

*MSAM* (Becker et al., `Momentum-SAM <https://arxiv.org/abs/2401.12033>`_, 2024) takes
one gradient a step, where the momentum m of the base optimizer would lead:

.. math:: g = ∇L(w - ρ \, m / (‖m‖_2 + 10^{-12})), \quad m \leftarrow 0.9 \, m + g.

With AdamW m is Adam's mean of the gradients. *Ascent on a quarter* takes the gradient
of the whole mini-batch where that of every fourth example leads. *Amplified third* is
g + 3 s on every third step and g on the others, which needs no memory. *Tail third* is
SAM in the last third of the run alone, and SGD before.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax

import vsam_jax
from experiments.methods import registry as trainer_methods
from experiments.methods.amplified import amplified
from experiments.studies.slices import tasks
from experiments.studies.slices.tasks import PyTree, Task
from experiments.training.loss import loss_of

# A radius and a learning rate.
Pair = tuple[float, float]
# Makes what stands first in the chain, from ρ and the task.
Direction = Callable[[Any, Task], optax.GradientTransformationExtraArgs]
# Where the one gradient of a step is taken: of parameters, the state of the base
# optimizer, ρ and the gradient of every fourth example as a function of parameters.
Ahead = Callable[[PyTree, PyTree, Any, Callable[[PyTree], PyTree]], PyTree]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        title: how it is called in tables.
        direction: makes the transformation that takes a second gradient, if any.
        every: a second gradient every so many steps, in all runs alike; None: never,
            or as the plan of each run says.
        parts: the PSF is that of one in so many examples.
        start: the share of the run before the first second gradient.
        ahead: where the one gradient of a step is taken, None for at w.
        ascent: how many examples its own ascent takes, a mini-batch being one.
        radii: its radii, as multiples of those that SAM is tuned over.
    """

    title: str
    direction: Direction | None = None
    every: int | None = None
    parts: int = 1
    start: float = 0.0
    ahead: Ahead | None = None
    ascent: float = 0.0
    radii: float = 1.0

    @property
    def gradients(self) -> float | None:
        """Examples that gradients are taken of a step, a mini-batch being one.

        None where it differs from run to run.
        """
        if self.direction is None:
            return 1.0 + self.ascent
        if self.every is None:
            return None
        # With a slice the gradient at w of its examples is taken again.
        passes = 1 if self.parts == 1 else 2
        return 1 + (1 - self.start) * passes / self.parts / self.every


def _steady(every: int, tolerance: float = 0.3) -> Direction:
    return lambda rho, _: vsam_jax.steady_vsam(rho, every=every, tolerance=tolerance)


def _sam(rho: Any, _: Any) -> optax.GradientTransformationExtraArgs:
    return vsam_jax.sam(rho)


def _published(rho: Any, task: Task) -> optax.GradientTransformationExtraArgs:
    settings = dict(task.settings.methods.vsam)
    return vsam_jax.vsam(rho, **{k: v for k, v in settings.items() if k != 'rho'})


def _amplified(rho: Any, _: Task) -> optax.GradientTransformationExtraArgs:
    return amplified(rho, every=3)


def _along_momentum(
    params: PyTree, opt_state: PyTree, rho: Any, gradient: Any
) -> PyTree:
    del gradient
    momentum = optax.tree.get(opt_state, 'trace')
    if momentum is None:
        momentum = optax.tree.get(opt_state, 'mu')
    return _towards(params, momentum, -rho)


def _along_quarter(
    params: PyTree, opt_state: PyTree, rho: Any, gradient: Any
) -> PyTree:
    del opt_state
    return _towards(params, gradient(params), rho)


def _towards(params: PyTree, direction: PyTree, length: Any) -> PyTree:
    scale = length / (optax.tree.norm(direction) + 1e-12)
    return optax.tree.add_scale(params, scale, direction)


def _slice(parts: int, every: int, tolerance: float = 0.3) -> Method:
    title = f'1/{parts} of the examples, every {_ordinal(every)}step'
    title += '' if tolerance == 0.3 else f', η = {tolerance}'
    direction = _sam if every == 1 else _steady(every, tolerance)
    # ρ / √p, to the next half or quarter: there the best radii of a first run were.
    radii = {2: 0.7, 4: 0.5, 8: 0.4, 16: 0.3}[parts]
    return Method(title, direction, every=every, parts=parts, radii=radii)


def _ordinal(number: int) -> str:
    return {1: '', 2: '2nd ', 3: '3rd '}.get(number, f'{number}th ')


PARTS, EVERY = (2, 4, 8, 16), (1, 3, 2, 5)
METHODS = {
    # The others are compared with these two.
    'sam': Method('SAM', _sam, every=1),
    'sgd': Method('SGD'),
    'msam': Method('MSAM', ahead=_along_momentum, radii=4.0),
    'steady_03': Method('steady vSAM, η = 0.3', _steady(3), every=3),
    'steady_05': Method('steady vSAM, η = 0.5', _steady(3, 0.5), every=3),
    'vsam': Method('vSAM', _published),
    'aesam': Method('AE-SAM', lambda rho, task: vsam_jax.aesam(rho, steps=task.steps)),
    'asyncsam': Method('AsyncSAM', lambda rho, _: vsam_jax.asyncsam(rho), every=1),
    'quarter': Method('ascent on a quarter', ahead=_along_quarter, ascent=0.25),
    'amplified': Method('amplified third', _amplified, every=3),
    'tail': Method('tail third', _sam, every=1, start=2 / 3),
    **{f'slice_{p}_{k}': _slice(p, k) for k in EVERY for p in PARTS},
    'slice_8_3_05': _slice(8, 3, 0.5),
}


def pairs_of(task: Task, name: str) -> list[Pair]:
    """The pairs of radius and learning rate that a method is tuned over."""
    if name == 'sgd':
        return [(0.0, rate) for rate in task.sgd_rates]
    radii = [METHODS[name].radii * rho for rho in task.radii]
    return list(itertools.product(radii, task.rates))


def at_edge(task: Task, name: str, chosen: Sequence[float]) -> tuple[bool, bool]:
    """Whether radius and learning rate are at an end of those tried."""
    tried = list(zip(*pairs_of(task, name), strict=True))
    radius, rate = (
        len(set(values)) > 1 and value in (min(values), max(values))
        for value, values in zip(chosen, tried, strict=True)
    )
    return radius, rate


def make_run(
    method: Method, task: Task, model: nn.Module
) -> Callable[..., tuple[PyTree, PyTree]]:
    """A function that trains one network.

    Args:
        method: how.
        task: what.
        model: the network of the task.

    Returns:
        ``run(images, start, rho, rate) -> variables`` with the training images
        [N, …], a :class:`tasks.Start` of one seed, and two scalars.
    """
    loss_fn = loss_of(model, task.settings.label_smoothing)

    def gradient(params: PyTree, stats: PyTree, batch: Any) -> tuple[PyTree, PyTree]:
        grads, (stats, _) = jax.grad(loss_fn, has_aux=True)(params, stats, batch, None)
        return grads, stats

    def run(images: jax.Array, start: tasks.Start, rho: Any, rate: Any) -> PyTree:
        tx = transformation(method, task, rho, rate)

        def step(carry: Any, now: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            params, stats, opt_state = carry
            number, rows = now
            batch = {
                'image': images[rows],
                'label': start.labels[rows],
            }
            at = params
            if method.ahead is not None:
                quarter = jax.tree.map(lambda x: x[::4], batch)
                of_quarter = lambda w: gradient(w, stats, quarter)[0]
                at = method.ahead(params, opt_state, rho, of_quarter)
            grads, new_stats = gradient(at, stats, batch)
            arguments = {}
            if method.direction is not None:
                part = jax.tree.map(lambda x: x[:: method.parts], batch)
                second = lambda w: gradient(w, stats, part)[0]
                name = 'grad_fn' if method.parts == 1 else 'psf_grad_fn'
                arguments[name] = second
            # Of no run alone: it stays a conditional under vmap.
            if method.start > 0:
                arguments['sample'] = number >= method.start * task.steps
            elif method.every is not None and method.every > 1:
                arguments['sample'] = number % method.every == 0
            updates, opt_state = tx.update(grads, opt_state, params, **arguments)
            return (optax.apply_updates(params, updates), new_stats, opt_state), None

        params = start.variables['params']
        stats = start.variables.get('batch_stats', {})
        numbers = jax.numpy.arange(start.order.shape[0])
        carry = params, stats, tx.init(params)
        (params, stats, _), _ = jax.lax.scan(step, carry, (numbers, start.order))
        return {'params': params, 'batch_stats': stats}

    return run


def transformation(
    method: Method, task: Task, rho: Any, rate: Any
) -> optax.GradientTransformationExtraArgs:
    """The optimizer: the direction of the method, and the base optimizer of the task.

    Args:
        method: the method.
        task: the task.
        rho: ρ, a scalar.
        rate: the first learning rate, a scalar; a cosine takes it to 0.

    Returns:
        An optax transformation.
    """
    settings = {**task.settings.optimizer, 'learning_rate': rate}
    base = trainer_methods.base_optimizer(task.steps, settings)
    if method.direction is None:
        return optax.with_extra_args_support(base)
    return optax.chain(method.direction(rho, task), base)
