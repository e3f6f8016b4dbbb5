"""The loss that a network is trained with."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

PyTree = Any


def loss_of(
    model: nn.Module, label_smoothing: float, train: bool = True
) -> Callable[..., Any]:
    """The loss that a network is trained with.

    Args:
        model: the network.
        label_smoothing: what :func:`smooth_labels` takes.
        train: whether the network runs in training mode, where BatchNorm normalises
            with the statistics of the mini-batch, or with its running ones.

    Returns:
        A loss function as :func:`vsam_jax.linen.make_train_step` takes it.
    """

    # What is not used of this is not computed.
    def loss_fn(params: PyTree, batch_stats: PyTree, batch: Any, key: Any, /):
        rngs = {} if key is None else {'dropout': key}
        logits, updated = model.apply(
            {'params': params, 'batch_stats': batch_stats},
            batch['image'],
            train=train,
            rngs=rngs,
            mutable=['batch_stats'],
        )
        targets = smooth_labels(batch['label'], logits.shape[-1], label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
        loss = losses.mean()
        accuracy = jnp.mean(logits.argmax(-1) == batch['label'])
        aux = {
            'loss': loss,
            'accuracy': accuracy,
            'losses': losses,
            'logits': logits,
        }
        return loss, (updated.get('batch_stats', {}), aux)

    return loss_fn


def smooth_labels(labels: jax.Array, num_classes: int, share: float) -> jax.Array:
    """One-hot labels of which ``share`` is spread evenly over the other classes."""
    one_hot = jax.nn.one_hot(labels, num_classes)
    return one_hot * (1 - share) + (1 - one_hot) * (share / (num_classes - 1))
