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

WINDOW = 4
STEPS = 2 * WINDOW - 1 + 2 * WINDOW

# Of the parameters of problems.mlp_params.
LAYOUTS = {
    'replicated': [P()] * 6,
    'fsdp': [P(None, 'data'), P('data'), P('data'), P('data'), P('data'), P()],
}

METHODS: dict[str, Any] = {
    'vsam': functools.partial(vsam_jax.vsam, 0.1, window=WINDOW, segments=2),
    'sam': functools.partial(vsam_jax.sam, 0.1),
    'asam': functools.partial(vsam_jax.asam, 0.5, eta=0.01),
    'looksam': functools.partial(vsam_jax.looksam, 0.1, every=3),
    'random_sam': functools.partial(problems.random_sam, 0.1, window=WINDOW),
}


def optimizer(method: str, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        METHODS[method](**settings),
        optax.add_decayed_weights(1e-3),
        optax.sgd(0.3, momentum=0.9),
    )


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
    return [
        (np.asarray(x), np.eye(3)[y])
        for x, y in problems.mlp_batches(STEPS, dtype=jnp.float64)
    ]


def driver(step: Any, planned: bool, **jit_options: Any) -> Any:
    if planned:
        return vsam_jax.PlannedStep(step, **jit_options)
    return jax.jit(step, **jit_options)


def own_step(tx: optax.GradientTransformationExtraArgs, axes: Any = None) -> Any:
    """A step for one device; over ``axes`` shard_map would sum its gradient."""

    def step(state, batch, *, sample=None):
        params, opt_state = state
        grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
        own = jax.lax.pcast(params, axes, to='varying') if axes else params
        updates, opt_state = tx.update(
            grad_fn(own), opt_state, params, grad_fn=grad_fn, sample=sample
        )
        return (optax.apply_updates(params, updates), opt_state), jnp.zeros(())

    return step


def mapped_step(
    tx: optax.GradientTransformationExtraArgs, axes: Any = 'data', **options: Any
) -> Any:
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))

    def step(state, batch, *, sample=None):
        return jax.shard_map(
            functools.partial(own_step(tx, axes), sample=sample),
            mesh=mesh,
            in_specs=(P(), P('data')),
            out_specs=P(),
            **options,
        )(state, batch)

    return step
