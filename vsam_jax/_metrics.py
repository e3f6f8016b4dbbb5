"""What a training loop logs of a sharpness-aware optimizer."""

from typing import Any

import jax
import jax.numpy as jnp

from vsam_jax._state import VSAMState, check_alive, only_state


def metrics(state: Any) -> dict[str, jax.Array]:
    """Reads from any optimizer state how the sharpness-aware part of it does.

    Call it inside a training step, to return the result with the other metrics, or
    outside, whenever something is logged. The result holds arrays of its own: they
    stay readable when ``state`` is donated to the next step, and nothing waits for
    the device before a value is asked for.

    Args:
        state: anything with exactly one :class:`vsam_jax.VSAMState` in it: the state
            of a chain, of a wrapper, a train state, an ``nnx.Optimizer``.

    Returns:
        A dictionary of scalars, or of stacked ones where the state is stacked. Its
        keys are:

        - ``sampling_rate``: the share of updates so far that took a second gradient.
        - ``budget``: b, how many steps of the current window are sampled (⌊b⌋; after
          warm-up, in which all are); 0 where there is no plan (``aesam``).
        - ``sampled``: whether the latest update took a second gradient.
        - ``grad_norm``, ``psf_norm``: ‖g‖ and ‖s‖ of the latest usable sample.
        - ``sharpness``: L(w + ε) − L(w) of that sample; NaN until it is known, which
          takes a builder, or ``value`` in ``update`` (:func:`vsam_jax.vsam`).
        - ``psf_age``: how many updates ago that was; before there was one, more than
          the updates made, in methods whose reuse ends.
        - ``num_samples``: how many updates took a second gradient.
        - ``num_rejected``: how many of those were not finite, and were skipped.

    Raises:
        ValueError: if ``state`` holds no ``VSAMState`` or several.
        RuntimeError: if ``state`` was donated to a step.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsam_jax
        >>> tx = optax.chain(vsam_jax.looksam(every=2), optax.sgd(0.1))
        >>> w, loss = jnp.ones(4), lambda w: jnp.sum(w**2)
        >>> opt_state = tx.init(w)
        >>> for _ in range(8):
        ...   updates, opt_state = tx.update(
        ...       jax.grad(loss)(w), opt_state, w, grad_fn=jax.grad(loss))
        >>> log = vsam_jax.metrics(opt_state)
        >>> print(f"{log['sampling_rate']:.2f} {log['grad_norm']:.1f}")
        0.50 4.0
    """
    small = only_state(state)._replace(
        psf=None, rings=None, perturbation_memory=None, sampling_memory=None
    )
    check_alive(jax.tree.leaves(small.step)[0])
    # The fields are arrays, or variables of NNX with an array each.
    fields = small._asdict().items()
    arrays: dict[str, Any] = {
        name: x if x is None else jax.tree.leaves(x)[0] for name, x in fields
    }
    return _read(VSAMState(**arrays))


@jax.jit
def _read(state: VSAMState) -> dict[str, jax.Array]:
    # What comes out of jit is no buffer of the state, gone with its donation.
    return {
        'sampling_rate': state.num_samples.astype(state.budget.dtype)
        / jnp.maximum(state.step, 1),
        'budget': state.budget,
        'sampled': state.sampled,
        'grad_norm': state.grad_norm,
        'psf_norm': state.psf_norm,
        'sharpness': state.sharpness,
        'psf_age': state.age,
        'num_samples': state.num_samples,
        'num_rejected': state.num_rejected,
    }
