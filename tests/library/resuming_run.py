"""A run that saves every 4 steps and resumes; killed by test_checkpoints.py.

python -m tests.library.resuming_run FOLDER
"""

import hashlib
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

import vsam_jax
from tests import problems
from vsam_jax import checkpoint
from vsam_jax._state import only_state

SETTINGS = {'rho': 0.1, 'window': 4, 'segments': 2, 'seed': 3}
CONFIG = {'vsam': SETTINGS, 'learning_rate': 0.1}


def optimizer(**changes: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        vsam_jax.vsam(**(SETTINGS | changes)), optax.sgd(0.1, momentum=0.9)
    )


def plain_state(tx: Any, **options: Any) -> Any:
    params = problems.mlp_params(**options)
    return params, tx.init(params)


def main(folder: str) -> None:
    tx = optimizer()
    step = vsam_jax.PlannedStep(problems.make_step(tx))
    # Makes saving take long enough to be interrupted.
    ballast = np.random.default_rng(0).random(2**23)
    state = plain_state(tx)
    directory = pathlib.Path(folder).resolve() / 'steps'
    first = 0
    with ocp.CheckpointManager(directory) as manager:
        if manager.latest_step() is not None:
            restored = checkpoint.restore(manager, (state, ballast), config=CONFIG)
            state, first = restored[0], int(only_state(restored).step)
        for i, batch in enumerate(problems.mlp_batches(14)):
            if i < first:
                continue
            if i % 4 == 0 and i > first:
                checkpoint.save(manager, i, (state, ballast), config=CONFIG)
            state, _ = step(state, batch)
    bits = [
        hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for leaf in jax.tree.leaves(state)
    ]
    result = {'first_step': first, 'bits': bits}
    (pathlib.Path(folder) / 'result.json').write_text(json.dumps(result))


if __name__ == '__main__':
    main(sys.argv[1])
