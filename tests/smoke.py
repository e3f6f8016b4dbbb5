"""Trains with the installed package: what must work right after ``pip install``.

Run by ``make wheel`` and ``make release``; by the latter with the Python of an
environment that has nothing else.
"""

import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp
import optax

import vsam_jax


def main() -> None:
    """Fits a line, then imports what is imported late."""
    x = jnp.linspace(-1.0, 1.0, 32)
    loss = lambda w: jnp.mean((w[0] * x + w[1] - 3.0 * x - 1.0) ** 2)
    tx = optax.chain(vsam_jax.steady_vsam(rho=0.05), optax.sgd(0.2, momentum=0.5))

    @jax.jit
    def step(w: jax.Array, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        updates, state = tx.update(jax.grad(loss)(w), state, w, grad_fn=jax.grad(loss))
        return jnp.asarray(optax.apply_updates(w, updates)), state

    w = jnp.zeros(2)
    state = tx.init(w)
    for _ in range(60):
        w, state = step(w, state)
    assert loss(w) < 0.01, w
    assert vsam_jax.metrics(state)['num_samples'] == 20
    for name in vsam_jax.__all__:
        getattr(vsam_jax, name)
    # Not a checkout that happens to be on the path.
    installed = importlib.metadata.distribution('vsam-jax').locate_file('vsam_jax')
    assert pathlib.Path(vsam_jax.__file__).parent == pathlib.Path(str(installed))
    print(f'vsam_jax {vsam_jax.__version__} works: {vsam_jax.__file__}')


if __name__ == '__main__':
    main()
