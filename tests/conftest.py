"""Settings that all tests share."""

import gc
import os
import pathlib

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Before the first computation: tests of shardings need more than one device.
jax.config.update('jax_num_cpu_devices', 8)

# Compiling takes longer than running here: as little of it as XLA allows, a fifth of
# the time. Settings of the caller come last, so they hold.
COMPILE_LITTLE = [
    '--xla_cpu_parallel_codegen_split_count=1',
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
]
if jax.__version_info__ < (0, 12):  # From there on the flag is not known.
    COMPILE_LITTLE.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([*COMPILE_LITTLE, os.environ.get('XLA_FLAGS', '')])

# What was compiled once is read again, in later runs and in processes of tests too.
CACHE = {
    'jax_compilation_cache_dir': f'{pathlib.Path(__file__).parents[1]}/.jax_cache',
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
}
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    for name, value in CACHE.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)

# Tracing makes many small objects that live long. To look through all of them as often
# as Python does by default is a tenth of the time, and more as they become more.
gc.set_threshold(500_000, 20, 50)

hypothesis.settings.register_profile(
    'default',
    deadline=None,  # The first example of a test compiles.
    derandomize=True,  # A green run stays green; explore with --hypothesis-seed.
    max_examples=60,
)
hypothesis.settings.load_profile('default')


@pytest.hookimpl(tryfirst=True)  # Before tests are picked by their markers.
def pytest_collection_modifyitems(items):
    """Marks the tests of a method that are those of another one of its kind again."""
    from tests import problems  # After the settings above.

    more = {name for name in problems.METHODS if name not in problems.KINDS}
    for item in items:
        params = getattr(item, 'callspec', None)
        if params and more & {x for x in params.params.values() if isinstance(x, str)}:
            item.add_marker('more_methods')


@pytest.fixture
def x64():
    """Runs a test in 64-bit mode."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def no_compilation_cache():
    """Has a test compile everything anew, as one that times it must."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update('jax_compilation_cache_dir', None)
    compilation_cache.reset_cache()
    yield
    jax.config.update('jax_compilation_cache_dir', folder)
    compilation_cache.reset_cache()
