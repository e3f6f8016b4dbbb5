"""A short run over eight devices: its methods, layouts, data and steps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import vsam_jax
from tests import problems

# Warm-up and two windows of vSAM, two plans of the others at least but for one.
STEPS = 15

# Of the parameters of problems.mlp_params.
LAYOUTS = {
    'replicated': [P()] * 6,
    'fsdp': [P(None, 'data'), P('data'), P('data'), P('data'), P('data'), P()],
}

METHODS = problems.METHODS


def optimizer(method: str, **settings: Any) -> optax.GradientTransformationExtraArgs:
    """A method of ``METHODS`` and what comes after it, or SGD alone."""
    base = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.3, momentum=0.9))
    if method == 'sgd':
        return optax.with_extra_args_support(base)
    return optax.chain(METHODS[method](radius(method), **settings), base)


def radius(method: str) -> float:
    return 0.5 if method.startswith('asam') else 0.1


def loss_fn(params: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean squared error; what explicit shardings cannot guess is said."""
    x, y = batch
    if AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types:
        params = [jax.sharding.reshard(p, P()) for p in params]
    w1, b1, w2, b2, w3, b3 = params
    hidden = jnp.tanh(jnp.tanh(x @ w1 + b1) @ w2 + b2)
    return jnp.mean((hidden @ w3 + b3 - y) ** 2)


@functools.cache
def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    with jax.enable_x64(True):
        return [
            (np.asarray(x), np.eye(3)[y])
            for x, y in problems.mlp_batches(STEPS, dtype=jnp.float64)
        ]


def driver(step: Any, planned: bool, **jit_options: Any) -> Any:
    if planned:
        return vsam_jax.PlannedStep(step, **jit_options)
    return jax.jit(step, **jit_options)


def own_step(
    tx: optax.GradientTransformationExtraArgs, axes: Any = None, **told: Any
) -> Any:
    """A step for one device; over ``axes`` shard_map would sum its gradient.

    ``told`` are arguments of ``update``: ``axis_name`` and ``per_device``.
    """

    def step(state, batch, *, sample=None):
        params, opt_state = state
        grad_fn = lambda p: jax.value_and_grad(loss_fn)(p, batch)
        own = jax.lax.pcast(params, axes, to='varying') if axes else params
        value, grads = grad_fn(own)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            value=value,
            grad_fn=grad_fn,
            sample=sample,
            **told,
        )
        return (optax.apply_updates(params, updates), opt_state), jnp.zeros(())

    return step


def mapped_step(
    tx: optax.GradientTransformationExtraArgs,
    axes: Any = 'data',
    *,
    check_vma: bool = True,
    **told: Any,
) -> Any:
    """A step over eight devices, each with a share of the mini-batch."""
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))

    def step(state, batch, *, sample=None):
        return jax.shard_map(
            functools.partial(own_step(tx, axes, **told), sample=sample),
            mesh=mesh,
            in_specs=(P(), P('data')),
            out_specs=P(),
            check_vma=check_vma,
        )(state, batch)

    return step
