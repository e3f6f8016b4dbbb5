"""CIFAR-100's images in what two CPU cores can do, in three regimes.

``--config=experiments/configs/cifar100_small.py:noisy``: 5,000 images in the 20 groups
that the 100 classes form, 40 % of the training labels wrong, a network that can learn
them by heart and 30 epochs in which it does. ``…:underfitted``: 20,000 images, right
labels, augmented, and 3 epochs, after which the same network is far from fitting them:
here there is no overfitting that sharpness-aware training could prevent. ``…:few``:
the images of ``noisy`` with right labels, mirrored and shifted at random.
"""

from typing import Any

import ml_collections

from experiments.configs import cifar100

REGIMES = ('noisy', 'underfitted', 'few')


def get_config(regime: str = 'noisy') -> ml_collections.ConfigDict:
    """Every number of a run.

    Args:
        regime: one of :data:`REGIMES`.

    Returns:
        The configuration.

    Raises:
        ValueError: for another regime.
    """
    if regime not in REGIMES:
        raise ValueError(f'regime must be one of {", ".join(REGIMES)}; got {regime!r}.')
    noisy = regime == 'noisy'
    few = regime != 'underfitted'
    config: Any = cifar100.get_config()
    config.name = f'cifar100_small_{regime}'
    config.data.name = 'cifar100_coarse'
    # What settings are chosen on is held back from training, the test split is whole.
    config.data.update({'train': 5000 if few else 20_000, 'validation': 5000})
    if noisy:
        config.augmentation.update({'padding': 0, 'flip': False, 'cutout': 0})
    else:
        config.augmentation.update({'cutout': 0})
    config.label_noise = 0.4 if noisy else 0.0
    config.label_smoothing = 0.0

    config.model = 'small_resnet'
    # Small members of the families in the publication, each with a cheap stem.
    config.models.small_resnet.update({'width': 16, 'stem_stride': 2})
    config.models.wide_resnet.update({'depth': 10, 'width': 1, 'stem_stride': 2})
    config.models.pyramidnet.update({'depth': 8, 'alpha': 32, 'stem_stride': 2})
    config.optimizer.weight_decay = 5e-4
    config.epochs = 30 if few else 3
    config.batch_size = 100
    epoch = config.data.train // config.batch_size
    for key in ('log_every', 'eval_every'):
        config[key] = 2 if few else 1
    config.checkpoint_every = 10 if few else 1

    for name in config.compare.methods:
        config.methods[name].optimizer = {'learning_rate': 0.1}
    vsam = config.methods.vsam
    # The reference has 50 and three epochs, for runs of 78,000 steps; these have 1,500
    # or 600.
    vsam.update({'window': 20, 'warmup_steps': 3 * epoch if few else 60})

    config.compare.update({'seeds': tuple(range(5 if few else 3)), 'timing_steps': 10})
    # Learning rate and ρ (for SAF: the weight of its term) are tuned together; SGD,
    # which has but one of them, gets more values of it.
    rhos = {
        'sam': (0.1, 0.15, 0.2, 0.3),
        'looksam': (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15),
        'esam': (0.02, 0.05, 0.1, 0.15, 0.2),
        'vsam': (0.2, 0.3, 0.4, 0.55),
        'steady_vsam': (0.15, 0.2, 0.3, 0.4),
    }
    if not noisy:
        rhos = dict.fromkeys(rhos, (0.02, 0.05, 0.1))
        rhos['looksam'] = (0.002, 0.01, 0.05)
    rates = (0.1, 0.2) if noisy else (0.1,)
    own = 'methods.{}.optimizer.learning_rate'.format
    if noisy:
        # The two that were best with one seed are compared with another one as well.
        config.tune.update({'finalists': 2, 'final_seeds': (101,)})
    config.tune.grid = (
        (
            'sgd',
            own('sgd'),
            (0.003, 0.005, 0.01, 0.03, 0.1) if noisy else (0.05, 0.1, 0.2),
            {},
        ),
        *(
            (method, f'methods.{method}.rho', values, {own(method): rate})
            for method, values in rhos.items()
            for rate in rates
        ),
        *(
            ('saf', 'methods.saf.weight', (0.1, 0.3, 1.0), {own('saf'): rate})
            for rate in ((0.005, 0.01) if noisy else rates)
        ),
    )
    return config
