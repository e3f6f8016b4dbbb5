r"""Checkpoints that know which run they belong to, written and read by Orbax.

A resumed run continues as if it had not stopped only if both state *and* settings are
the same. Orbax stores the state, but casts an array to whatever dtype you ask for, and
no array shows the seed or the decay. So :func:`save` also stores the settings, and the
shapes and dtypes of all arrays. :func:`restore` raises an error if they differ, and
says where. Everything else (how many checkpoints to keep, when to save, asynchronous
saving, several hosts) is up to the ``CheckpointManager`` that you create.

*Exactness.* The state of a method, including its plan, consists of arrays only. Its
random numbers are a function of the seed and the step. So on the CPU, a run that is
restored in the middle of a window continues bit for bit like the uninterrupted one, if
it sees the same batches. This holds for planned (:class:`vsam_jax.PlannedStep`) and
traced runs.

On a GPU this requires programs that give the same bits twice: the same GPU model,
number of GPUs and versions of jaxlib, CUDA and cuDNN, and
``XLA_FLAGS="--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"``. Some
kernels add in any order, and autotuning may choose other kernels in the second run.
Without the flags a resumed run differs by rounding. Its plan differs too, once that
rounding moves a budget across a whole number.

*Killed while saving.* Until a checkpoint is complete, Orbax writes it under another
name or without its success marker. ``manager.latest_step()`` and :func:`restore` see
only complete checkpoints.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from vsam_jax import _checks
from vsam_jax._state import check_alive
from vsam_jax._types import PyTree

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


__all__ = ['restore', 'save', 'settings_of']

# The names of the two items of a checkpoint.
_STATE = 'state'
_CONFIGURATION = 'configuration'

# How many differences an error lists.
_MAX_LISTED = 8


def settings_of(method: Callable[..., Any]) -> dict[str, Any]:
    """Returns all arguments of a method and their values, defaults included.

    Args:
        method: a function such as :func:`vsam_jax.vsam`, or a ``functools.partial`` of
            one with all arguments that you set.

    Returns:
        A dictionary from argument names to values, with ``method``, the name of the
        function. Before you store it, replace any value that is a function (a schedule,
        a callable mask) by a description.

    Raises:
        TypeError: if an argument without a default is missing.

    Example:
        >>> import functools, vsam_jax
        >>> method = functools.partial(vsam_jax.sam, rho=0.1)
        >>> settings = vsam_jax.checkpoint.settings_of(method)
        >>> settings['method'], settings['rho'], settings['perturb_mask']
        ('sam', 0.1, None)
    """
    function, args, keywords = method, (), {}
    if isinstance(method, functools.partial):
        function, args, keywords = method.func, method.args, method.keywords
    bound = inspect.signature(function).bind(*args, **keywords)
    bound.apply_defaults()
    return {'method': getattr(function, '__name__', repr(function)), **bound.arguments}


def save(
    manager: 'ocp.CheckpointManager',
    step: int,
    state: PyTree,
    *,
    config: Mapping[str, Any],
    **options: Any,
) -> bool:
    """Saves a state together with its configuration.

    Args:
        manager: an ``orbax.checkpoint.CheckpointManager`` of the target directory. By
            default it writes a copy in the background, so you can donate the state to
            the next step at once.
        step: the number of the checkpoint.
        state: any tree of arrays that is more than a bare array: a
            :class:`vsam_jax.linen.TrainState`, ``(params, opt_state)``. It may contain
            PRNG keys.
        config: every setting that affects how the run continues, as JSON values, arrays
            of real numbers and dtypes. :func:`settings_of` collects those of a method.
        **options: passed on to ``manager.save``, such as ``metrics`` or ``force``.

    Returns:
        Whether the manager saved. (It may have a save interval.)

    Raises:
        TypeError: if ``config`` contains a value that cannot be stored and compared.
        ValueError: if two keys of ``config`` are the same in JSON.
        RuntimeError: if ``state`` was donated to a step.

    Example:
        >>> import functools, tempfile
        >>> import jax.numpy as jnp, optax, orbax.checkpoint as ocp, vsam_jax
        >>> from vsam_jax import checkpoint
        >>> method = functools.partial(vsam_jax.vsam, rho=0.05, window=10, seed=1)
        >>> config = {'vsam': checkpoint.settings_of(method), 'learning_rate': 0.1}
        >>> tx = optax.chain(method(), optax.sgd(0.1))
        >>> params = jnp.ones(3)
        >>> state = (params, tx.init(params))
        >>> directory = tempfile.TemporaryDirectory()
        >>> with ocp.CheckpointManager(directory.name) as manager:
        ...   if manager.latest_step() is not None:
        ...     state = checkpoint.restore(manager, state, config=config)
        ...   _ = checkpoint.save(manager, 0, state, config=config)
        ...   manager.wait_until_finished()
        ...   config['vsam']['seed'] = 2
        ...   try:
        ...     checkpoint.restore(manager, state, config=config)
        ...   except ValueError as error:
        ...     print(str(error).splitlines()[1].strip())
        config['vsam']['seed'] is 1 in the checkpoint, 2 in this run
        >>> directory.cleanup()
    """
    import orbax.checkpoint as ocp

    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        check_alive(leaf, f'The state, at {_checks.where(path)},')
    items = {
        _STATE: ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
        _CONFIGURATION: ocp.args.JsonSave(_configuration(config, state)),  # pyright: ignore[reportCallIssue]
    }
    return manager.save(step, args=ocp.args.Composite(**items), **options)


def restore(
    manager: 'ocp.CheckpointManager',
    like: PyTree,
    *,
    config: Mapping[str, Any],
    step: int | None = None,
) -> PyTree:
    """Restores a state, if its configuration is that of this run.

    Args:
        manager: an ``orbax.checkpoint.CheckpointManager`` of the directory.
        like: a state with the desired structure. Its leaves are arrays (for instance a
            new run's first state) or ``jax.ShapeDtypeStruct`` objects. Arrays are
            restored to the shardings of ``like``, which may differ from the saved ones.
            (:func:`vsam_jax.sharding.state_shardings` returns shardings.)
        config: the settings of this run, in the form passed to :func:`save`.
        step: the number of the checkpoint; None for the latest.

    Returns:
        A tree like ``like``.

    Raises:
        FileNotFoundError: if there is no complete checkpoint (of that step).
        ValueError: if settings, or structure, shapes or dtypes of the state, differ
            from those of the checkpoint (the message lists the differences), or if the
            checkpoint was not written by :func:`save`.
    """
    import orbax.checkpoint as ocp

    steps = manager.all_steps()
    if step is None:
        step = max(steps, default=None)
    if step is None or step not in steps:
        raise FileNotFoundError(
            f'{manager.directory} holds no complete checkpoint'
            + (f' of step {step}; it holds {sorted(steps)}.' if steps else '.')
        )
    try:
        found = manager.restore(
            step,
            args=ocp.args.Composite(**{_CONFIGURATION: ocp.args.JsonRestore()}),
        )[_CONFIGURATION]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f'The checkpoint of step {step} in {manager.directory} must be one that'
            f' vsam_jax.checkpoint.save wrote, but has no {_CONFIGURATION!r} that can'
            ' be read.'
        ) from error
    wanted = _configuration(config, like)
    differences = _differences('config', found['config'], wanted['config'])
    differences += _differences('state', found['state'], wanted['state'])
    if differences:
        listed = differences[:_MAX_LISTED]
        if len(differences) > len(listed):
            listed.append(f'and {len(differences) - len(listed)} more')
        raise ValueError(
            f'The checkpoint of step {step} in {manager.directory} belongs to another'
            ' configuration:\n  ' + '\n  '.join(listed)
        )
    return manager.restore(
        step,
        args=ocp.args.Composite(
            **{_STATE: ocp.args.StandardRestore(like)}  # pyright: ignore[reportCallIssue]
        ),
    )[_STATE]


def _configuration(config: Mapping[str, Any], state: PyTree) -> dict[str, Any]:
    """The JSON values that are stored with the arrays."""
    if not isinstance(config, Mapping):
        raise TypeError(f'config must be a mapping, got {_checks.shown(config)}.')
    arrays = {
        jax.tree_util.keystr(path): _array_type(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    return {'config': _plain('config', config), 'state': arrays}


def _array_type(x: Any) -> str:
    """Dtype and shape, such as ``float32[3,4]``."""
    # A step returns a counter that starts as a Python number as an array.
    dtype = x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)
    return f'{dtype}[{",".join(map(str, getattr(x, "shape", ())))}]'


def _plain(where: str, value: Any) -> Any:
    """``value`` as JSON would return it; raises, with the place, if it cannot."""
    if isinstance(value, Mapping):
        plain = {str(k): _plain(f'{where}[{k!r}]', v) for k, v in value.items()}
        if len(plain) < len(value):
            raise ValueError(
                f'{where} must have keys that differ as strings, got {[*value]!r}.'
            )
        return plain
    if isinstance(value, (list, tuple)):
        return [_plain(f'{where}[{i}]', v) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    is_array = isinstance(value, (np.ndarray, np.generic, jax.Array))
    # To NumPy bfloat16 is not a number, and JAX keys are not NumPy arrays.
    if is_array and any(
        jnp.issubdtype(value.dtype, kind)
        for kind in (jnp.bool_, jnp.integer, jnp.floating)
    ):
        return value.tolist()
    # NumPy turns any other class into the dtype of objects.
    scalars = (np.generic, bool, int, float, complex)
    is_scalar = isinstance(value, type) and issubclass(value, scalars)
    if is_scalar or isinstance(value, (np.dtype, type(jnp.float32))):
        return jnp.dtype(value).name
    raise TypeError(
        f'{where} must be a JSON value, an array of real numbers or a dtype, so that it'
        f' can be stored and compared, got {_checks.shown(value)}. Describe a function'
        " or a class by its name and numbers, such as 'cosine from 0.05 to 0 in 1000"
        " steps'."
    )


def _differences(where: str, found: Any, wanted: Any) -> list[str]:
    """The differences between two JSON values, one line each."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines = []
        for key in [*found, *(key for key in wanted if key not in found)]:
            # Paths into the state have their own brackets.
            here = where + (key if where == 'state' else f'[{key!r}]')
            if key not in wanted:
                lines.append(f'{here} is in the checkpoint alone')
            elif key not in found:
                lines.append(f'{here} is in this run alone')
            else:
                lines += _differences(here, found[key], wanted[key])
        return lines
    both_lists = isinstance(found, list) and isinstance(wanted, list)
    if both_lists and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [x for i, two in pairs for x in _differences(f'{where}[{i}]', *two)]
    both_nan = found != found and wanted != wanted
    if found == wanted or both_nan:
        return []
    found, wanted = (_checks.shown(x) for x in (found, wanted))
    return [f'{where} is {found} in the checkpoint, {wanted} in this run']
