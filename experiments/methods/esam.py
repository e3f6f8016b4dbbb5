"""ESAM: a second gradient of some tensors' perturbation and some of the examples.

Du et al., *Efficient Sharpness-aware Minimization for Improved Training of Neural
Networks*, arXiv 2110.03141.

What a step costs under XLA, in gradients of the whole mini-batch: one, plus γ for the
second one, plus a forward pass (about a third) that finds the examples for it: with
γ = 0.5 that is 1.84 times the operations of SGD, where SAM takes 2. The number of
examples, ⌈γ B⌉, is static, so the second gradient really is that much smaller. The
choice of tensors saves nothing: it is drawn anew in each step, and a compiled program
takes the gradient of all of them. On several devices the examples are chosen from the
whole mini-batch: their losses and the chosen images, 4 bytes per number, go from each
device to all others before the second gradient, which each takes its share of.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vsam_jax import convolutions, linen, perturbation

PyTree = Any


@dataclasses.dataclass(frozen=True)
class ESAM:
    """Both ideas of the method.

    Attributes:
        rho: ρ, the radius of the perturbation.
        beta: the probability with which a tensor is perturbed, in (0, 1].
        gamma: the share of the mini-batch that the second gradient is taken of, in
            (0, 1].
        seed: chooses which tensors are perturbed in which step.
    """

    rho: float
    beta: float = 0.6
    gamma: float = 0.5
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.rho < math.inf:
            raise ValueError(f'rho must be a finite number >= 0, got {self.rho!r}.')
        for name in ('beta', 'gamma'):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f'{name} must be a share in (0, 1], got {getattr(self, name)!r}.'
                )

    def make_step(self, loss_fn: linen.LossFn) -> Callable[..., Any]:
        """Builds the training step, as :func:`vsam_jax.linen.make_train_step` does.

        Args:
            loss_fn: ``loss_fn(params, batch_stats, batch, key) -> (loss,
                (batch_stats, aux))``, where ``aux['losses']`` are the losses of the
                examples. ``batch`` is a tree of arrays with a leading axis of them.

        Returns:
            ``train_step(state, batch) -> (state, aux)``. All passes run BatchNorm in
            training mode, the last one with the statistics of the chosen examples;
            the running statistics and ``aux`` are those of the first pass.
        """
        gradient = convolutions.canonical(jax.grad(loss_fn, has_aux=True))

        def train_step(
            state: linen.TrainState, batch: PyTree
        ) -> tuple[linen.TrainState, Any]:
            key = state.dropout_key
            if key is not None:
                key = jax.random.fold_in(key, state.step)
            grads, (batch_stats, aux) = gradient(
                state.params, state.batch_stats, batch, key
            )
            tensor_key = jax.random.fold_in(jax.random.key(self.seed), state.step)
            perturbed = perturb_some(
                state.params,
                grads,
                draw_tensors(tensor_key, state.params, self.beta),
                self.rho / self.beta,
            )
            _, (_, new_aux) = loss_fn(perturbed, state.batch_stats, batch, key)
            rows = steepest(new_aux['losses'] - aux['losses'], self.gamma)
            chosen = jax.tree.map(lambda x: x[rows], batch)
            direction, _ = gradient(perturbed, state.batch_stats, chosen, key)
            new = state.apply_gradients(grads=direction, batch_stats=batch_stats)
            return new, aux

        return train_step


def draw_tensors(key: jax.Array, params: PyTree, beta: float) -> PyTree:
    """For each tensor whether it is perturbed: a tree of traced booleans."""
    leaves, structure = jax.tree.flatten(params)
    drawn = jax.random.bernoulli(key, beta, (len(leaves),))
    return jax.tree.unflatten(structure, list(drawn))


def perturb_some(
    params: PyTree, grads: PyTree, selected: PyTree, radius: float
) -> PyTree:
    """The selected tensors moved by radius · g / ‖g‖₂, the norm over them alone."""
    # At the place of a zero gradient nothing moves.
    kept = jax.tree.map(lambda g, flag: jnp.where(flag, g, 0), grads, selected)
    return perturbation.perturb(
        perturbation.l2_ascent, kept, params, jnp.asarray(radius)
    )


def steepest(rise: jax.Array, gamma: float) -> jax.Array:
    """The places of the ⌈γ B⌉ largest numbers; how many is known before tracing."""
    # Without what floating point adds: 0.07 · 100 is a little more than 7.
    count = math.ceil(round(gamma * rise.shape[0], 6))
    return jax.lax.top_k(rise, count)[1]
