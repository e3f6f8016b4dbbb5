"""Metrics of a sharpness-aware optimizer for a training loop to log."""

from typing import Any

import jax
import jax.numpy as jnp

from vsam_jax._state import VSAMState, check_alive, only_state


def metrics(state: Any) -> dict[str, jax.Array]:
    """Reads the metrics of a method from any optimizer state, for logging.

    Call it inside a training step, to return the result with the other metrics, or
    outside, whenever you log. The result consists of new arrays. They stay readable
    when ``state`` is donated to the next step. The call does not wait for the device;
    only reading a value does.

    Args:
        state: anything that contains exactly one :class:`vsam_jax.VSAMState`: the state
            of a chain or of a wrapper, a train state, an ``nnx.Optimizer``.

    Returns:
        A dictionary of scalars, or of stacked scalars if the state is stacked. Its
        keys are:

        - ``sampling_rate``: the share of updates so far that took a second gradient.
        - ``budget``: b. After warm-up, in which all steps are sampled, ⌊b⌋ steps of the
          current window are sampled. 0 if there is no plan (``aesam``).
        - ``sampled``: whether the latest update took a second gradient.
        - ``grad_norm``, ``psf_norm``: ‖g‖ and ‖s‖ of the latest usable sample.
        - ``sharpness``: L(w + ε) − L(w) of that sample. NaN until it is known: use a
          builder, or pass ``value`` to ``update`` (:func:`vsam_jax.vsam`).
        - ``psf_age``: how many updates ago that sample was taken. Before the first
          sample it exceeds the number of updates, in methods that stop reusing old
          PSFs.
        - ``num_samples``: how many updates took a second gradient.
        - ``num_rejected``: how many of those were not finite, and were skipped.

    Raises:
        ValueError: if ``state`` contains no ``VSAMState`` or several.
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
    # Each field is an array, or an NNX variable that holds one.
    fields = small._asdict().items()
    arrays: dict[str, Any] = {
        name: x if x is None else jax.tree.leaves(x)[0] for name, x in fields
    }
    return _read(VSAMState(**arrays))


@jax.jit
def _read(state: VSAMState) -> dict[str, jax.Array]:
    # jit returns new buffers, which a donation of the state does not delete.
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
