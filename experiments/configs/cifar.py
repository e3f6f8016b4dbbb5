"""What the configurations of CIFAR-10 and CIFAR-100 share: the published recipe."""

import ml_collections

# Epochs hold the full batches of 128 among 50,000 images.
_STEPS_PER_EPOCH = 390


def recipe(name: str, statistics: str) -> ml_collections.ConfigDict:
    """Every number of a run.

    Args:
        name: ``'cifar10'`` or ``'cifar100'``.
        statistics: of which images mean and deviation images are normalised with.

    Returns:
        The configuration.
    """
    config = ml_collections.ConfigDict()
    config.name = name

    config.data = {
        'name': name,
        # Where TensorFlow Datasets has prepared it; else TFDS_DATA_DIR says.
        'data_dir': '',
        'cache_dir': '',
        # 0: all. The recipe trains on all 50,000 and so can but report what was best
        # on the test examples; choose settings with 5000 for validation instead.
        'train': 0,
        'validation': 0,
        'test': 0,
        'split_seed': 0,
        'statistics': statistics,
    }
    config.augmentation = {
        'padding': 4,
        'flip': True,
        'cutout': 16,
        'cutout_probability': 0.5,
    }
    config.label_noise = 0.0
    # 0.9 on the label, the rest spread evenly over the other classes.
    config.label_smoothing = 0.1

    config.model = 'resnet18'
    config.models = {
        'resnet18': {'width': 64, 'dtype': 'float32'},
        'resnet50': {'width': 64, 'dtype': 'float32'},
        'wide_resnet': {'depth': 28, 'width': 10, 'dtype': 'float32'},
        'pyramidnet': {'depth': 110, 'alpha': 270, 'width': 16, 'dtype': 'float32'},
        'mobilenet': {'width': 32, 'dtype': 'float32'},
        'vit': {'patch': 4, 'width': 192, 'depth': 6, 'heads': 3, 'dtype': 'float32'},
        'small_resnet': {'width': 16, 'blocks': 1, 'dtype': 'float32'},
    }

    # 2, 3, 4 or 8: train weights and activations of so few bits; 0: full precision.
    config.quantization = {'bits': 0}
    # The workdir of a finished run whose network is trained on; {method} and {seed} in
    # it stand for those of the run. Empty: from random weights.
    config.init_from = ''

    config.method = 'vsam'
    config.methods = {
        'sgd': {},
        'sam': {'rho': 0.05},
        # Radii of ASAM are not comparable with those of the others.
        'asam': {'rho': 0.5, 'eta': 0.01},
        'looksam': {'rho': 0.05, 'every': 5, 'gain': 0.7},
        'esam': {'rho': 0.05, 'beta': 0.6, 'gamma': 0.5, 'seed': 0},
        'saf': {'weight': 0.3, 'temperature': 5.0, 'lag': 3, 'start': 5},
        'vsam': {
            'rho': 0.05,
            'window': 50,
            'segments': 5,
            # Three epochs; to be changed along with the batch size.
            'warmup_steps': 3 * _STEPS_PER_EPOCH,
            'norm_gain': 0.13,
            'variance_gain': 0.13,
            'decay': 0.7,
            'reuse_steps': 6,
            'max_rate': 0.8,
            # Statistics are taken over the last ten tensors of the network.
            'stats_tensors': 10,
            'seed': 0,
        },
        'steady_vsam': {'rho': 0.05, 'every': 3, 'tolerance': 0.3},
        'lean_sam': {'rho': 0.05, 'share': 1 / 4, 'every': 3, 'tolerance': 0.5},
        'gsam': {'rho': 0.05, 'alpha': 0.1},
        'wsam': {'rho': 0.05, 'gamma': 0.9},
        'fsam': {'rho': 0.05, 'sigma': 1.0, 'decay': 0.6},
        'vasso': {'rho': 0.05, 'theta': 0.4},
        'asyncsam': {'rho': 0.05},
        'aesam': {'rho': 0.05, 'delta': 0.9, 'lambda1': -1.0, 'lambda2': 1.0},
        'msam': {'rho': 0.3},
    }
    config.optimizer = {
        'learning_rate': 0.05,
        'momentum': 0.9,
        'nesterov': False,
        'weight_decay': 1e-3,
    }

    config.epochs = 200
    config.batch_size = 128
    config.seed = 0
    config.dispatch = 'planned'
    # In epochs.
    config.log_every = 1
    config.eval_every = 1
    config.checkpoint_every = 1
    config.checkpoint_keep = 1

    config.compare = {
        # Costs are relative to the first.
        'methods': ('sgd', 'sam', 'looksam', 'esam', 'saf', 'vsam', 'steady_vsam'),
        'seeds': (0, 1, 2),
        'timing_rounds': 30,
        'timing_steps': 20,
    }
    rhos = (0.025, 0.05, 0.1, 0.2, 0.4)
    config.tune = {
        'seeds': (100,),
        # None are tried with further seeds.
        'finalists': 0,
        'final_seeds': (),
        # The method, the field that is tuned, its values, and what changes with it.
        'grid': (
            ('sgd', 'optimizer.learning_rate', (0.025, 0.05, 0.1), {}),
            *(
                (method, f'methods.{method}.rho', rhos, {})
                for method in ('sam', 'looksam', 'esam', 'vsam', 'steady_vsam')
            ),
            ('saf', 'methods.saf.weight', (0.1, 0.3, 1.0), {}),
        ),
    }
    return config
