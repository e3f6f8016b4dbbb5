"""How fast the device multiplies matrices, to relate the speed of a network to."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def matrix_product(dtype: Any, size: int, repetitions: int = 7) -> float:
    """Operations a second of a product of two square matrices, the median.

    Args:
        dtype: of the matrices.
        size: their height and width.
        repetitions: how often it is timed.

    Returns:
        2 · size³ / seconds.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(size, size)) / size**0.5, dtype)
    # Several in a row, so that starting one takes no time to speak of.
    chain = 8 if jax.default_backend() != 'cpu' else 1

    def products(x: jax.Array) -> jax.Array:
        y = x
        for _ in range(chain):
            y = y @ x
        return y

    program = jax.jit(products)
    jax.block_until_ready(program(x))
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(program(x))
        seconds.append(time.perf_counter() - start)
    return chain * 2 * size**3 / statistics.median(seconds)


def measure() -> dict[str, float]:
    """The peak by dtype: float32, and bfloat16 on an accelerator.

    In JAX's default precision; on NVIDIA's GPUs float32 is then multiplied as TF32.
    """
    if jax.default_backend() == 'cpu':
        return {'float32': matrix_product(jnp.float32, 2048)}
    return {
        name: matrix_product(name, 8192, repetitions=15)
        for name in ('float32', 'bfloat16')
    }
