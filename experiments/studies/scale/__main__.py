"""Memory and traffic per device under FSDP, derived and checked.

    python -m experiments.studies.scale --parameters=1e9 --devices=256

prints what a step needs per device (``derive``), and what the programs of a small
sharded network hold and send on eight virtual devices of this CPU (``measure``).
"""

import argparse
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import vsam_jax
from experiments.benchmark.programs import memory
from experiments.common import quantities
from experiments.report import tables

STEPS = ('base', 'reuse', 'sampled')
_AXIS = 'data'


@dataclasses.dataclass(frozen=True)
class Layout:
    """Parameters sharded over devices, and what is stored of each.

    Attributes:
        parameters: how many numbers are trained.
        devices: over how many devices all tensors of their size are sharded.
        parameter_bytes: of a parameter, its gradient, and of w + ε.
        moments: how many numbers the base optimizer keeps per parameter, float32.
        psf_bytes: of a number of the PSF; 2 with ``psf_dtype=jnp.bfloat16``.
        sent_bytes: of a number in a collective; 2 where weights are gathered and
            gradients reduced in bfloat16.
    """

    parameters: float
    devices: int
    parameter_bytes: int = 4
    moments: int = 2
    psf_bytes: int = 4
    sent_bytes: int = 4


def derive(layout: Layout) -> dict[str, dict[str, float]]:
    """Bytes per device of each kind of step, without activations.

    Args:
        layout: sizes.

    Returns:
        For ``base`` (no vSAM), ``reuse`` and ``sampled`` steps: ``state`` (parameters,
        moments, PSF), ``gradients`` that exist at once besides it (g; on sampled
        steps also w + ε and g_SAM), their sum ``total``, and ``received``, what the
        device takes from the network in a step.
    """
    share = layout.parameters / layout.devices
    state = share * (layout.parameter_bytes + 4 * layout.moments)
    psf = share * layout.psf_bytes
    gradient = share * layout.parameter_bytes
    # Gathered in the forward and in the backward pass, and reduced once; what is
    # its own already a device does not receive.
    once = layout.sent_bytes * (layout.parameters - share)
    pass_ = 3 * once
    kept = {'base': state, 'reuse': state + psf, 'sampled': state + psf}
    tensors = {'base': 1, 'reuse': 1, 'sampled': 3}
    passes = {'base': 1, 'reuse': 1, 'sampled': 2}
    return {
        step: {
            'state': kept[step],
            'gradients': tensors[step] * gradient,
            'total': kept[step] + tensors[step] * gradient,
            'received': passes[step] * pass_,
        }
        for step in STEPS
    }


# --- The check ----------------------------------------------------------------


def _loss(gather: Callable[[jax.Array], jax.Array], layers: Any, batch: Any) -> Any:
    x = batch
    for w in layers:
        x = jnp.tanh(x @ gather(w))
    return jnp.mean(x**2)


def _train_step(tx: Any, loss: Callable[..., Any]) -> Callable[..., Any]:
    tx = optax.with_extra_args_support(tx)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        gradient = jax.grad(loss)
        updates, opt_state = tx.update(
            gradient(params, batch),
            opt_state,
            params,
            grad_fn=lambda p: gradient(p, batch),
        )
        return optax.apply_updates(params, updates), opt_state

    return step


