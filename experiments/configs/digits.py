"""Handwritten digits with 40 % of the training labels wrong, on two CPU cores.

The task in which sharpness-aware training shows what it is for in some minutes:
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
    config.augmentation = {
        'padding': 0,
        'flip': False,
        'cutout': 0,
        'cutout_probability': 0.5,
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

    # 2, 3, 4 or 8: train weights and activations of so few bits; 0: full precision.
    config.quantization = {'bits': 0}
    # The workdir of a finished run whose network is trained on; {method} and {seed} in
    # it stand for those of the run. Empty: from random weights.
    config.init_from = ''

    config.method = 'vsam'
    # Every method has the learning rate and the ρ that were best for it on the
    # validation examples, of those in config.tune below; what all of them gave
    # stands in experiments/results/digits/tuning.json.
    config.methods = {
        # At 0.1, where the others are best, SGD learns the wrong labels by heart
        # (67 %); this rate is so small that it has not got to them at the end.
        'sgd': {'optimizer': {'learning_rate': 0.007}},
        'sam': {'rho': 1.0},
        # Not tuned: no part of the comparison.
        'asam': {'rho': 1.0, 'eta': 0.0},
        'looksam': {'rho': 1.0, 'every': 5, 'gain': 0.7},
        'esam': {'rho': 1.0, 'beta': 0.6, 'gamma': 0.5, 'seed': 0},
        'saf': {'weight': 0.3, 'temperature': 5.0, 'lag': 3, 'start': 5},
        'vsam': {
            'rho': 1.4,
            # The reference has 50, for runs of 78,000 steps. These have 600, in
            # which the budget, at most 1.26 times as large from window to window,
            # gets somewhere in short windows only. Tried as well: 20, for which
            # ρ = 2 gave 94.5 % (here: 96.1 %) with 18 % of the steps sampled.
            'window': 10,
            'segments': 5,
            # Rings are full when the first window starts.
            'warmup_steps': 19,
            # From here on the values of the reference.
            'norm_gain': 0.13,
            'variance_gain': 0.13,
            'decay': 0.7,
            'reuse_steps': 6,
            'max_rate': 0.8,
            # Of the plans; part of the programs, so the same for all seeds.
            'seed': 0,
        },
        # Not tuned: SAM's ρ, as it is meant to be used.
        'steady_vsam': {'rho': 1.0, 'every': 3, 'tolerance': 0.3},
        'lean_sam': {'rho': 1.0, 'share': 1 / 4, 'every': 3, 'tolerance': 0.5},
        # Not tuned either: SAM's ρ, and what their authors have besides.
        'gsam': {'rho': 1.0, 'alpha': 0.1},
        'wsam': {'rho': 1.0, 'gamma': 0.5},
        'fsam': {'rho': 1.0, 'sigma': 1.0, 'decay': 0.6},
        'vasso': {'rho': 1.0, 'theta': 0.4},
        'asyncsam': {'rho': 1.0},
        'aesam': {'rho': 1.0, 'delta': 0.9, 'lambda1': -1.0, 'lambda2': 1.0},
        'msam': {'rho': 3.0},
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
    # How many of the last ones stay.
    config.checkpoint_keep = 1

    config.compare = {
        # Costs are relative to the first.
        'methods': ('sgd', 'sam', 'vsam', 'steady_vsam', 'lean_sam'),
        # None that a choice was ever made with.
        'seeds': tuple(range(10, 20)),
        'timing_rounds': 30,
        'timing_steps': 10,
    }
    # Learning rate and ρ are tuned together, since the best of one depends on the
    # other. SGD, which has but one of them, gets more values of it.
    rates = (0.003, 0.01, 0.03, 0.1, 0.3)
    rhos = (0.25, 0.5, 1.0, 1.4, 2.0)
    long_windows = {'methods.vsam.window': 20, 'methods.vsam.warmup_steps': 39}
    config.tune = {
        'seeds': (100, 101, 102),
        # The method, the field that is tuned, its values, and what changes with it.
        'grid': (
            (
                'sgd',
                'methods.sgd.optimizer.learning_rate',
                (*rates, 0.005, 0.007, 0.014, 0.02),
                {},
            ),
            *(
                (
                    method,
                    f'methods.{method}.rho',
                    rhos,
                    {'optimizer.learning_rate': rate},
                )
                for method in ('sam', 'vsam')
                for rate in rates
            ),
            ('vsam', 'methods.vsam.rho', rhos, long_windows),
        ),
    }
    return config
