"""A problem whose gradients are written by hand."""

import jax
import jax.numpy as jnp
import numpy as np


class Quartic:
    """L(w) = ½ wᵀAw + Σ w⁴/4 + bᵀw on a vector, gradients written by hand."""

    def __init__(self, size=7, steps=24, seed=0):
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(size, size))
        self.matrix = root @ root.T / size
        self.linear = rng.normal(size=(steps, size))  # A mini-batch each.
        self.start = rng.normal(size=size)

    def grad(self, w, step):
        return self.matrix @ w + w**3 + self.linear[step]

    def split(self, w):
        """The vector as a tree with two tensors."""
        return {'kernel': jnp.reshape(w[:4], (2, 2)), 'bias': jnp.asarray(w[4:])}

    def run(self, method, learning_rate=0.05):
        """The parameters after each step of plain SGD on the directions."""

        @jax.jit
        def update(params, state, linear):
            def grad_fn(p):
                w = jnp.concatenate([p['kernel'].ravel(), p['bias']])
                return self.split(self.matrix @ w + w**3 + linear)

            direction, state = method.update(
                grad_fn(params), state, params, grad_fn=grad_fn
            )
            step = lambda p, d: p - learning_rate * d
            return jax.tree.map(step, params, direction), state

        params = self.split(self.start)
        state = method.init(params)
        path = []
        for linear in self.linear:
            params, state = update(params, state, linear)
            path.append(np.concatenate([params['kernel'].ravel(), params['bias']]))
        return np.array(path), state