def measure(
    width: int = 256, depth: int = 3, batch_size: int = 64, psf_dtype: Any = None
) -> dict[str, Any]:
    """What the programs of a sharded network hold and send, per device.

    A network of ``depth`` square layers, sharded by rows over all devices, trained
    with AdamW on a mini-batch that is split over the same devices.

    Args:
        width: of a layer, a multiple of the number of devices.
        depth: how many layers.
        batch_size: a multiple of the number of devices.
        psf_dtype: of vSAM.

    Returns:
        ``parameters``, ``devices`` and for each kind of step :func:`memory` of the
        compiled program, and ``collectives``: by operation how many elements of
        tensors they give, and how many ``scalars``.
    """
    mesh = jax.make_mesh((jax.device_count(),), (_AXIS,), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P(_AXIS))
    layers = [
        jax.ShapeDtypeStruct((width, width), jnp.float32, sharding=split)
        for _ in range(depth)
    ]
    batch = jax.ShapeDtypeStruct((batch_size, width), jnp.float32, sharding=split)
    loss = functools.partial(_loss, _gather(mesh))
    base = optax.adamw(1e-3)
    # More steps in a window would be larger statistics, but none of a tensor's size.
    vsam = vsam_jax.vsam(0.05, window=10, psf_dtype=psf_dtype)
    found = {}
    for name in STEPS:
        tx = base if name == 'base' else optax.chain(vsam, base)
        state = jax.eval_shape(lambda w, tx=tx: (w, tx.init(w)), layers)
        shardings = vsam_jax.sharding.state_shardings(state, layers)
        state = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            state,
            shardings,
        )
        # The base optimizer's state is donated too, though no method stands in it.
        step = vsam_jax.PlannedStep(
            _train_step(tx, loss), donate_argnums=0, out_shardings=shardings
        )
        program = step.program(name == 'sampled')
        executable = program.lower(state, batch).compile()
        found[name] = {
            'memory': memory(executable),
            'collectives': collectives(executable.as_text() or ''),
        }
    return {
        'parameters': depth * width**2,
        'devices': jax.device_count(),
        'batch_elements': batch_size * width // jax.device_count(),
        'steps': found,
    }


def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Gathers a layer's weights where they are used; their gradient is sharded."""
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(_AXIS))

    @jax.custom_vjp
    def gather(w: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(w, whole)

    gather.defvjp(
        lambda w: (gather(w), None),
        lambda _, g: (jax.lax.with_sharding_constraint(g, split),),
    )
    return gather


def collectives(text: str) -> dict[str, int]:
    """Elements that the collectives of a compiled program give, by operation.

    Args:
        text: of the program.

    Returns:
        For each operation the elements of its results, and under ``scalars`` how many
        results of one element there are among all of them.
    """
    found = {'scalars': 0}
    pattern = r'= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\('
    for shapes, operation in re.findall(pattern, text):
        for dimensions in re.findall(r'\w+\[([\d,]*)\]', shapes):
            size = math.prod(int(d) for d in dimensions.split(',') if d)
            if size == 1:
                found['scalars'] += 1
            else:
                found[operation] = found.get(operation, 0) + size
    return found


def table(layout: Layout) -> str:
    """What :func:`derive` gives, in GB and MB, as Markdown."""
    header = ['Step', 'State, MB', 'Gradients, MB', 'Together, MB', 'Received, GB']
    rows = [
        [
            name,
            *(f'{step[part] / 1e6:.1f}' for part in ('state', 'gradients', 'total')),
            f'{step["received"] / 1e9:.2f}',
        ]
        for name, step in derive(layout).items()
    ]
    return tables.markdown(header, rows)


def measured_table(measured: dict[str, Any]) -> str:
    """What :func:`measure` gives, in elements per parameter, as Markdown."""
    size = measured['parameters']
    share = 4 * size / measured['devices']
    operations = sorted(
        {
            name
            for step in measured['steps'].values()
            for name in step['collectives']
            if name != 'scalars'
        }
    )
    header = ['Step', 'Arguments', 'Temporaries', *operations, 'Scalars']
    rows = [
        [
            name,
            f'{step["memory"]["arguments"] / share:.2f}',
            f'{step["memory"]["temporaries"] / share:.2f}',
            *(f'{step["collectives"].get(op, 0) / size:.2f}' for op in operations),
            str(step['collectives']['scalars']),
        ]
        for name, step in measured['steps'].items()
    ]
    return tables.markdown(header, rows)


def main() -> None:
    """Prints both; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--parameters', type=quantities.positive, default=1e9)
    parser.add_argument('--devices', type=quantities.count, default=256)
    arguments = parser.parse_args()
    layout = Layout(arguments.parameters, arguments.devices)
    print(f'Derived, {layout}:\n\n{table(layout)}')
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', 8)
    measured = measure()
    print(
        f'Measured: {measured["parameters"]:,} parameters on {measured["devices"]}'
        " devices; memory as multiples of a device's share of the parameters,"
        f' collectives in elements per parameter:\n\n{measured_table(measured)}'
    )


if __name__ == '__main__':
    main()
