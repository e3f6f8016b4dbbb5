"""What a configuration may hold.

A configuration is an ``ml_collections.ConfigDict``. Its sections are the keyword
arguments of the functions that read them, so a setting exists exactly if the
function takes it, and a misspelt one is an error that lists the right ones.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import ml_collections

T = TypeVar('T')

# The fields of a run. `compare` and `tune` say which runs to make of it.
FIELDS = (
    'name',
    'data',
    'augmentation',
    'label_noise',
    'model',
    'models',
    'quantization',
    'init_from',
    'method',
    'methods',
    'optimizer',
    'label_smoothing',
    'epochs',
    'batch_size',
    'seed',
    'dispatch',
    'log_every',
    'eval_every',
    'checkpoint_every',
    'checkpoint_keep',
)
PLANS = ('compare', 'tune')
DISPATCHES = ('planned', 'traced')
# Where data is on a machine: settings, but not of a run.
PLACES = ('data_dir', 'cache_dir')


class ConfigError(ValueError):
    """A setting that cannot be meant; the message says what is allowed."""


def call(function: Callable[..., T], where: str, settings: Any, **given: Any) -> T:
    """``function(**given, **settings)``, with errors that name the setting.

    Args:
        function: what reads the settings; its signature is what is allowed.
        where: the path of the settings, ``'config.optimizer'`` for instance.
        settings: a mapping of keyword arguments.
        **given: arguments that are not settings.

    Returns:
        What the function returns.

    Raises:
        ConfigError: for a setting that the function does not take, one that it
            needs and that is missing, or one that it refuses.
    """
    settings = dict(settings)
    parameters = inspect.signature(function).parameters
    allowed = [name for name in parameters if name not in given]
    one_of('settings', where, settings, allowed)
    missing = [
        name
        for name in allowed
        if name not in settings and parameters[name].default is inspect.Parameter.empty
    ]
    if missing:
        raise ConfigError(f'{where}.{missing[0]} is missing.')
    try:
        return function(**given, **settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{where}: {error}') from error


def one_of(what: str, where: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises ConfigError for the first of ``names`` that is not allowed."""
    allowed = tuple(allowed)
    for name in names:
        if name not in allowed:
            raise ConfigError(
                f'{where} holds {name!r}, which is not among its {what}:'
                f' {", ".join(allowed) or "there are none"}.'
            )


def pick(section: str, table: Mapping[str, T], name: Any) -> T:
    """``table[name]``, or a ConfigError that lists the names."""
    if name not in table:
        raise ConfigError(f'{section} must be one of {", ".join(table)}; got {name!r}.')
    return table[name]


def integer(where: str, value: Any, low: int) -> None:
    """Raises ConfigError unless ``value`` is an integer of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f'{where} must be an integer >= {low}, got {value!r}.')


def distinct(where: str, values: Iterable[Any]) -> None:
    """Raises ConfigError if something is there twice, and so would count twice."""
    values = list(values)
    if len({*values}) < len(values):
        raise ConfigError(f'{where} must hold nothing twice, got {values}.')


def check(config: Any) -> None:
    """Checks the fields of a run; the sections are checked by who reads them."""
    one_of('fields', 'config', config, FIELDS + PLANS)
    for name in FIELDS:
        if name not in config:
            raise ConfigError(f'config.{name} is missing.')
    pick('config.dispatch', dict.fromkeys(DISPATCHES), config.dispatch)
    pick('config.method', config.methods, config.method)
    pick('config.model', config.models, config.model)
    if not isinstance(config.init_from, str):
        raise ConfigError(
            'config.init_from must be the workdir of a finished run, or empty; got'
            f' {config.init_from!r}.'
        )
    integers = ('epochs', 'batch_size', 'log_every', 'eval_every', 'checkpoint_every')
    for name in (*integers, 'checkpoint_keep'):
        low = 0 if name == 'checkpoint_every' else 1
        integer(f'config.{name}', config[name], low)
    if not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:
        raise ConfigError(
            f'config.seed must be an integer in [0, 2**32), got {config.seed!r}.'
        )
    if not 0 <= config.label_noise <= 1:
        raise ConfigError(
            f'config.label_noise must be a share in [0, 1], got {config.label_noise!r}.'
        )
    if not 0 <= config.label_smoothing < 1:
        raise ConfigError(
            'config.label_smoothing must be a share in [0, 1), got'
            f' {config.label_smoothing!r}.'
        )


def with_values(
    config: ml_collections.ConfigDict, values: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """A copy of ``config`` with some values replaced, named by dotted path."""
    new = copy.deepcopy(config)
    with new.unlocked():
        try:
            new.update_from_flattened_dict(dict(values))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f'config cannot take {dict(values)}: {error}') from error
    return new


def of_run(config: Any) -> dict[str, Any]:
    """The settings that one run depends on, as plain JSON values.

    Those of the models and methods that it does not use are left out, so that
    tuning one method leaves the finished runs of the others valid; and so are the
    directories of the data, which is the same wherever it is.
    """
    run = without_places({name: _plain(config[name]) for name in FIELDS})
    run['models'] = {config.model: run['models'][config.model]}
    run['methods'] = {config.method: run['methods'][config.method]}
    return run


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings without the directories of one machine."""
    data = {key: item for key, item in settings['data'].items() if key not in PLACES}
    return {**settings, 'data': data}


def _plain(value: Any) -> Any:
    if isinstance(value, ml_collections.ConfigDict | Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def plain(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values, but for where the data is."""
    return without_places(_plain(config))


def differences(old: Any, new: Any, where: str = 'config') -> list[str]:
    """What differs between two plain configurations, one line per setting."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in differences(old.get(key), new.get(key), f'{where}.{key}')
        ]
    return [] if old == new else [f'{where} is {old!r} there and {new!r} here']
