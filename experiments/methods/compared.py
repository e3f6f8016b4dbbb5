"""Methods as studies compare them: settings, and where their radii are looked for."""

import dataclasses
from typing import Any

from experiments.common import configuration

# Multiples of the radius in the middle.
NEAR = (0.5, 0.7, 1.0, 1.4, 2.0)
FAR = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        title: how it is called in tables.
        settings: what the configuration says of it besides ρ and the learning rate;
            those of ``config.methods[direction]`` hold where nothing else is said.
        centre: the radius in the middle of those tried, a multiple of the one chosen
            for SAM. Lean SAM takes √share of it by itself.
        spacing: the radii tried, as multiples of that.
        cost: which probe says how long a run takes: ``'one'`` gradient a step,
            ``'two'``, or ``'some'`` more than one.
        everywhere: whether it takes part in long tasks too.
    """

    title: str
    settings: dict[str, Any]
    centre: float = 1.0
    spacing: tuple[float, ...] = NEAR
    cost: str = 'some'
    everywhere: bool = False

    @property
    def direction(self) -> str:
        """The name of the method for :mod:`experiments.methods.registry`."""
        return self.settings['direction']


def _steady(tolerance: float) -> Method:
    return Method(
        f'steady vSAM, η = {tolerance}',
        {'direction': 'steady_vsam', 'every': 3, 'tolerance': tolerance},
        everywhere=True,
    )


def _slice(parts: int, every: int) -> Method:
    when = {1: 'every step', 3: 'every 3rd step'}[every]
    return Method(
        f'lean SAM, 1/{parts}, {when}',
        {
            'direction': 'lean_sam',
            'share': 1 / parts,
            'every': every,
            'tolerance': 0.5,
        },
        everywhere=True,
    )


# The others are compared with the first two.
METHODS = {
    'sgd': Method('SGD', {'direction': 'sgd'}, cost='one', everywhere=True),
    'sam': Method('SAM', {'direction': 'sam'}, cost='two', everywhere=True),
    'steady_03': _steady(0.3),
    'steady_05': _steady(0.5),
    'slice_8_3': _slice(8, 3),
    'slice_4_3': _slice(4, 3),
    'slice_8_1': _slice(8, 1),
    # Centres of those below: where small networks had them in a first comparison.
    'msam': Method('MSAM', {'direction': 'msam'}, 4.0, FAR, cost='one'),
    'vsam': Method('vSAM', {'direction': 'vsam'}, 1.4),
    'quarter': Method(
        'ascent on a quarter',
        {'direction': 'part_ascent', 'share': 1 / 4},
        1.4,
        everywhere=True,
    ),
    'amplified': Method('amplified third', {'direction': 'amplified', 'every': 3}),
    'aesam': Method('AE-SAM', {'direction': 'aesam'}, 1.4, cost='two'),
    'looksam': Method('LookSAM', {'direction': 'looksam'}, 0.25, FAR),
}


def config_of(config: Any, method: str, rho: float, rate: float, seed: int) -> Any:
    """The configuration of a run.

    Args:
        config: the task's.
        method: one of :data:`METHODS`.
        rho: its radius; SGD has none.
        rate: its learning rate.
        seed: the seed.
    """
    settings = METHODS[method].settings
    known = dict(config.methods.get(settings['direction'], {}))
    known.pop('optimizer', None)
    chosen = {**known, **settings, 'title': METHODS[method].title}
    if method != 'sgd':
        chosen['rho'] = rho
    config = configuration.with_values(config, {'seed': seed})
    with config.unlocked():
        config.methods = {method: {**chosen, 'optimizer': {'learning_rate': rate}}}
        config.method = method
    return config
