"""Checkpoints of a run: written while it goes on, read afterwards."""

import pathlib
from typing import Any

import jax
import numpy as np

import vsam_jax
from experiments.common import configuration

PyTree = Any

CHECKPOINTS = 'checkpoints'


class Checkpoints:
    """The checkpoints of a run; none if ``config.checkpoint_every`` is 0."""

    def __init__(self, path: pathlib.Path, config: Any):
        self._settings = configuration.of_run(config)
        self._manager: Any = None
        if config.checkpoint_every:
            # Takes seconds to import.
            import orbax.checkpoint as ocp

            self._manager = ocp.CheckpointManager(
                (path / CHECKPOINTS).absolute(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=config.checkpoint_keep
                ),
            )

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *_: object) -> None:
        if self._manager is not None:
            self._manager.close()

    def restore(self, state: PyTree) -> PyTree:
        """The state of the last complete checkpoint, ``state`` if there is none."""
        if self._manager is None or self._manager.latest_step() is None:
            return state
        try:
            return vsam_jax.checkpoint.restore(
                self._manager, state, config=self._settings
            )
        except ValueError as error:
            raise configuration.ConfigError(str(error)) from error

    def save(self, step: int, state: PyTree) -> None:
        """Saves in the background."""
        vsam_jax.checkpoint.save(self._manager, step, state, config=self._settings)


def steps(path: pathlib.Path) -> list[int]:
    """The steps that a run has checkpoints of, in order.

    Raises:
        ConfigError: if there are none.
    """
    directory = (path / CHECKPOINTS).absolute()
    # A manager would make the directory.
    if directory.is_dir():
        with _manager(directory) as manager:
            found = sorted(manager.all_steps())
        if found:
            return found
    raise configuration.ConfigError(
        f'{path} holds no checkpoint; run it with config.checkpoint_every > 0.'
    )


def variables(path: pathlib.Path, like: PyTree, step: int | None = None) -> PyTree:
    """The variables of a network, from a checkpoint.

    Args:
        path: the workdir of the run.
        like: ``params`` and, where the network has any, ``batch_stats``: arrays or
            ``jax.ShapeDtypeStruct`` objects, which say what is read. Where the
            checkpoint lacks one of them, that leaf comes back as it is.
        step: of which step; None for the last one.

    Returns:
        A tree like ``like`` of arrays on the host, in the shapes of the checkpoint.

    Raises:
        ConfigError: if there is no checkpoint.
    """
    # Takes seconds to import.
    import orbax.checkpoint as ocp

    step = steps(path)[-1] if step is None else step
    arguments = ocp.args.PyTreeRestore(
        item=like,
        partial_restore=True,
        # Not as jax.Array: those would go back to the devices of the run.
        restore_args=jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like
        ),
    )
    with _manager((path / CHECKPOINTS).absolute()) as manager:
        return manager.restore(step, args=ocp.args.Composite(state=arguments))['state']


def _manager(directory: pathlib.Path) -> Any:
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(directory)
