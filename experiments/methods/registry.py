"""Methods by name: from a configuration to an optimizer and its steps."""

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

import vsam_jax
from experiments.common import configuration
from experiments.methods.amplified import amplified
from experiments.methods.esam import ESAM
from experiments.methods.method import Method, Task
from experiments.methods.part_ascent import PartAscent
from experiments.methods.saf import SAF
from experiments.models import quantization


def _sgd() -> optax.GradientTransformation:
    return optax.identity()


_BOTH = (True, False)
# How the gradient is made, and the programs that its plan can name.
_DIRECTIONS: dict[str, tuple[Callable[..., Any], tuple[bool, ...]]] = {
    'sgd': (_sgd, ()),
    'sam': (vsam_jax.sam, (True,)),
    'asam': (vsam_jax.asam, (True,)),
    'gsam': (vsam_jax.gsam, (True,)),
    'wsam': (vsam_jax.wsam, (True,)),
    'fsam': (vsam_jax.fsam, (True,)),
    'vasso': (vsam_jax.vasso, (True,)),
    'asyncsam': (vsam_jax.asyncsam, (True,)),
    'aesam': (vsam_jax.aesam, ()),
    'looksam': (vsam_jax.looksam, _BOTH),
    'vsam': (vsam_jax.vsam, _BOTH),
    'steady_vsam': (vsam_jax.steady_vsam, _BOTH),
    'lean_sam': (vsam_jax.lean_sam, _BOTH),
    'amplified': (amplified, _BOTH),
}


def _sgd_with_momentum(
    num_steps: int,
    learning_rate: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
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
    _check_numbers(math.inf, learning_rate=learning_rate, weight_decay=weight_decay)
    _check_numbers(1, momentum=momentum)
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
    )


