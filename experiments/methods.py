"""Methods: from a configuration to an optax chain and what a driver must know."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

import vsam_jax
from experiments import configuration


@dataclasses.dataclass(frozen=True)
class Method:
    """A method, ready to be put into a train state.

    Attributes:
        tx: the whole optimizer.
        programs: the values of ``sample`` that a planned run compiles programs
            for; none where there is no plan (no VSAMState), as in SGD.
        make_step: builds the training step from a loss, as
            :func:`vsam_jax.make_train_step` does; for methods that are more than
            a transformation of gradients.
    """

    tx: optax.GradientTransformationExtraArgs
    programs: tuple[bool, ...]
    make_step: Callable[[Any], Callable[..., Any]] = vsam_jax.make_train_step


def _sgd() -> optax.GradientTransformation:
    return optax.identity()


_BOTH = (True, False)
# How the gradient is made, and the programs that its plan can name.
_DIRECTIONS: dict[str, tuple[Callable[..., Any], tuple[bool, ...]]] = {
    'sgd': (_sgd, ()),
    'sam': (vsam_jax.sam, (True,)),
    'asam': (vsam_jax.asam, (True,)),
    'looksam': (vsam_jax.looksam, _BOTH),
    'vsam': (vsam_jax.vsam, _BOTH),
}
# As they are written in tables and figures.
TITLES = {
    'sgd': 'SGD',
    'sam': 'SAM',
    'asam': 'ASAM',
    'looksam': 'LookSAM',
    'vsam': 'vSAM',
}


def base_optimizer(
    num_steps: int,
    learning_rate: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """SGD with momentum, its learning rate decayed to 0 by a cosine.

    Args:
        num_steps: after how many steps the learning rate is 0.
        learning_rate: the first learning rate.
        momentum: the decay of the momentum.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: added to the direction as weight_decay · w.

    Returns:
        An optax transformation.
    """
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
    )


def create(name: str, settings: Any, optimizer: Any, num_steps: int) -> Method:
    """Makes a method.

    Args:
        name: ``config.method``.
        settings: ``config.methods[name]``, the arguments of the method; in
            ``optimizer`` it may have arguments of :func:`base_optimizer` of its own.
        optimizer: ``config.optimizer``, those that all methods share.
        num_steps: the length of the run.

    Returns:
        The method.

    Raises:
        ConfigError: for unknown names and settings.
    """
    direction, programs = configuration.pick('config.method', _DIRECTIONS, name)
    settings = dict(settings)
    own = dict(settings.pop('optimizer', {}))
    first = configuration.call(direction, f'config.methods.{name}', settings)
    base = configuration.call(
        base_optimizer,
        'config.optimizer',
        {**optimizer, **own},
        num_steps=num_steps,
    )
    return Method(tx=optax.chain(first, base), programs=programs)
