"""What a task is, and how many runs it is given."""

import copy
import dataclasses
import functools
from typing import Any

from experiments.common import configuration
from experiments.methods.compared import METHODS, Method


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is run on a task.

    Attributes:
        tuning: the seeds that settings are chosen with.
        seeds: those that are reported.
        everything: whether all methods take part, or those of ``everywhere`` alone.
    """

    tuning: tuple[int, ...]
    seeds: tuple[int, ...]
    everything: bool


# By how long a run takes: under 5 s, under 30 s, longer.
EFFORTS = {
    'short': Effort((600, 601), tuple(range(700, 712)), True),
    'middle': Effort((600,), tuple(range(700, 705)), True),
    'long': Effort((600,), tuple(range(700, 705)), False),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        title: how it is called in tables.
        module: the configuration, a module of ``experiments.configs``.
        name: the argument of its ``get_config``.
        effort: a key of :data:`EFFORTS`.
        radii: ρ of SAM; the other methods have multiples of the one chosen.
        rates: learning rates of SAM; the others have the one chosen.
        sgd_rates: those of SGD (AdamW, where that is the base optimizer).
        changes: dotted paths in the configuration and their values.
        judge: what settings are chosen by, ``'accuracy'`` or ``'loss'`` on validation
            examples. Of text it is the loss; what is compared is the accuracy.
    """

    title: str
    module: Any
    name: str
    effort: str
    radii: tuple[float, ...]
    rates: tuple[float, ...]
    sgd_rates: tuple[float, ...]
    changes: tuple[tuple[str, Any], ...] = ()
    judge: str = 'accuracy'

    @property
    def work(self) -> Effort:
        """How much is run."""
        return EFFORTS[self.effort]

    @property
    def methods(self) -> dict[str, Method]:
        """Those that take part."""
        everything = self.work.everything
        return {n: m for n, m in METHODS.items() if everything or m.everywhere}

    def config(self) -> Any:
        """The configuration: evaluated once, at the end, and without checkpoints."""
        return copy.deepcopy(_config(self.module, self.name, self.changes))


@functools.cache
def _config(module: Any, name: str, changes: tuple[tuple[str, Any], ...]) -> Any:
    config: Any = configuration.with_values(module.get_config(name), dict(changes))
    own = dict(changes)
    return configuration.with_values(
        config,
        {
            'log_every': own.get('log_every', max(config.epochs // 5, 1)),
            'eval_every': config.epochs,
            'checkpoint_every': 0,
        },
    )
