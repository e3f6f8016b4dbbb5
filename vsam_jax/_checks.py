"""Errors for bad arguments: the argument's name, its value, and what is allowed.

All checks run in Python when a function is called or traced. None is part of a
compiled step.
"""

import difflib
import inspect
import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import core

from vsam_jax import _numerics
from vsam_jax._types import PyTree

_MAX_SHOWN = 100
_PARTS = (
    ' If these are parts of a model that are not trained, leave them out, with None in'
    ' their place: eqx.filter(model, eqx.is_inexact_array) of Equinox does.'
)


def _is_traced(value: Any) -> bool:
    return isinstance(value, core.Tracer)


def shown(value: Any) -> str:
    """A value as errors show it: on one line, and without pages of numbers."""
    if getattr(value, 'shape', ()) and hasattr(value, 'dtype'):
        return f'an array of shape {value.shape} and dtype {value.dtype}'
    text = ' '.join(repr(value).split())
    return text if len(text) <= _MAX_SHOWN else f'{text[:_MAX_SHOWN]}…'


def _reject_array(name: str, value: Any) -> None:
    """Raises for an array: static arguments determine shapes and programs."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f'{name} must be a Python number that is known before tracing, got'
            f' {shown(value)}. Under optax.inject_hyperparams inject ρ alone:'
            ' optax.inject_hyperparams(lambda rho: vsam_jax.vsam(rho))(rho=0.05).'
        )


def integer(name: str, value: Any, *, low: int, high: int | None = None) -> int:
    """Returns ``value`` as an int in [low, high], or raises."""
    _reject_array(name, value)
    allowed = f'an integer >= {low}'
    if high is not None:
        allowed = f'an integer in [{low}, {high}]'
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f'{name} must be {allowed}, got {shown(value)}.')
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(f'{name} must be {allowed}, got {shown(value)}.') from None
    if result < low or (high is not None and result > high):
        raise ValueError(f'{name} must be {allowed}, got {shown(value)}.')
    return result


def real(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = float(np.finfo(np.float32).max),
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Returns ``value`` as a float in [low, high], or raises."""
    _reject_array(name, value)
    if low == -math.inf:
        allowed = 'a finite number'
    elif high == float(np.finfo(np.float32).max):
        allowed = f'a finite number {">" if open_low else ">="} {low:g}'
    else:
        ends = '(' if open_low else '[', ')' if open_high else ']'
        allowed = f'a number in {ends[0]}{low:g}, {high:g}{ends[1]}'
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f'{name} must be {allowed}, got {shown(value)}.')
    result = float(value)
    inside = low < result if open_low else low <= result
    inside = inside and (result < high if open_high else result <= high)
    if not (math.isfinite(result) and inside):
        raise ValueError(f'{name} must be {allowed}, got {shown(value)}.')
    return result


def radius(name: str, value: Any) -> Any:
    """Checks ρ: a number, a scalar array (traced too) or an optax schedule."""
    if callable(value):
        return value
    return _radius(
        name, value, 'a finite number >= 0 or a schedule (a callable of the step)'
    )


def scheduled_radius(name: str, value: Any) -> Any:
    """Checks the result of a schedule of ρ, a number or a scalar array (traced too)."""
    return _radius(f'the result of the schedule {name}', value, 'a finite number >= 0')


def current_radius(name: str, value: Any, step: Any, dtype: Any) -> jax.Array:
    """ρ of this step.

    Args:
        name: the name of the argument.
        value: ρ after the check of :func:`radius`.
        step: the update count, for a schedule.
        dtype: the dtype of the result.

    Returns:
        A scalar. If the number is known only when the step runs and is negative, it is
        NaN, so that the error cannot go unnoticed.
    """
    if callable(value):
        value = scheduled_radius(name, value(step))
    elif not _is_traced(value):
        return jnp.asarray(value, dtype)
    result = jnp.asarray(value, dtype)
    return jnp.where(result >= 0, result, jnp.nan)


def _radius(name: str, value: Any, allowed: str) -> Any:
    if isinstance(value, (jax.Array, np.ndarray)):
        number = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(
            value.dtype, jnp.integer
        )
        if value.ndim or not number:
            raise TypeError(
                f'{name} must be {allowed}, got an array of shape {value.shape} and'
                f' dtype {value.dtype}.'
            )
        if _is_traced(value):
            return value
    elif isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f'{name} must be {allowed}, got {shown(value)}.')
    # Wider numbers would be infinite in the statistics dtype.
    if not 0 <= float(value) <= float(np.finfo(np.float32).max):
        raise ValueError(f'{name} must be {allowed}, got {shown(value)}.')
    return value


def floating_dtype(name: str, value: Any) -> Any:
    """Returns ``value`` as a floating-point dtype (None stays None)."""
    if value is None:
        return None
    allowed = 'None or a floating-point dtype of 16 bits or more such as jnp.bfloat16'
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise TypeError(f'{name} must be {allowed}, got {shown(value)}.') from None
    if not _computable(dtype):
        raise TypeError(f'{name} must be {allowed}, got {shown(value)}.')
    return dtype


