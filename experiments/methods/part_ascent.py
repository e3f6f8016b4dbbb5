"""SAM whose ascent is that of a part of the mini-batch."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vsam_jax import convolutions, linen, perturbation

PyTree = Any


@dataclasses.dataclass(frozen=True)
class PartAscent:
    r"""The gradient of the mini-batch where that of a part of it leads.

    .. math:: \text{direction} = ∇L(w + ρ \, g_p / ‖g_p‖_2), \quad g_p = ∇L_p(w)

    with L_p the loss of every k-th example. A step takes gradients of 1 + 1/k
    mini-batches.

    Attributes:
        rho: ρ, the radius of the perturbation, a finite number >= 0.
        share: 1/k. k must divide the number of examples of a mini-batch.
    """

    rho: float
    share: float = 1 / 4

    def __post_init__(self):
        if not 0 <= self.rho < math.inf:
            raise ValueError(f'rho must be a finite number >= 0, got {self.rho!r}.')
        if not (0 < self.share <= 1 and (1 / self.share).is_integer()):
            raise ValueError(
                f'share must be 1, 1/2, 1/3 and so on, got {self.share!r}.'
            )

    def make_step(self, loss_fn: linen.LossFn) -> Callable[..., Any]:
        """Builds the training step, as :func:`vsam_jax.linen.make_train_step` does.

        Args:
            loss_fn: as it takes it.

        Returns:
            ``train_step(state, batch) -> (state, aux)``. The running statistics of
            BatchNorm and ``aux`` are those of the whole mini-batch, at the perturbed
            parameters: no other pass goes through it.
        """
        gradient = convolutions.canonical(jax.grad(loss_fn, has_aux=True))
        every = round(1 / self.share)

        def train_step(
            state: linen.TrainState, batch: PyTree
        ) -> tuple[linen.TrainState, Any]:
            key = state.dropout_key
            if key is not None:
                key = jax.random.fold_in(key, state.step)
            part = jax.tree.map(lambda x: _every(x, every), batch)
            ascent, _ = gradient(state.params, state.batch_stats, part, key)
            # A state may hold ρ, so that runs with several have one program.
            rho = optax.tree.get(state.opt_state, 'rho', self.rho)
            there = perturbation.perturb(
                perturbation.l2_ascent, ascent, state.params, jnp.asarray(rho)
            )
            grads, (batch_stats, aux) = gradient(there, state.batch_stats, batch, key)
            return state.apply_gradients(grads=grads, batch_stats=batch_stats), aux

        return train_step


def _every(x: jax.Array, every: int) -> jax.Array:
    if len(x) % every:
        raise ValueError(
            f'share must divide the mini-batch, got 1/{every} of {len(x)} examples.'
        )
    return x[::every]
