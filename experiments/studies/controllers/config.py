"""When to sample and how to reuse: candidates in runs of any length.

``--config=experiments/studies/controllers/config.py:TASK`` with a name of
``digits_tasks.TASKS``, or ``cifar`` for noisy images of CIFAR-100. All candidates stand
on two of them, the main ones on the others. Each is tuned (``experiments.tune``) over
the same radii, and compared with SAM at its own best and at SAM's settings
(``experiments.studies.controllers.measure``).
"""

from typing import Any

import ml_collections

from experiments.configs import cifar100_small, digits_tasks
from experiments.configs.digits_tasks import TASKS

_CANDIDATES = 'experiments.studies.controllers.candidates'
# All candidates take part here.
FULL = ('mlp_200', 'mlp_600')
# Fewer candidates take part in what takes long.
SLOW = ('vit_600', 'mlp_20000')
RHOS = {
    'mlp': (0.25, 0.5, 1.0, 1.4, 2.0),
    'cnn': (0.5, 1.0, 1.4, 2.0),
    'vit': (0.1, 0.2, 0.4, 0.8),
}


def _candidates(window: int, steps: int, every_one: bool) -> dict[str, dict[str, Any]]:
    """Settings of each candidate, or of those that take part in all tasks."""
    published = {'window': window, 'warmup_steps': 2 * window - 1}
    # As many windows as the reference has, times its gain, make the same growth.
    gain = min(0.13 * (78_000 / 50) / (steps / window), 4.0)
    everywhere = {
        'every_third': {
            'direction': f'{_CANDIDATES}:periodic',
            'title': 'every 3rd, β = 0.7',
        },
        'no_reuse': {
            'direction': f'{_CANDIDATES}:periodic',
            'title': 'every 3rd, no reuse',
            'reuse_steps': 0,
        },
        'mean_one': {
            'direction': f'{_CANDIDATES}:periodic',
            'title': 'every 3rd, β = 0.7, mean weight 1',
            'mean_one': True,
        },
        'steady_vsam': {'title': 'steady, η = 0.3', 'tolerance': 0.3},
        'steady_05': {
            'direction': 'steady_vsam',
            'title': 'steady, η = 0.5',
            'tolerance': 0.5,
        },
        'first_third': {
            'direction': f'{_CANDIDATES}:from_rate',
            'title': 'published, b₀ = K/3',
            **published,
        },
    }
    further = {
        'undecayed': {
            'direction': f'{_CANDIDATES}:periodic',
            'title': 'every 3rd, weight 1',
            'decay': 1.0,
        },
        'averaged': {
            'direction': f'{_CANDIDATES}:periodic',
            'title': 'every 3rd, average of PSFs (0.8)',
            'decay': 1.0,
            'average': 0.8,
        },
        'at_random': {
            'direction': f'{_CANDIDATES}:periodic',
            'title': 'one in three at random, β = 0.7',
            'at_random': True,
        },
        'steady_01': {
            'direction': 'steady_vsam',
            'title': 'steady, η = 0.1',
            'tolerance': 0.1,
        },
        'steady_fifth': {
            'direction': 'steady_vsam',
            'title': 'steady, η = 0.3, every 5th',
            'every': 5,
        },
        'staleness_05': {
            'direction': f'{_CANDIDATES}:measured',
            'title': 'staleness held at 0.5',
            'tolerance': 0.5,
        },
        'staleness_1': {
            'direction': f'{_CANDIDATES}:measured',
            'title': 'staleness held at 1',
            'tolerance': 1.0,
        },
        'fitted': {
            'direction': f'{_CANDIDATES}:measured',
            'title': 'every 3rd, fitted weight',
            'fitted': True,
        },
        'late': {
            'direction': f'{_CANDIDATES}:scheduled',
            'title': 'SAM in the last third',
            'num_steps': steps,
            'start': 2 / 3,
        },
        'rising': {
            'direction': f'{_CANDIDATES}:scheduled',
            'title': 'rate rising from 0 to 2/3',
            'num_steps': steps,
            'last_rate': 2 / 3,
        },
        'scaled_gains': {
            'direction': 'vsam',
            'title': 'published, gains scaled by length',
            **published,
            'norm_gain': gain,
            'variance_gain': gain,
            'max_rate': 0.4,
        },
        'no_norm_gain': {
            'direction': 'vsam',
            'title': 'published, α₁ = 0',
            **published,
            'norm_gain': 0.0,
        },
        'no_variance_gain': {
            'direction': 'vsam',
            'title': 'published, α₂ = 0',
            **published,
            'variance_gain': 0.0,
        },
        'published_undecayed': {
            'direction': 'vsam',
            'title': 'published, β = 1',
            **published,
            'decay': 1.0,
        },
        'published_no_reuse': {
            'direction': 'vsam',
            'title': 'published, no reuse',
            **published,
            'reuse_steps': 0,
        },
        'published_long': {
            'direction': 'vsam',
            'title': f'published, K = {2 * window}',
            'window': 2 * window,
            'warmup_steps': 4 * window - 1,
        },
    }
    return everywhere | further if every_one else everywhere


