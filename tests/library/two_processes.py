"""One of two processes that train together; run by test_devices.py.

python -m tests.library.two_processes PORT INDEX OUTPUT
"""

import hashlib
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def main(port: str, index: str, output: str) -> None:
    jax.config.update('jax_enable_x64', True)
    jax.config.update('jax_num_cpu_devices', 4)
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(f'127.0.0.1:{port}', 2, int(index))
    assert (jax.process_count(), jax.device_count()) == (2, 8)
    # That both ways train the same, whatever the layout, one process shows.
    report = {
        layout: run(layout, planned)
        for layout, planned in (('fsdp', True), ('per_device', False))
    }
    pathlib.Path(output).write_text(json.dumps(report))
    jax.distributed.shutdown()


def run(layout: str, planned: bool) -> dict[str, Any]:
    """Trains on this process's half of each mini-batch; what came of it."""
    # Imported here: this module runs before jax is set up, those make arrays.
    import vsam_jax
    from tests import problems
    from tests.library import sharded_runs
    from vsam_jax._state import only_state

    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P('data'))
    tx = sharded_runs.optimizer('vsam')
    if layout == 'fsdp':
        specs = sharded_runs.LAYOUTS['fsdp']
        step = problems.make_step(tx, sharded_runs.loss_fn)
    else:
        specs = sharded_runs.LAYOUTS['replicated']
        step = sharded_runs.mapped_step(tx, axis_name='data', per_device=True)
    params = [
        jax.make_array_from_callback(
            p.shape, NamedSharding(mesh, spec), lambda i, p=p: np.asarray(p)[i]
        )
        for p, spec in zip(problems.mlp_params(dtype=float), specs, strict=True)
    ]
    make_state = lambda params: (params, tx.init(params))
    shardings = vsam_jax.sharding.state_shardings(
        jax.eval_shape(make_state, params), params
    )
    state = jax.jit(make_state, out_shardings=shardings)(params)
    step = sharded_runs.driver(step, planned, out_shardings=(shardings, None))

    half = slice(8 * jax.process_index(), 8 * (jax.process_index() + 1))
    sampled, plans = [], []
    for batch in sharded_runs.batches():
        batch = jax.tree.map(
            lambda a: jax.make_array_from_process_local_data(split, a[half]), batch
        )
        state, _ = step(state, batch)
        inner = only_state(state)
        sampled.append(bool(inner.sampled))
        plans.append(np.asarray(inner.plan).tolist())
    params = multihost_utils.process_allgather(state[0], tiled=True)
    small = only_state(state)._replace(psf=None)
    return {
        'params': [np.asarray(p).tolist() for p in params],
        'sampled': sampled,
        'plans': plans,
        'bits': [_digest(leaf) for leaf in jax.tree.leaves((params, small))],
    }


def _digest(x: Any) -> str:
    return hashlib.sha256(np.asarray(x).tobytes()).hexdigest()


if __name__ == '__main__':
    main(*sys.argv[1:])
