"""What compiled steps are made of: memory, copies, time to compile, page faults."""

import contextlib
import math
import re
import resource
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.compilation_cache import compilation_cache

from experiments.benchmark import jax_steps, variants
from experiments.benchmark.problems import Problem

# By title: the optimizer, the decision and vSAM's settings.
PROGRAMS: dict[str, tuple[str, variants.Decision, dict[str, Any]]] = {
    'base': ('base', 'none', {}),
    'optax.contrib.sam': ('optax opaque', 'none', {}),
    'sampled': ('vsam', 'sampled', {}),
    'reuse': ('vsam', 'reuse', {}),
    'traced': ('vsam', 'traced reuse', {}),
    'sampled, PSF in bfloat16': ('vsam', 'sampled', {'psf_dtype': jnp.bfloat16}),
    'reuse, PSF in bfloat16': ('vsam', 'reuse', {'psf_dtype': jnp.bfloat16}),
}
PLANNED = ('sampled', 'reuse')
TRACED = ('traced',)


def compiled(problem: Problem, title: str) -> jax_steps.Program:
    """One of :data:`PROGRAMS`, compiled anew from the shapes of its arguments."""
    optimizer, decision, settings = PROGRAMS[title]
    tx = variants.OPTIMIZERS[optimizer](problem.base, **settings)
    state = jax_steps.abstract_state(problem, tx)
    return jax_steps.Program(problem, state, problem.batch(), decision)


def memory(executable: Any) -> dict[str, int]:
    """Bytes that a program needs on one device, as its compiler counts them.

    Args:
        executable: a compiled program.

    Returns:
        ``arguments`` (state and batch), ``temporaries``, ``outputs`` besides those
        that take the place of donated arguments, and their sum, ``peak``.
    """
    counted = executable.memory_analysis()
    parts = {
        'arguments': counted.argument_size_in_bytes,
        'temporaries': counted.temp_size_in_bytes,
        'outputs': counted.output_size_in_bytes - counted.alias_size_in_bytes,
    }
    return {**parts, 'peak': sum(parts.values())}


def copies(text: str, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """Copies of whole tensors in a compiled program.

    Args:
        text: of the program.
        shapes: of the tensors that are meant, such as those of the parameters;
            vectors are left out.

    Returns:
        How many there are, ``count``, and how many ``elements`` they copy.
    """
    wanted = {shape for shape in shapes if len(shape) > 1}
    found = [
        tuple(map(int, dimensions.split(',')))
        for dimensions in re.findall(r'= \w+\[([\d,]+)\]\S* copy(?:-start)?\(', text)
    ]
    sizes = [math.prod(shape) for shape in found if shape in wanted]
    return {'count': len(sizes), 'elements': sum(sizes)}


def describe(problem: Problem) -> dict[str, Any]:
    """Memory and copies of all programs.

    Args:
        problem: the network.

    Returns:
        By title, with ``parameter_bytes`` for scale.
    """
    leaves = jax.tree.leaves(problem.shapes()['params'])
    shapes = [leaf.shape for leaf in leaves]
    described = {}
    for title in PROGRAMS:
        program = compiled(problem, title)
        described[title] = {
            'memory': memory(program.executable),
            'copies': copies(program.executable.as_text() or '', shapes),
            'conditionals': program.conditionals,
        }
    return {
        'parameter_bytes': sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves),
        'programs': described,
    }


@contextlib.contextmanager
def _cached_compilations() -> Iterator[None]:
    """Compiled programs go to a new directory and come from there."""
    settings = {
        'jax_compilation_cache_dir': None,
        'jax_persistent_cache_min_compile_time_secs': 0.0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in {**settings, 'jax_compilation_cache_dir': folder}.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def compile_seconds(problem: Problem, repetitions: int) -> dict[str, list[float]]:
    """Seconds of tracing and compiling: two planned programs, one traced.

    Args:
        problem: the network.
        repetitions: how often each is compiled.

    Returns:
        Lists of seconds: ``planned`` and ``traced``, and both again where the
        persistent compilation cache is on, ``… written`` the first time and ``… read``
        after that.
    """
    seconds: dict[str, list[float]] = {}

    def compile_all(label: str) -> None:
        for name, titles in {'planned': PLANNED, 'traced': TRACED}.items():
            jax.clear_caches()
            taken = sum(compiled(problem, title).compile_seconds for title in titles)
            seconds.setdefault(f'{name}{label}', []).append(taken)

    for _ in range(repetitions):
        compile_all('')
        with _cached_compilations():
            compile_all(', written')
            compile_all(', read')
    return seconds


def resources(problem: Problem, steps: int) -> dict[str, Any]:
    """What the operating system counts while steps run.

    A program whose temporaries are given back to the system after each call is given
    new pages for them at the next one, one page fault each.

    Args:
        problem: the network.
        steps: how many steps of each variant.

    Returns:
        By title of the variant, for one step: ``page_faults``, seconds of all
        cores in the program, ``user_seconds``, and in the system, ``system_seconds``.
    """
    counted = {}
    for title, runner in jax_steps.runners(problem).items():
        runner.run(1)
        before = resource.getrusage(resource.RUSAGE_SELF)
        runner.run(steps)
        after = resource.getrusage(resource.RUSAGE_SELF)
        made = steps * runner.steps
        counted[title] = {
            'page_faults': (after.ru_minflt - before.ru_minflt) / made,
            'user_seconds': (after.ru_utime - before.ru_utime) / made,
            'system_seconds': (after.ru_stime - before.ru_stime) / made,
        }
    return counted


def statistics_cost(
    problem: Problem, masks: Mapping[str, Any]
) -> dict[str, jax_steps.JaxRunner]:
    """Runners of sampled steps whose statistics are taken over some tensors.

    Args:
        problem: the network.
        masks: ``stats_mask`` of vSAM, by name.

    Returns:
        The runner of the base optimizer, and one for each mask.
    """
    runners = jax_steps.runners(problem, (variants.BASE,))
    for name, mask in masks.items():
        tx: optax.GradientTransformation = variants.vsam(problem.base, stats_mask=mask)
        session = jax_steps.Session(problem, tx)
        runners[name] = jax_steps.JaxRunner(
            session, variants.VARIANTS[variants.SAMPLED]
        )
    return runners