def get_config(task: str = 'mlp_600') -> ml_collections.ConfigDict:
    """Every number of a run.

    Args:
        task: one of ``digits_tasks.TASKS``, or ``'cifar'``.

    Returns:
        The configuration.

    Raises:
        ValueError: for another task.
    """
    if task not in (*TASKS, 'cifar'):
        names = ', '.join((*TASKS, 'cifar'))
        raise ValueError(f'task must be one of {names}; got {task!r}.')
    if task == 'cifar':
        return _cifar()
    network, epochs, _, window = TASKS[task]
    config: Any = digits_tasks.get_config(task)
    config.name = f'controllers_{task}'
    rates = (0.003, 0.007, 0.02, 0.1)
    if network == 'vit':
        rates = (1e-4, 3e-4, 1e-3, 3e-3)
    candidates = _candidates(window, 10 * epochs, every_one=task in FULL)
    if task in SLOW:
        for name in ('no_reuse', 'mean_one', 'first_third'):
            del candidates[name]
    for name, settings in candidates.items():
        config.methods[name] = {'rho': 1.0, **settings}
    names = ('sgd', 'sam', 'vsam', *candidates)
    # Seeds of what takes long are fewer.
    quick = network == 'mlp' and epochs <= 200
    seeds = tuple(range(20, 30 if quick else 25))
    config.compare.update({'methods': names, 'seeds': seeds})
    # Of what takes longest every other radius will do.
    rhos = RHOS[network][:: 2 if epochs > 200 else 1]
    config.tune = {
        'seeds': (200, 201, 202) if quick else (200, 201),
        'grid': (
            ('sgd', 'methods.sgd.optimizer.learning_rate', rates, {}),
            *(
                (name, f'methods.{name}.rho', rhos, {})
                for name in names
                if name != 'sgd'
            ),
        ),
    }
    return config


def _cifar() -> ml_collections.ConfigDict:
    """The noisy images of ``cifar100_small.py``, and two more candidates on them.

    Name and settings are those of that configuration, so that its finished runs count.
    """
    config: Any = cifar100_small.get_config('noisy')
    further = {
        name: settings
        for name, settings in _candidates(20, 1500, every_one=False).items()
        if name in ('every_third', 'steady_05')
    }
    for name, settings in further.items():
        config.methods[name] = {'rho': 0.2, **settings}
        config.methods[name].optimizer = {'learning_rate': 0.1}
    methods = ('sgd', 'sam', 'vsam', 'steady_vsam')
    config.compare.methods = (*methods, *further)
    # The further ones at the learning rate that was best for SAM and steady vSAM.
    config.tune.grid = (
        *(row for row in config.tune.grid if row[0] in methods),
        *(
            (
                name,
                f'methods.{name}.rho',
                (0.2, 0.3),
                {f'methods.{name}.optimizer.learning_rate': 0.2},
            )
            for name in further
        ),
    )
    return config
