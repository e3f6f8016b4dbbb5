"""Settings that all tests share."""

import hypothesis
import jax
import pytest

# Before the first computation: tests of shardings need more than one device.
jax.config.update('jax_num_cpu_devices', 8)

hypothesis.settings.register_profile(
    'default',
    deadline=None,  # The first example of a test compiles.
    derandomize=True,  # A green run stays green; explore with --hypothesis-seed.
    max_examples=60,
)
hypothesis.settings.load_profile('default')


@pytest.fixture
def x64():
    """Runs a test in 64-bit mode."""
    with jax.enable_x64(True):
        yield