def _adamw(
    num_steps: int,
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW, its learning rate decayed to 0 by a cosine.

    Args:
        num_steps: after how many steps the learning rate is 0.
        learning_rate: the first learning rate.
        b1: the decay of the mean of the directions.
        b2: the decay of the mean of their squares.
        weight_decay: added to what is multiplied by the learning rate, times w.

    Returns:
        An optax transformation.
    """
    _check_numbers(math.inf, learning_rate=learning_rate, weight_decay=weight_decay)
    _check_numbers(1, b1=b1, b2=b2)
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    return optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay)


def _check_numbers(end: float, **numbers: Any) -> None:
    """Raises ValueError for a number outside [0, end); traced ones are let through."""
    for name, value in numbers.items():
        if isinstance(value, (int, float)) and not 0 <= value < end:
            allowed = 'a finite number >= 0' if end == math.inf else f'in [0, {end})'
            raise ValueError(f'{name} must be {allowed}, got {value!r}.')


_BASES = {'sgd': _sgd_with_momentum, 'adamw': _adamw}


def base_optimizer(num_steps: int, settings: Any) -> Any:
    """What comes after the direction of a method.

    Args:
        num_steps: the length of the run.
        settings: ``config.optimizer``: ``name`` is ``'sgd'``, also without it, or
            ``'adamw'``; the others are the arguments of these functions.

    Returns:
        An optax transformation.

    Raises:
        ConfigError: for unknown names and settings.
    """
    settings = dict(settings)
    base = configuration.pick(
        'config.optimizer.name', _BASES, settings.pop('name', 'sgd')
    )
    return configuration.call(base, 'config.optimizer', settings, num_steps=num_steps)


def create(name: str, settings: Any, optimizer: Any, task: Task) -> Method:
    """Makes a method.

    Args:
        name: ``config.method``.
        settings: ``config.methods[name]``, the arguments of the method. ``direction``
            says which method that is, where it is not the name itself: another name, or
            the place of a function of your own, ``'package.module:function'``; and
            ``title`` how it is called in tables, so that one method may stand there
            with several settings. In ``optimizer`` it may have settings of the base
            optimizer of its own. ``stats_tensors`` stands for a ``stats_mask`` of the
            network's last so many tensors (0: of all), and ``perturb_step_sizes`` (True
            without it) set to False for a ``perturb_mask`` that leaves the steps of a
            quantized network where they are.
        optimizer: ``config.optimizer``, those that all methods share.
        task: what it is made for.

    Returns:
        The method.

    Raises:
        ConfigError: for unknown names and settings.
    """
    where = f'config.methods.{name}'
    settings = dict(settings)
    settings.pop('title', None)
    field = f'{where}.direction' if 'direction' in settings else 'config.method'
    name = settings.pop('direction', name)
    own = dict(settings.pop('optimizer', {}))
    base = base_optimizer(task.num_steps, {**optimizer, **own})
    if name == 'esam':
        esam = configuration.call(ESAM, where, settings)
        return Method(base, (), make_step=esam.make_step, always_samples=True)
    if name == 'part_ascent':
        part = configuration.call(PartAscent, where, settings)
        parts = round(1 / part.share)
        return Method(
            base, (), make_step=part.make_step, always_samples=True, parts=parts
        )
    if name == 'saf':
        saf = configuration.call(
            SAF,
            where,
            settings,
            num_examples=task.num_examples,
            num_classes=task.num_classes,
            steps_per_epoch=task.steps_per_epoch,
        )
        return Method(base, (), make_step=saf.make_step, init_memory=saf.init_memory)
    if name == 'msam':
        last = configuration.call(vsam_jax.msam, where, settings)
        tx = optax.chain(base, last)
        return Method(tx, (), eval_params=vsam_jax.msam_eval_params)
    direction, programs = _direction(field, name)
    allowed = inspect.signature(direction).parameters
    if name == 'aesam':
        settings.setdefault('steps', task.num_steps)
    if 'perturb_mask' in allowed and not settings.pop('perturb_step_sizes', True):
        settings['perturb_mask'] = quantization.all_but_step_sizes
    if 'stats_mask' in allowed:
        tensors = settings.pop('stats_tensors', 0)
        if tensors:
            settings['stats_mask'] = configuration.call(
                task.last_tensors, f'{where}.stats_tensors', {}, n=tensors
            )
    first = configuration.call(direction, where, settings)
    make_step, share = vsam_jax.linen.make_train_step, 1
    if 'share' in allowed:
        share = settings.get('share', allowed['share'].default)
        make_step = functools.partial(make_step, psf_share=share)
    return Method(
        optax.chain(first, base), programs, make_step=make_step, parts=round(1 / share)
    )


def hyperparameters(config: Any) -> dict[str, float]:
    """The learning rate of a configuration and, if its method has one, ρ."""
    settings = config.methods[config.method]
    own = dict(settings.get('optimizer', {}))
    rate = own.get('learning_rate', config.optimizer.get('learning_rate'))
    found = {'learning_rate': rate, 'rho': settings.get('rho')}
    return {name: value for name, value in found.items() if value is not None}


def create_shared(config: Any, task: Task) -> Method:
    """A method whose learning rate and ρ are numbers in the optimizer state.

    Runs that differ in nothing but these have one program in common; elsewhere both
    are constants of the program. ``method.tx.init`` puts those of the configuration
    there, and :func:`with_hyperparameters` others. Results are those of
    :func:`create` to rounding.

    Args:
        config: the configuration.
        task: what it is made for.

    Returns:
        The method.

    Raises:
        ConfigError: for unknown names and settings.
    """
    settings, name = dict(config.methods[config.method]), config.method
    own = {**config.optimizer, **dict(settings.pop('optimizer', {}))}
    method = create(name, settings, own, task)
    # Other steps than the usual take ρ from the state by themselves.
    in_step = settings.get('direction', name) == 'part_ascent'

    def make(learning_rate: Any, rho: Any = None) -> Any:
        traced = {} if rho is None or in_step else {'rho': rho}
        rates = {**own, 'learning_rate': learning_rate}
        return create(name, {**settings, **traced}, rates, task).tx

    tx: Any = optax.inject_hyperparams(make)(**hyperparameters(config))
    return dataclasses.replace(method, tx=tx, shared=True)


def with_hyperparameters(opt_state: Any, config: Any) -> Any:
    """The state of a method of :func:`create_shared` with other values.

    Args:
        opt_state: the state of its transformation.
        config: what the values are of.
    """
    values = hyperparameters(config)
    placed = {
        name: jnp.asarray(values[name], old.dtype)
        for name, old in opt_state.hyperparams.items()
    }
    return opt_state._replace(hyperparams=placed)


def _direction(field: str, name: str) -> tuple[Callable[..., Any], tuple[bool, ...]]:
    """How the gradient is made, and the programs that its plan can name.

    Args:
        field: where the name stands.
        name: one of the methods here, or the place of a function elsewhere.
    """
    module, colon, function = name.partition(':')
    if not colon:
        names = dict.fromkeys((*_DIRECTIONS, 'esam', 'part_ascent', 'saf', 'msam'))
        configuration.pick(field, names, name)
        return _DIRECTIONS[name]
    try:
        return getattr(importlib.import_module(module), function), _BOTH
    except (ImportError, AttributeError) as error:
        raise configuration.ConfigError(
            f'{field} must be the place of a function, package.module:name, got'
            f' {name!r}: {error}.'
        ) from error
