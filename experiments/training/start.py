"""What a run starts from: random weights, or those that another run ended with."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax import traverse_util

from experiments.common import configuration
from experiments.models import quantization
from experiments.training import checkpoints, run_files

PyTree = Any
T = TypeVar('T')


def variables(
    model: nn.Module, key: jax.Array, images: jax.Array, config: Any, seed: int
) -> PyTree:
    """The variables of a network at step 0.

    With ``config.init_from`` they are those that the run there ended with. The steps of
    a quantized network's grids are not taken over but start anew, from these weights
    and from what the network makes of ``images`` with them: that run may have trained
    in full precision, or with other bits.

    Args:
        model: the network, quantized or not.
        key: what random weights are drawn with.
        images: the first normalised training images, [batch, height, width, channels],
            which the grids of a quantized network start from.
        config: the configuration. In ``init_from`` ``{method}`` and ``{seed}`` stand
            for those of this run; the run there had the same ``config.model`` with the
            same settings, but for ``dtype``.
        seed: the seed of this run.

    Returns:
        ``params``, and ``batch_stats`` where the network has BatchNorm.

    Raises:
        ConfigError: if there is no such run, or it trained another network.
    """
    if not config.init_from:
        return _at_random(model, key, images)
    try:
        path = pathlib.Path(config.init_from.format(method=config.method, seed=seed))
    except (LookupError, ValueError) as error:
        raise configuration.ConfigError(
            'config.init_from may hold {method} and {seed} and no other braces, got'
            f' {config.init_from!r}.'
        ) from error
    _check_network(path, {config.model: config.models[config.model]})
    fresh = jax.eval_shape(functools.partial(_at_random, model), key, images)
    wanted = _without_step_sizes(fresh)
    found = _ours(checkpoints.variables, path, wanted)
    differs = jax.tree.leaves(
        jax.tree_util.tree_map_with_path(_difference, found, wanted)
    )
    if differs:
        raise configuration.ConfigError(
            f'config.init_from: {path} trained another network:\n  '
            + '\n  '.join(differs)
        )
    return _with_step_sizes(model, found, images)


def _without_step_sizes(variables: PyTree) -> PyTree:
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(variables)
    return traverse_util.unflatten_dict(
        {path: x for path, x in flat.items() if not quantization.is_step_size(path)}
    )


def _difference(path: Any, found: Any, wanted: jax.ShapeDtypeStruct) -> str | None:
    # What is not in the checkpoint is left as it was asked for.
    there = 'missing' if found is wanted else found.shape
    if there == wanted.shape:
        return None
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return f'{name} is {there} there and {wanted.shape} here'


@functools.partial(jax.jit, static_argnames='model')
def _at_random(model: nn.Module, key: jax.Array, images: jax.Array) -> PyTree:
    return model.init(key, images, train=True)


def _check_network(path: pathlib.Path, settings: Any) -> None:
    """Raises ConfigError unless a run in ``path`` trained such a network."""
    theirs = _ours(run_files.result_of, path)['config']['models']
    without_dtype = lambda models: {
        name: {key: value for key, value in dict(model).items() if key != 'dtype'}
        for name, model in models.items()
    }
    differs = configuration.differences(
        without_dtype(theirs), without_dtype(settings), 'config.models'
    )
    if differs:
        raise configuration.ConfigError(
            f'config.init_from: {path} trained another network:\n  '
            + '\n  '.join(differs)
        )


def _ours(read: Callable[..., T], *arguments: Any) -> T:
    """What ``read`` returns, or its error with the name of the setting."""
    try:
        return read(*arguments)
    except configuration.ConfigError as error:
        raise configuration.ConfigError(f'config.init_from: {error}') from error


@functools.partial(jax.jit, static_argnames='model')
def _with_step_sizes(model: nn.Module, variables: PyTree, images: jax.Array) -> PyTree:
    """The same variables, and what the network has besides."""
    # What is missing is made, as in `init`.
    _, made = model.apply(
        variables,
        images,
        train=True,
        mutable=['params', 'batch_stats'],
        rngs={'params': jax.random.key(0)},
    )
    return {**variables, 'params': made['params']}
