"""Shardings of a train state: memories are sharded like their parameters."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vsam_jax._state import VSAMState
from vsam_jax._types import PyTree

__all__ = ['state_shardings']


def state_shardings(state: PyTree, params: PyTree) -> PyTree:
    """Returns the shardings of a train state or optimizer state on a mesh.

    Memories of the size of a parameter (the PSF, momenta, averages) are sharded like
    that parameter. Everything else (counters, plan, budget, statistics) is replicated.
    On a mesh with Auto axes, pass the result to a jitted ``init`` or step as
    ``out_shardings``. Otherwise XLA decides, and may replicate the memories. On a mesh
    with Explicit axes you do not need this function: the types of arrays carry their
    shardings.

    A leaf of ``state`` belongs to a parameter if it has the parameter's shape and its
    path ends with the parameter's path. If several parameters match, the longest path
    counts.

    Args:
        state: any tree that contains the state: ``(params, opt_state)``, a
            :class:`vsam_jax.linen.TrainState`, an optimizer state. Only the shapes of
            its leaves matter, so you can pass ``jax.eval_shape(tx.init, params)``.
        params: the parameters, as arrays or ``jax.ShapeDtypeStruct`` objects. Each must
            have a ``NamedSharding``, all on one mesh.

    Returns:
        A tree like ``state`` of ``NamedSharding``.

    Raises:
        ValueError: if ``params`` are not all on one mesh.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,))
        >>> params = {'w': jnp.ones((8, 2)), 'b': jnp.ones(2)}
        >>> params = jax.device_put(
        ...     params, {'w': NamedSharding(mesh, P('data')),
        ...              'b': NamedSharding(mesh, P())})
        >>> tx = optax.chain(vsam_jax.vsam(), optax.adamw(1e-3))
        >>> shardings = vsam_jax.sharding.state_shardings(
        ...     jax.eval_shape(tx.init, params), params)
        >>> opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
        >>> tuple(opt_state[0].psf['w'].sharding.spec)
        ('data',)
        >>> tuple(opt_state[0].plan.sharding.spec)
        ()
    """
    wanted = {
        path: (leaf.shape, _named_sharding(path, leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    meshes = {sharding.mesh for _, sharding in wanted.values()}
    if len(meshes) != 1:
        raise ValueError(
            'params must hold arrays on one mesh, so that the rest of the state can be'
            f' replicated over it, got {len(meshes)} meshes.'
        )
    replicated = NamedSharding(meshes.pop(), PartitionSpec())

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path) + 1):
            shape, sharding = wanted.get(path[start:], (None, replicated))
            if shape == getattr(leaf, 'shape', ()):
                return sharding
        return replicated

    def node(path: tuple[Any, ...], part: Any) -> Any:
        if not isinstance(part, VSAMState):
            return sharding_of(path, part)
        # By name: if the parameters are one bare array, every leaf's path ends with
        # their empty path, and the plan may happen to have their shape.
        large = {name: getattr(part, name) for name in ('psf', 'perturbation_memory')}
        rest = part._replace(**dict.fromkeys(large))
        return jax.tree.map(lambda _: replicated, rest)._replace(
            **jax.tree_util.tree_map_with_path(sharding_of, large)
        )

    return jax.tree_util.tree_map_with_path(
        node, state, is_leaf=lambda part: isinstance(part, VSAMState)
    )


def _named_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    sharding = getattr(leaf, 'sharding', None)
    if not isinstance(sharding, NamedSharding):
        raise ValueError(
            'params must hold arrays with a NamedSharding each; at'
            f' {jax.tree_util.keystr(path) or "its root"} the sharding is'
            f' {sharding!r}. Place them first: jax.device_put(params, shardings).'
        )
    return sharding
