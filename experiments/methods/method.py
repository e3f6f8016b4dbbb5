"""What a method is, and what it may know of a run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

import vsam_jax


@dataclasses.dataclass(frozen=True)
class Task:
    """What methods may need to know of the run that they are made for.

    Attributes:
        num_steps: the length of the run.
        steps_per_epoch: full batches of an epoch.
        num_examples: examples that are trained on.
        num_classes: the number of logits.
        last_tensors: ``last_tensors(n)`` is a mask of the network's last n tensors.
    """

    num_steps: int
    steps_per_epoch: int
    num_examples: int
    num_classes: int
    last_tensors: Callable[[int], Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method, ready to be put into a train state.

    Attributes:
        tx: the whole optimizer.
        programs: the decisions (sampled or not) that a planned run compiles programs
            for; none where there is no plan (no VSAMState), as in SGD.
        make_step: builds the training step from a loss, as
            :func:`vsam_jax.linen.make_train_step` does; for methods that are more than
            a transformation of gradients.
        init_memory: makes what such a step keeps in ``state.memory``.
        always_samples: whether every step takes a second gradient, where there is
            no VSAMState that says so.
        eval_params: ``eval_params(opt_state, params)`` are the parameters to evaluate;
            None where they are those that are trained.
        parts: k, where a step takes every k-th example of a mini-batch for itself, so
            that their number must be a multiple of k.
        shared: whether learning rate and ρ are in the state of ``tx``.
    """

    tx: optax.GradientTransformationExtraArgs
    programs: tuple[bool, ...]
    make_step: Callable[[Any], Callable[..., Any]] = vsam_jax.linen.make_train_step
    init_memory: Callable[[], Any] = tuple
    always_samples: bool = False
    eval_params: Callable[[Any, Any], Any] | None = None
    parts: int = 1
    shared: bool = False
