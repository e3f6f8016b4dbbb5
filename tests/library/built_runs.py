"""Short runs of a small problem through the builders of both frameworks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.dynamic_scale import DynamicScale

import vsam_jax
from tests import problems


def mean_loss(params: Any, batch: jax.Array) -> jax.Array:
    """The mean of the toy loss over the examples of a mini-batch."""
    return jax.vmap(problems.toy_loss, (None, 0))(params, batch).mean()


def optimizer(name: str) -> optax.GradientTransformationExtraArgs:
    return optax.chain(problems.METHODS[name](0.1), optax.sgd(0.05, momentum=0.9))


def run_linen(
    name: str, batches: Sequence[Any], planned: bool, scaled: bool, **options: Any
) -> tuple[Any, Any]:
    """Parameters and optimizer state after a run in Linen."""

    def loss_fn(params, batch_stats, batch, key):
        del key
        return mean_loss(params, batch), (batch_stats, None)

    state = vsam_jax.linen.TrainState.create(
        apply_fn=None,
        params=problems.toy_params(jnp.float64),
        tx=optimizer(name),
        dynamic_scale=DynamicScale() if scaled else None,
    )
    train_step = vsam_jax.linen.make_train_step(loss_fn, **options)
    step = (vsam_jax.PlannedStep if planned else jax.jit)(train_step)
    for batch in batches:
        state, _ = step(state, batch)
    return state.params, state.opt_state


class Weights(nnx.Module):
    def __init__(self):
        for name, value in problems.toy_params(jnp.float64).items():
            setattr(self, name, nnx.Param(value))


def run_nnx(
    name: str, batches: Sequence[Any], planned: bool, scaled: bool, **options: Any
) -> tuple[Any, Any]:
    """The same in NNX."""

    def loss_fn(model, batch):
        params = {'bias': model.bias[...], 'kernel': model.kernel[...]}
        return mean_loss(params, batch), None

    model, scale = Weights(), DynamicScale() if scaled else None
    optim = vsam_jax.nnx.Optimizer(
        model, optimizer(name), wrt=nnx.Param, dynamic_scale=scale
    )
    step = nnx.jit(vsam_jax.nnx.make_train_step(loss_fn, **options))
    step = vsam_jax.PlannedStep(step) if planned else step
    for batch in batches:
        step(model, optim, batch)
    params = {'bias': model.bias[...], 'kernel': model.kernel[...]}
    return params, nnx.as_pure(optim.opt_state)


def assert_same_run(actual: Any, expected: Any, atol: float = 1e-12) -> None:
    # NNX has states of its own where optax has trees like the parameters.
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, e, atol=atol, rtol=0)
