r"""Reproductions with optax: SAM divides by a gradient norm of zero.

The loss of mini-batch t is c_t ‖w‖² / 2, w of three entries that start at 1, and all of
its gradient is zero where c_t is: a mini-batch without any valid target, say.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies.defects.finding import Finding

RHO = 0.05
RATE = 0.1
START = 1.0
# The c_t of the first and of the second gradient of three steps.
ZERO_FIRST = ((0.0, 0.0), (1.0, 1.0), (1.0, 1.0))
ZERO_SECOND = ((1.0, 0.0), (1.0, 1.0), (1.0, 1.0))

Losses = Sequence[tuple[float, float]]


def findings() -> list[Finding]:
    """What optax computes beside what SAM's formula gives."""
    plain = optax.contrib.normalize()
    guarded = optax.normalize_by_update_norm(eps=1e-12)
    after = lambda which: f'weight after three steps, in the first {which} zero'
    rows = [
        (
            'sam_opaque',
            'opaque',
            after('both gradients'),
            _opaque(plain, ZERO_FIRST),
            ZERO_FIRST,
        ),
        (
            'sam_transparent',
            'transparent',
            after('both gradients'),
            _transparent(plain, ZERO_FIRST),
            ZERO_FIRST,
        ),
        (
            'sam_transparent_second',
            'transparent',
            after('only the second gradient'),
            _transparent(plain, ZERO_SECOND),
            ZERO_SECOND,
        ),
        (
            'sam_opaque_guarded',
            'opaque, normalize_by_update_norm(eps=1e-12)',
            after('both gradients'),
            _opaque(guarded, ZERO_FIRST),
            ZERO_FIRST,
        ),
        (
            'sam_transparent_guarded',
            'transparent, normalize_by_update_norm(eps=1e-12)',
            after('both gradients'),
            _transparent(guarded, ZERO_FIRST),
            ZERO_FIRST,
        ),
    ]
    return [
        Finding(name, 'optax', f'contrib.sam, {mode}', what, measured, right(losses))
        for name, mode, what, measured, losses in rows
    ]


def right(losses: Losses) -> float:
    """An entry of w after SAM's steps, ε = ρ g / (‖g‖ + 1e-12).

    Args:
        losses: c of the first and of the second gradient, per step.

    Returns:
        The first entry; all three are equal.
    """
    w = np.full(3, START)
    for first, second in losses:
        g = first * w
        w = w - RATE * second * (w + RHO * g / (np.linalg.norm(g) + 1e-12))
    return float(w[0])


def _adversary(
    normalize: optax.GradientTransformation,
) -> optax.GradientTransformation:
    return optax.chain(normalize, optax.sgd(RHO))


def _opaque(normalize: optax.GradientTransformation, losses: Losses) -> float:
    tx = optax.contrib.sam(optax.sgd(RATE), _adversary(normalize), opaque_mode=True)
    w = jnp.full(3, START)
    state = tx.init(w)
    for first, second in losses:
        updates, state = tx.update(
            first * w, state, w, grad_fn=lambda p, _, c=second: c * p
        )
        w = jnp.asarray(optax.apply_updates(w, updates))
    return float(w[0])


def _transparent(normalize: optax.GradientTransformation, losses: Losses) -> float:
    tx = optax.contrib.sam(optax.sgd(RATE), _adversary(normalize), sync_period=2)
    w = jnp.full(3, START)
    state = tx.init(w)
    for both in losses:
        for c in both:
            updates, state = tx.update(c * w, state, w)
            w = jnp.asarray(optax.apply_updates(w, updates))
    return float(w[0])
