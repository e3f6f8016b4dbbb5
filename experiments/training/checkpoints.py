"""Checkpoints of a run: written while it goes on, read afterwards."""

import contextlib
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import vsam_jax
from experiments.common import configuration

PyTree = Any

CHECKPOINTS = 'checkpoints'
_GO_ON = (
    'The same command then goes on from the checkpoint before it, or from the start'
    ' where there is none.'
)


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
        """The state of the last complete checkpoint, ``state`` if there is none.

        Raises:
            ConfigError: if it is of other settings, or cannot be read.
        """
        if self._manager is None or (step := self._manager.latest_step()) is None:
            return state
        with _reading(self._manager.directory / str(step), _GO_ON):
            return vsam_jax.checkpoint.restore(
                self._manager, state, config=self._settings, step=step
            )

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
        ConfigError: if there is no checkpoint, or it cannot be read.
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
    directory = (path / CHECKPOINTS).absolute()
    with (
        _manager(directory) as manager,
        _reading(directory / str(step), 'Without it, that of the step before is read.'),
    ):
        return manager.restore(step, args=ocp.args.Composite(state=arguments))['state']


@contextlib.contextmanager
def _reading(directory: Any, way_out: str) -> Iterator[None]:
    """Names the checkpoint that cannot be read, and says what to do then."""
    try:
        yield
    except (KeyError, OSError, ValueError) as error:
        lines = [textwrap.shorten(line, 200) for line in str(error).splitlines()]
        raise configuration.ConfigError(
            f'The checkpoint {directory} cannot be read: '
            + '\n  '.join(lines)
            + f'\nMove it away. {way_out}'
        ) from error


def _manager(directory: pathlib.Path) -> Any:
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(directory)
