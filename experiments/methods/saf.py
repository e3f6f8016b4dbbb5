"""SAF: no second gradient; the loss keeps outputs near those of some epochs ago.

Du et al., *Sharpness-Aware Training for Free*, arXiv 2205.14083.

What it costs under XLA: a step takes one gradient, reads a row per example of the
stored logits and writes one, in the operations of an SGD step. What is paid with is
memory: E · N · (4 C + 4) bytes on the device for N examples and C classes (61 MB for
CIFAR-100 with E = 3; 15 GB for ImageNet), in every checkpoint too. On the CPU the
compiled step copies all of that although its buffer is donated, which is lost in the
time of a network's gradient for 61 MB and would not be for gigabytes. On several
devices each holds all of it, and they send each other the logits of a mini-batch.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vsam_jax import linen

PyTree = Any


class Trajectory(NamedTuple):
    """The logits of the last E epochs; epoch e is written into row e % E.

    Attributes:
        logits: float32 [E, N, C].
        epoch: int32 [E, N], in which epoch each was written; -1 where none was.
    """

    logits: jax.Array
    epoch: jax.Array


@dataclasses.dataclass(frozen=True)
class SAF:
    """The method's trajectory loss, for one task.

    Attributes:
        num_examples: N, how many examples are trained on.
        num_classes: C, the number of logits.
        steps_per_epoch: how many mini-batches an epoch has.
        weight: λ, the weight of the trajectory loss.
        temperature: τ, what logits are divided by in it.
        lag: E, how many epochs old the logits are that it compares with.
        start: the first epoch, counted from 0, in which it takes part.
    """

    num_examples: int
    num_classes: int
    steps_per_epoch: int
    weight: float = 0.3
    temperature: float = 5.0
    lag: int = 3
    start: int = 5

    def __post_init__(self):
        if not 0 <= self.weight < math.inf:
            raise ValueError(
                f'weight must be a finite number >= 0, got {self.weight!r}.'
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f'temperature must be a finite number > 0, got {self.temperature!r}.'
            )
        for name, low in (('lag', 1), ('start', 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f'{name} must be an integer >= {low}, got {value!r}.')

    def init_memory(self) -> Trajectory:
        """No logits yet."""
        shape = (self.lag, self.num_examples)
        return Trajectory(
            logits=jnp.zeros((*shape, self.num_classes), jnp.float32),
            epoch=jnp.full(shape, -1, jnp.int32),
        )

    def make_step(self, loss_fn: linen.LossFn) -> Callable[..., Any]:
        """Builds the training step, as :func:`vsam_jax.linen.make_train_step` does.

        Args:
            loss_fn: ``loss_fn(params, batch_stats, batch, key) -> (loss,
                (batch_stats, aux))``, where ``aux['logits']`` are the logits of the
                mini-batch. ``batch['index']`` says which examples it holds.

        Returns:
            ``train_step(state, batch) -> (state, aux)`` for a state with a field
            ``memory``, at first :meth:`init_memory`. ``aux`` is that of ``loss_fn``,
            without the trajectory loss.
        """

        def whole_loss(params: PyTree, batch_stats: PyTree, batch: Any, key: Any, /):
            batch, old, takes_part = batch
            loss, (batch_stats, aux) = loss_fn(params, batch_stats, batch, key)
            terms = divergence(old, aux['logits'], self.temperature)
            # Of all examples: one that is left out counts as zero.
            loss += self.weight * jnp.mean(jnp.where(takes_part, terms, 0))
            return loss, (batch_stats, aux)

        train_step = linen.make_train_step(whole_loss)

        def step(state: Any, batch: Any) -> tuple[Any, Any]:
            memory, index = state.memory, batch['index']
            epoch = state.step // self.steps_per_epoch
            row = epoch % self.lag
            # What is not of that epoch is of an earlier one, in which the example
            # was among those that fill no batch.
            right = memory.epoch[row, index] == epoch - self.lag
            takes_part = right & (epoch >= self.start)
            old = memory.logits[row, index]
            new, aux = train_step(state, (batch, old, takes_part))
            logits = aux['logits'].astype(memory.logits.dtype)
            memory = Trajectory(
                logits=memory.logits.at[row, index].set(logits),
                epoch=memory.epoch.at[row, index].set(epoch),
            )
            return new.replace(memory=memory), aux

        return step


def divergence(old: jax.Array, new: jax.Array, temperature: float) -> jax.Array:
    """τ² KL(softmax(old / τ) ‖ softmax(new / τ)) of each example, [B]."""
    log_old = jax.nn.log_softmax(old / temperature)
    log_new = jax.nn.log_softmax(new / temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_old) * (log_old - log_new), axis=-1)
