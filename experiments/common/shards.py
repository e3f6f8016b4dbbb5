"""A share of the runs that a program is to make, for several processes at once."""

import dataclasses
import re

from absl import flags

from experiments.common.configuration import ConfigError


@dataclasses.dataclass(frozen=True)
class Shard:
    """Every ``count``-th run, beginning with number ``index``.

    Attributes:
        index: 0 to count − 1.
        count: how many shares there are.
    """

    index: int = 0
    count: int = 1

    def holds(self, number: int) -> bool:
        """Whether the run of this number, counted from 0, is one of the share."""
        return number % self.count == self.index

    @property
    def whole(self) -> bool:
        """Whether the share is all there is."""
        return self.count == 1


def parse(text: str) -> Shard:
    """The shard that a flag names, ``'1/4'``; the whole for an empty text.

    Raises:
        ConfigError: if the text is no such thing.
    """
    if not text:
        return Shard()
    match = re.fullmatch(r'(\d+)/(\d+)', text)
    shard = Shard(*map(int, match.groups())) if match else None
    if shard is None or not shard.index < shard.count:
        raise ConfigError(
            'shard must be index/count with index in [0, count), 0/2 for instance;'
            f' got {text!r}.'
        )
    return shard


def define_flag() -> None:
    """Defines ``--shard``."""
    flags.DEFINE_string(
        'shard', '', 'Make every count-th run alone, no report: index/count.'
    )
