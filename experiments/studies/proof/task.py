"""What a task of the proof is, and what is compared on it."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from experiments.common import configuration

TUNING_SEED = 600
SEEDS = (700, 701, 702)
# Settings are checked in runs of this share of the epochs.
CHECK = 1 / 4
MULTIPLES = (0.5, 1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        method: one of :data:`experiments.methods.compared.METHODS`.
        seeds: those that are reported.
        equal_time: whether it has as many epochs as fit in SAM's time, instead of as
            many epochs as SAM.
    """

    method: str
    seeds: tuple[int, ...] = SEEDS
    equal_time: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        title: how it is called in tables.
        make: makes the configuration, whatever the method.
        rho: the radius that SAM had on a smaller task; the others have multiples of it.
        rate: the learning rate of all but SGD, from there too.
        sgd_rate: SGD's (AdamW's where that is the base optimizer).
        entries: by name, what is compared; ``'sgd'`` and ``'sam'`` among them.
        checked: whether ρ (SGD: the learning rate) is chosen among
            :data:`MULTIPLES` of what it had there, with one seed.
        judge: what is best by: ``'accuracy'`` or ``'loss'`` on validation examples.
    """

    title: str
    make: Callable[[], Any]
    rho: float
    rate: float
    sgd_rate: float
    entries: dict[str, Entry]
    checked: bool = True
    judge: str = 'accuracy'

    def config(self) -> Any:
        """The configuration: evaluated after each epoch, a checkpoint now and then."""
        return copy.deepcopy(self._config)

    @property
    def epochs(self) -> int:
        """How many epochs SAM has."""
        return self._config.epochs

    @functools.cached_property
    def _config(self) -> Any:
        config = self.make()
        return configuration.with_values(
            config,
            {
                'log_every': 1,
                'eval_every': 1,
                'checkpoint_every': max(config.epochs // 4, 1),
                'checkpoint_keep': 1,
            },
        )