def _computable(dtype: Any) -> bool:
    """Whether ``dtype`` is a real floating-point type that jax can promote."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return False
    try:
        _numerics.wide_dtype(dtype)
    except ValueError:  # TypePromotionError: float8 and narrower.
        return False
    return True


def instance(name: str, value: Any, protocol: Any, example: str) -> Any:
    """Returns ``value`` if it is an instance of ``protocol``, or raises."""
    # A class has the attributes of its instances.
    if isinstance(value, type) or not isinstance(value, protocol):
        raise TypeError(
            f'{name} must be a {protocol.__name__}, such as {example}, got'
            f' {shown(value)}.'
        )
    return value


def flag(name: str, value: Any) -> bool:
    """Returns ``value`` if it is a bool, or raises."""
    if not isinstance(value, bool):
        raise TypeError(f'{name} must be True or False, got {shown(value)}.')
    return value


def gradient_function(name: str, value: Any, params: PyTree) -> None:
    """Raises unless ``value`` can be called with the parameters alone."""
    if not callable(value):
        raise TypeError(
            f'{name} must be a function of the parameters, got {shown(value)}.'
        )
    try:
        signature = inspect.signature(value)
    except ValueError:  # A builtin may have no known signature.
        return
    try:
        signature.bind(params)
    except TypeError as error:
        raise TypeError(
            f'{name} must be a function of the parameters alone, got one that takes'
            f' {signature}: {error}. Close over the rest, {name}=lambda p:'
            ' jax.grad(loss)(p, batch). (If it comes from optax.contrib.sam, drop its'
            ' second argument.)'
        ) from None


def axis_name(name: str, value: Any) -> Any:
    """Checks the name of a mapped axis, or a tuple of several."""
    names = value if isinstance(value, tuple) else (value,)
    if value is None or all(isinstance(n, str) for n in names):
        return value
    raise TypeError(
        f'{name} must be None, the name of a mapped axis or a tuple of such names (()'
        f' where gradients are means already), got {shown(value)}.'
    )


def mask(name: str, value: Any) -> Any:
    """Checks a mask before there are parameters to compare it with."""
    if value is None or callable(value):
        return value
    _check_mask_leaves(name, value)
    return value


def _check_mask_leaves(name: str, tree: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, (bool, np.bool_)):
            raise TypeError(
                f'{name} must be None, a pytree of booleans shaped like the'
                ' parameters (or a prefix of that), or a callable that makes one from'
                f' the parameters; at {where(path)} it holds {shown(leaf)}.'
            )


def resolve_mask(
    name: str, value: Any, params: PyTree, *, allow_empty: bool = False
) -> PyTree | None:
    """Returns the mask as a tree of booleans shaped like ``params``, or None."""
    if value is None or not jax.tree.leaves(params):
        return None
    tree = value(params) if callable(value) else value
    _check_mask_leaves(name, tree)
    try:
        full = jax.tree.map(
            lambda flag, part: jax.tree.map(lambda _: bool(flag), part),
            tree,
            params,
        )
    except ValueError as error:
        raise ValueError(
            f'{name} must have the structure of the parameters or a prefix of it:'
            f' {first_difference(tree, params, prefix=True)}'
        ) from error
    if not (allow_empty or any(jax.tree.leaves(full))):
        raise ValueError(
            f'{name} must pick at least one tensor, but it is False for all'
            f' {len(jax.tree.leaves(full))} of them.'
        )
    return full


def floating_leaves(name: str, tree: PyTree) -> None:
    """Raises if a leaf is not a real floating-point array."""
    if isinstance(tree, optax.LookaheadParams):
        raise ValueError(
            f'{name} must be the parameters that the gradient was taken at, got'
            ' optax.LookaheadParams. Call the sharpness-aware transformation first,'
            ' direction, s = tx.update(grads, s, params.fast, grad_fn=...), and hand'
            ' the direction to optax.lookahead(...).update(direction, state, params).'
        )
    masked = [
        path
        for path, node in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
        )
        if isinstance(node, optax.MaskedNode)
    ]
    if masked:
        raise ValueError(
            f'{name} holds optax.MaskedNode at {where(masked[0])}: a'
            ' sharpness-aware transformation must be outside optax.masked and'
            ' optax.partition, because grad_fn needs the whole tree. Write'
            ' optax.chain(vsam(perturb_mask=...), optax.masked(...)) instead.'
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(leaf, 'dtype') or not hasattr(leaf, 'shape'):
            raise TypeError(
                f'{name} must hold arrays; at {where(path)} it holds {shown(leaf)}.'
                f'{_PARTS}'
            )
        if not _computable(leaf.dtype):
            hint = ''
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                hint = ' Make leaves of the real and the imaginary parts.'
            elif not jnp.issubdtype(leaf.dtype, jnp.floating):
                hint = _PARTS
            raise TypeError(
                f'{name} must hold real floating-point arrays of 16 bits or more; at'
                f' {where(path)} the dtype is {leaf.dtype}.{hint}'
            )


def same_tree(
    name: str, tree: PyTree, like_name: str, like: PyTree, *, dtypes: bool
) -> None:
    """Raises unless both trees have the same structure, shapes and (asked) dtypes."""
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            f'{name} must have the tree structure of {like_name}:'
            f' {first_difference(tree, like)}'
        )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(tree),
        jax.tree.leaves(like),
        strict=True,
    )
    for (path, x), y in pairs:
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f'{name} must have the shapes of {like_name}: at {where(path)} it'
                f' must be {jnp.shape(y)}, got {jnp.shape(x)}.'
            )
        if dtypes and jnp.result_type(x) != jnp.result_type(y):
            raise TypeError(
                f'{name} must have the dtypes of {like_name}: at {where(path)} it'
                f' must be {jnp.result_type(y)}, got {jnp.result_type(x)}.'
            )


def difference(tree: PyTree, like: PyTree) -> str:
    """One line on how two trees differ in structure or shapes; '' if they do not."""
    if jax.tree.structure(tree) != jax.tree.structure(like):
        return first_difference(tree, like)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, x), y in zip(leaves, jax.tree.leaves(like), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            return f'at {where(path)} its shape is {jnp.shape(x)}, not {jnp.shape(y)}.'
    return ''


def first_difference(tree: PyTree, like: PyTree, *, prefix: bool = False) -> str:
    """One line on the first place where two trees differ in structure.

    Args:
        tree: what was given.
        like: what it should look like.
        prefix: whether a leaf of ``tree`` may replace a subtree of ``like``.

    Returns:
        A sentence.
    """
    return _difference((), tree, like, prefix) or (
        f'it is made of other nodes, such as {type(tree).__name__} for'
        f' {type(like).__name__}.'
    )


def _difference(path: Any, tree: PyTree, like: PyTree, prefix: bool) -> str:
    given, wanted = (_children(x) for x in (tree, like))
    if given is None and (prefix or wanted is None):
        return ''
    if given is None or wanted is None or type(tree) is not type(like):
        return f'at {where(path)} it has {kind(tree)}, where {kind(like)} is wanted.'
    extra = [k for k in given if k not in wanted]
    missing = [k for k in wanted if k not in given]
    if extra or missing:
        key = (missing or extra)[0]
        verb = 'lacks' if missing else 'has in addition'
        return f'it {verb} {where((*path, key))}.'
    for key, child in given.items():
        if text := _difference((*path, key), child, wanted[key], prefix):
            return text
    return ''


def _children(tree: PyTree) -> dict[Any, Any] | None:
    """The children of a node by their keys, None for a leaf."""
    if tree is None:
        return {}
    pairs, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is not tree
    )
    if jax.tree_util.treedef_is_leaf(structure):
        return None
    return {path[0]: child for path, child in pairs if path}


def kind(tree: PyTree) -> str:
    """The type of a node or leaf, as errors show it."""
    if tree is None:
        return 'None'
    name = type(tree).__name__
    if isinstance(tree, (jax.Array, np.ndarray)):
        return f'an array of shape {tree.shape}'
    return f'a {name}'


def no_state(wanted: str, given: Any) -> str:
    """The text of an error for a wrong state, with the likely mistake."""
    text = f'state must be the {wanted} of the transformation, got {kind(given)}.'
    if isinstance(given, (dict, list)):
        return (
            f'{text} A checkpoint that is restored without a target has dicts and lists'
            ' for states: give the restoring function tx.init(params) as its target'
            ' (the argument like of vsam_jax.checkpoint.restore).'
        )
    return f'{text} Give the state that tx.init(params) of the same optimizer made.'


def no_misspelling(given: Any, known: Any) -> None:
    """Raises for keyword arguments that look like misspelt known ones.

    An update accepts any keyword argument, because others in a chain may use it. So it
    would ignore a misspelt one.

    Args:
        given: names that the update does not know.
        known: names that it knows.
    """
    for name in given:
        if name == 'rho':
            raise TypeError(
                'rho must be given where the method is made, as a schedule or under'
                ' optax.inject_hyperparams(lambda rho: vsam_jax.vsam(rho))(rho=0.05);'
                ' update takes no rho.'
            )
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            raise TypeError(
                f'update has no argument {name!r}, which would be ignored: did you mean'
                f' {near[0]!r}?'
            )


def where(path: Any) -> str:
    """A path in a tree, as errors show it."""
    return jax.tree_util.keystr(path) or 'its root'


def assign(rule: Any, **values: Any) -> None:
    """Sets checked values in a frozen dataclass during its construction."""
    for name, value in values.items():
        object.__setattr__(rule, name, value)
