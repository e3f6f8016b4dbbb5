"""Handwritten digits with 40 % of the training labels wrong, on two CPU cores.

The task in which sharpness-aware training shows what it is for within a minute:
a network that can learn wrong labels by heart, and does so with plain SGD.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Every number of a run."""
    config = ml_collections.ConfigDict()
    config.name = 'digits'

    # scikit-learn's 1,797 digits, 8×8 pixels. The split is the same in all runs.
    config.data = {
        'name': 'digits',
        'train': 1000,
        'validation': 297,
        'test': 500,
        'split_seed': 0,
    }
    # So many training labels are changed to another class, drawn anew per seed.
    config.label_noise = 0.4
    config.label_smoothing = 0.0

    config.model = 'cnn'
    config.models = {
        'mlp': {'width': 64, 'depth': 2, 'dtype': 'float32'},
        'cnn': {'width': 16, 'dtype': 'float32'},
        'small_resnet': {'width': 16, 'blocks': 1, 'dtype': 'float32'},
    }

    config.method = 'vsam'
    config.methods = {
        'sgd': {'optimizer': {'learning_rate': 0.01}},
        'sam': {'rho': 0.3},
        'asam': {'rho': 1.0, 'eta': 0.0},
        'looksam': {'rho': 0.3, 'every': 5, 'gain': 0.7},
        'vsam': {
            'rho': 0.3,
            'window': 10,
            'segments': 5,
            'warmup_steps': 19,
            'norm_gain': 0.13,
            'variance_gain': 0.13,
            'decay': 0.7,
            'reuse_steps': 6,
            'max_rate': 0.8,
            'seed': 0,
        },
    }
    config.optimizer = {
        'learning_rate': 0.1,
        'momentum': 0.9,
        'nesterov': False,
        'weight_decay': 5e-4,
    }

    config.epochs = 60
    config.batch_size = 100
    config.seed = 0
    config.dispatch = 'planned'
    # In epochs (of ten steps).
    config.log_every = 2
    config.eval_every = 2
    # 0: none, a run takes seconds.
    config.checkpoint_every = 0

    config.compare = {
        # Costs are relative to the first.
        'methods': ('sgd', 'sam', 'vsam'),
        'seeds': (0, 1, 2, 3, 4),
        'timing_rounds': 30,
        'timing_steps': 10,
    }
    # Learning rate and ρ are tuned together: what is best for one method may hide
    # what another can do.
    rates = (0.01, 0.03, 0.1)
    rhos = (0.25, 0.5, 1.0, 1.4, 2.0)
    long_windows = {'methods.vsam.window': 20, 'methods.vsam.warmup_steps': 39}
    config.tune = {
        'seeds': (100, 101, 102),
        # The method, the field that is tuned, its values, and what changes with it.
        'grid': (
            ('sgd', 'methods.sgd.optimizer.learning_rate', rates, {}),
            *(
                (
                    method,
                    f'methods.{method}.rho',
                    rhos,
                    {'optimizer.learning_rate': rate},
                )
                for rate in rates[::-1]
                for method in ('sam', 'vsam')
            ),
            ('vsam', 'methods.vsam.rho', rhos, long_windows),
        ),
    }
    return config
