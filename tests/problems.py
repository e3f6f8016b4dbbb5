"""Small problems and reference code that several tests use."""

import functools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsam_jax


def random_sam(rho=0.05, *, rate=0.5, window=50, seed=0, reuse_psf=True, **kwargs):
    """SAM on a random share of the steps, put together from parts."""
    decayed = vsam_jax.reuse.DecayedDifference(decay=0.7, reuse_steps=6)
    return vsam_jax.sharpness_aware(
        vsam_jax.perturbation.l2_ascent,
        vsam_jax.sampling.AtRandom(rate=rate, window=window, seed=seed),
        decayed if reuse_psf else vsam_jax.reuse.NoReuse(),
        rho,
        **kwargs,
    )


# Every method by name, with windows that a short run goes through; rho is left open.
# The last ones have no name in the library: they are put together from parts.
METHODS = {
    'vsam': functools.partial(
        vsam_jax.vsam, window=6, segments=3, warmup_steps=3, variance_gain=1.0
    ),
    'sam': vsam_jax.sam,
    'asam': functools.partial(vsam_jax.asam, eta=0.01),
    'looksam': functools.partial(vsam_jax.looksam, every=3),
    'steady_vsam': vsam_jax.steady_vsam,
    'gsam': vsam_jax.gsam,
    'wsam': functools.partial(vsam_jax.wsam, gamma=0.6),
    'fsam': vsam_jax.fsam,
    'vasso': vsam_jax.vasso,
    'asyncsam': vsam_jax.asyncsam,
    'aesam': functools.partial(vsam_jax.aesam, steps=15),
    'random_sam': functools.partial(random_sam, window=5),
    'random_sam_without_reuse': functools.partial(
        random_sam, reuse_psf=False, window=5
    ),
    'asam_every_third_step_decayed': lambda rho, **kwargs: vsam_jax.sharpness_aware(
        vsam_jax.perturbation.elementwise_ascent(),
        vsam_jax.sampling.Periodic(3),
        vsam_jax.reuse.DecayedDifference(decay=0.7, reuse_steps=2),
        rho,
        **kwargs,
    ),
}

# One of each kind. `make check` runs these; `make test` runs the others too, where
# that takes little; `make test-slow` runs them everywhere.
KINDS = ('vsam', 'steady_vsam', 'sam', 'asam', 'looksam', 'fsam', 'aesam')
# Those with a plan; the others decide from the gradient, so that nobody can plan them.
PLANNED = {name: method for name, method in METHODS.items() if name != 'aesam'}
# Those that take a second gradient on every step.
ALWAYS = ('sam', 'asam', 'gsam', 'wsam', 'fsam', 'vasso', 'asyncsam')
# Those whose direction on a sampled step is not g + s.
OTHER_DIRECTION = ('gsam', 'wsam')
# Those whose first perturbation is not ρ g / ‖g‖.
OTHER_PERTURBATION = ('asam', 'asam_every_third_step_decayed', 'asyncsam')


def slow_but(kept: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases of a test that takes long, slow but those kept; a tuple is one case."""
    kept = tuple(kept)
    values = lambda case: case if isinstance(case, tuple) else (case,)
    slow = lambda case: pytest.param(*values(case), marks=pytest.mark.slow)
    return [case if case in kept else slow(case) for case in cases]


def others_slow(names: Iterable[str], *kept: str) -> list[Any]:
    """Methods of a test that takes long: of each kind one, the others slow."""
    return slow_but({*KINDS, *kept}, names)


GOLDEN = pathlib.Path(__file__).parent / 'library' / 'golden'


def load_golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A recorded trajectory and its settings; see tests/library/golden/README.md."""
    with np.load(GOLDEN / f'{name}.npz') as file:
        data = {key: file[key] for key in file}
    return data, json.loads(str(data.pop('meta')))


def mlp_loss(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross entropy of the two-layer tanh network of the trajectories."""
    x, y = batch
    w1, b1, w2, b2, w3, b3 = params
    hidden = jnp.tanh(jnp.tanh(x @ w1 + b1) @ w2 + b2)
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ w3 + b3, y)
    return losses.mean()


def mlp_params(seed: int = 0, dtype: Any = jnp.float32, hidden: int = 8) -> list:
    """Parameters for :func:`mlp_loss` with 6 inputs and 3 classes."""
    rng = np.random.default_rng(seed)
    shapes = [(6, hidden), (hidden,), (hidden, hidden), (hidden,), (hidden, 3), (3,)]
    return [jnp.asarray(rng.normal(size=s) * 0.5, dtype) for s in shapes]


def mlp_batches(n: int, seed: int = 1, size: int = 16, dtype: Any = jnp.float32):
    """n mini-batches for :func:`mlp_loss`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, size, 6))
    y = rng.integers(0, 3, size=(n, size))
    return [(jnp.asarray(a, dtype), jnp.asarray(b)) for a, b in zip(x, y, strict=True)]


def toy_loss(params: Any, batch: jax.Array) -> jax.Array:
    """Two tensors in a bowl that is no quadratic; compiles in a moment."""
    shifted = jax.tree.map(lambda w: w - batch, params)
    quartic = sum(jnp.sum(w**4) for w in jax.tree.leaves(params))
    return optax.tree.norm(shifted, squared=True) * (1 + 0.1 * quartic)


def toy_params(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Parameters for :func:`toy_loss`."""
    w = np.random.default_rng(0).normal(size=7)
    return {
        'bias': jnp.asarray(w[:3], dtype),
        'kernel': jnp.asarray(w[3:].reshape(2, 2), dtype),
    }


def toy_batches(n: int, dtype: Any = jnp.float32) -> list[jax.Array]:
    """n mini-batches for :func:`toy_loss`: where the bottom of the bowl is."""
    return list(jnp.asarray(np.random.default_rng(1).normal(size=n) * 0.5, dtype))


def make_step(tx: optax.GradientTransformation, loss: Any = mlp_loss):
    """``train_step((params, opt_state), batch, *, sample) -> (state, loss)``."""
    tx = optax.with_extra_args_support(tx)

    def train_step(state, batch, *, sample=None):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            grad_fn=lambda p: jax.value_and_grad(loss)(p, batch),
            sample=sample,
            value=value,
        )
        return (optax.apply_updates(params, updates), opt_state), value

    return train_step


def step_by_step_plan(budget: float, uniforms: np.ndarray) -> list[bool]:
    """vSAM's plan as the rule is stated, in the dtype of ``uniforms``."""
    window, quota, taken, plan = len(uniforms), int(np.floor(budget)), 0, []
    number = uniforms.dtype.type
    threshold = number(1) - number(budget) / number(window)
    for i, u in enumerate(uniforms):
        drawn = taken < quota and u >= threshold
        forced = window - i <= quota - taken
        plan.append(bool(drawn or forced))
        taken += plan[-1]
    return plan


# Two trees of the same structure, leaf by leaf.
assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def assert_close(
    actual: Any, expected: Any, atol: float = 1e-12, rtol: float = 0.0
) -> None:
    """Like :func:`assert_equal`, up to a tolerance."""
    compare = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(compare, actual, expected)


def assert_finite(tree: Any) -> None:
    """That all is finite, but for a sharpness that nobody has told."""
    is_state = lambda x: isinstance(x, vsam_jax.VSAMState)
    told = lambda x: x._replace(sharpness=None) if is_state(x) else x
    for leaf in jax.tree.leaves(jax.tree.map(told, tree, is_leaf=is_state)):
        assert bool(jnp.isfinite(leaf).all())
