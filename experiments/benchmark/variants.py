"""The ways in JAX to make a step: vSAM's, and those of its peers."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import vsam_jax
from vsam_jax import perturbation

RHO = 0.05
LEARNING_RATE = {'SGD': 0.01, 'AdamW': 1e-4}
MOMENTUM = 0.9
WEIGHT_DECAY = {'SGD': 5e-4, 'AdamW': 1e-2}

# What decides a step: nothing (no second gradient to decide about), the program
# (planned), or an argument of the program (traced).
Decision = Literal['none', 'sampled', 'reuse', 'traced sampled', 'traced reuse']
# The program that does what a traced step does once it is decided.
PLANNED_TWIN: dict[Decision, Decision] = {
    'traced sampled': 'sampled',
    'traced reuse': 'reuse',
}


def base(name: str) -> optax.GradientTransformation:
    """The optimizer without a second gradient: ``'SGD'`` or ``'AdamW'``."""
    rate, decay = LEARNING_RATE[name], WEIGHT_DECAY[name]
    if name == 'AdamW':
        return optax.adamw(rate, weight_decay=decay)
    return optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(rate, momentum=MOMENTUM)
    )


def optax_sam(name: str, opaque: bool) -> optax.GradientTransformationExtraArgs:
    """The peer: ``optax.contrib.sam`` around the same base optimizer.

    Args:
        name: of the base optimizer.
        opaque: whether one update takes both gradients. If not, every other update
            moves the parameters up or down the hill, and two are one step.

    Returns:
        A transformation that takes what a train step passes to ``update``.
    """
    sam = optax.contrib.sam(
        base(name),
        optax.chain(optax.contrib.normalize(), optax.sgd(RHO)),
        opaque_mode=opaque,
    )

    def update(
        grads: Any, state: Any, params: Any, *, grad_fn: Any, **_: Any
    ) -> tuple[Any, Any]:
        second: Any = lambda p, i: grad_fn(p)
        return sam.update(grads, state, params, grad_fn=second)

    return optax.GradientTransformationExtraArgs(sam.init, update)  # pyright: ignore[reportArgumentType]


class Stored(NamedTuple):
    """State of :func:`storing_sam`."""

    psf: Any


def storing_sam(name: str) -> optax.GradientTransformation:
    """SAM that stores the PSF, unless it is not finite: the least a sample can do.

    What vSAM's sampled step costs beyond it is vSAM's; what it costs beyond SAM's is
    the price of having a PSF to reuse.
    """

    def init(params: Any) -> Stored:
        return Stored(jax.tree.map(jnp.zeros_like, params))

    def update(
        grads: Any, older: Stored, params: Any, *, grad_fn: Any, **_: Any
    ) -> tuple[Any, Stored]:
        radius = jnp.asarray(RHO)
        perturbed = perturbation.perturb(perturbation.l2_ascent, grads, params, radius)
        sam_grads = grad_fn(perturbed)
        psf = optax.tree.sub(sam_grads, grads)
        finite = jnp.isfinite(optax.tree.norm(psf))
        keep = functools.partial(jnp.where, finite)
        return sam_grads, Stored(jax.tree.map(keep, psf, older.psf))

    storing = optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
    return optax.chain(storing, base(name))


def is_peer(opt_state: Any) -> bool:
    """Whether it is the state of a peer that takes a second gradient."""
    names = ('SAMState', 'Stored')
    return any(optax.tree.get(opt_state, name) is not None for name in names)


def vsam(name: str, **settings: Any) -> optax.GradientTransformation:
    """vSAM before the same base optimizer."""
    return optax.chain(vsam_jax.vsam(RHO, **settings), base(name))


def lean(name: str, share: float) -> optax.GradientTransformation:
    """Second gradients of a share of the mini-batch, before the same base optimizer."""
    return optax.chain(vsam_jax.lean_sam(RHO, share=share), base(name))


# By name, called with that of the base optimizer.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    'base': base,
    'optax opaque': lambda name: optax_sam(name, opaque=True),
    'optax transparent': lambda name: optax_sam(name, opaque=False),
    'storing': storing_sam,
    'vsam': vsam,
    'sam': lambda name: optax.chain(vsam_jax.sam(RHO), base(name)),
    'lean': lean,
}


class Variant(NamedTuple):
    """One way to make a step.

    Attributes:
        optimizer: which of :data:`OPTIMIZERS`.
        calls: the decisions of the calls that are timed together.
        steps: how many optimizer steps these calls are.
        by_hand: whether the step is made without a builder of this project.
        share: of the mini-batch that second gradients are taken of.
    """

    optimizer: str
    calls: tuple[Decision, ...]
    steps: int = 1
    by_hand: bool = False
    share: float = 1


# One step in five is sampled, as LookSAM does it.
_ONE_IN_FIVE: tuple[Decision, ...] = ('sampled', 'reuse', 'reuse', 'reuse', 'reuse')
PERIOD = len(_ONE_IN_FIVE)

BASE = 'base'
BY_HAND = 'base optimizer, step written by hand'
OPTAX_SAM = 'optax.contrib.sam'
STORING = 'SAM that stores the PSF'
SAMPLED = 'vSAM planned, sampled step'
REUSE = 'vSAM planned, reuse step'
TRACED_SAMPLED = 'vSAM traced, sampled step'
TRACED_REUSE = 'vSAM traced, reuse step'

# By the title of a row; that of BASE is the name of the optimizer.
VARIANTS: dict[str, Variant] = {
    BASE: Variant('base', ('none',)),
    BY_HAND: Variant('base', ('none',), by_hand=True),
    OPTAX_SAM: Variant('optax opaque', ('none',)),
    'optax.contrib.sam, transparent': Variant('optax transparent', ('none', 'none')),
    STORING: Variant('storing', ('none',)),
    SAMPLED: Variant('vsam', ('sampled',)),
    REUSE: Variant('vsam', ('reuse',)),
    f'vSAM planned, one step in {PERIOD} sampled': Variant(
        'vsam', _ONE_IN_FIVE, steps=PERIOD
    ),
    TRACED_SAMPLED: Variant('vsam', ('traced sampled',)),
    TRACED_REUSE: Variant('vsam', ('traced reuse',)),
}

SAM = 'SAM planned'
LEAN_REUSE = 'lean SAM planned, reuse step'
SHARES = (1 / 2, 1 / 4, 1 / 8)
# Titles of the steps with a slice, the largest slice first.
SLICES = {
    share: f'lean SAM planned, 1/{1 / share:.0f}, sampled step' for share in SHARES
}
# As they are used: one step in three is sampled.
LEAN = {
    share: f'lean SAM planned, 1/{1 / share:.0f}, every 3rd step'
    for share in SHARES[1:]
}
# Those that take part where slices are looked at.
OF_SLICES: dict[str, Variant] = {
    SAM: Variant('sam', ('sampled',)),
    **{
        title: Variant('lean', ('sampled',), share=share)
        for share, title in SLICES.items()
    },
    # Whatever the share.
    LEAN_REUSE: Variant('lean', ('reuse',), share=SHARES[-1]),
    **{
        title: Variant('lean', ('sampled', 'reuse', 'reuse'), steps=3, share=share)
        for share, title in LEAN.items()
    },
}
ALL = {**VARIANTS, **OF_SLICES}

# Those that make a step in one call.
FEW = tuple(name for name, variant in VARIANTS.items() if len(variant.calls) == 1)


def sample_of(decision: Decision) -> tuple[bool | None, tuple[Any, ...]]:
    """``sample`` of a train step, and arguments of its program besides the batch."""
    if decision == 'none':
        return None, ()
    if decision in PLANNED_TWIN:
        return None, (jnp.array(decision == 'traced sampled'),)
    return decision == 'sampled', ()
