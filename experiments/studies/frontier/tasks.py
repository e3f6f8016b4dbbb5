"""The tasks, and what settings are looked for among."""

from typing import Any

from experiments.configs import cifar100_small, digits_tasks, right_labels
from experiments.studies.frontier.task import Task

_MLP: Any = {
    'radii': (0.5, 0.7, 1.0, 1.4, 2.0),
    'rates': (0.007, 0.02, 0.06),
    'sgd_rates': (0.0003, 0.001, 0.003, 0.01, 0.03),
    # A part of an eighth must be possible; an epoch has ten steps as with 100.
    'changes': (('batch_size', 96),),
}
_ADAMW: Any = {
    'radii': (0.05, 0.1, 0.2, 0.4, 0.8),
    'rates': (1e-3, 3e-3, 1e-2),
    'sgd_rates': (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
# Loss against the rate has a narrow valley on text.
_TEXT: Any = {
    'radii': _ADAMW['radii'],
    'rates': (1e-3, 3e-3, 6e-3),
    'sgd_rates': (3e-4, 6e-4, 1e-3, 2e-3, 4e-3),
    'judge': 'loss',
}
_CLEAN: Any = {
    'radii': (0.05, 0.1, 0.2, 0.4, 0.8),
    'rates': (0.03, 0.1, 0.3),
    'sgd_rates': (0.01, 0.03, 0.1, 0.3, 1.0),
}

# Wrong labels, but for the second.
NOISY = {
    'mlp_200': Task(
        'digits, MLP, 200 steps',
        digits_tasks,
        'mlp_200',
        'short',
        radii=(0.25, 0.5, 0.7, 1.0, 1.4),
        rates=(0.02, 0.06, 0.2),
        sgd_rates=(0.001, 0.003, 0.01, 0.03, 0.1),
        changes=_MLP['changes'],
    ),
    'clean_600': Task(
        'digits, MLP, 600 steps, right labels',
        digits_tasks,
        'clean_600',
        'short',
        radii=(0.06, 0.12, 0.25, 0.5, 1.0),
        rates=(0.03, 0.1, 0.3),
        sgd_rates=(0.01, 0.03, 0.1, 0.3, 1.0),
        changes=_MLP['changes'],
    ),
    'mlp_600': Task('digits, MLP, 600 steps', digits_tasks, 'mlp_600', 'short', **_MLP),
    'mlp_2000': Task(
        'digits, MLP, 2,000 steps', digits_tasks, 'mlp_2000', 'middle', **_MLP
    ),
    'cnn_600': Task(
        'digits, CNN, 600 steps',
        digits_tasks,
        'cnn_600',
        'middle',
        radii=_MLP['radii'],
        rates=(0.02, 0.06, 0.2),
        sgd_rates=(0.001, 0.003, 0.01, 0.03, 0.1),
        changes=_MLP['changes'],
    ),
    'vit_600': Task(
        'digits, ViT, AdamW, 600 steps',
        digits_tasks,
        'vit_600',
        'middle',
        changes=_MLP['changes'],
        **_ADAMW,
    ),
    'mlp_20000': Task(
        'digits, MLP, 20,000 steps',
        digits_tasks,
        'mlp_20000',
        'long',
        radii=(0.7, 1.0, 1.4, 2.0, 2.8),
        rates=(0.003, 0.01),
        sgd_rates=(0.0001, 0.0003, 0.001, 0.003, 0.01),
        changes=_MLP['changes'],
    ),
    'cifar': Task(
        'CIFAR-100, small ResNet, 1,560 steps',
        cifar100_small,
        'noisy',
        'long',
        radii=(0.1, 0.15, 0.2, 0.3, 0.4),
        rates=(0.1, 0.2),
        sgd_rates=(0.002, 0.005, 0.01, 0.03, 0.1),
        changes=_MLP['changes'],
    ),
}

# Right labels: what SAM gains on them is looked at first (.look).
CANDIDATES = {
    'vit_192': Task(
        '192 digits, ViT, AdamW', right_labels, 'vit_192', 'middle', **_ADAMW
    ),
    'vit_480': Task(
        '480 digits, ViT, AdamW', right_labels, 'vit_480', 'middle', **_ADAMW
    ),
    'cnn_96': Task('96 digits, CNN', right_labels, 'cnn_96', 'middle', **_CLEAN),
    'cnn_48': Task('48 digits, CNN', right_labels, 'cnn_48', 'middle', **_CLEAN),
    'vit_96': Task('96 digits, ViT, AdamW', right_labels, 'vit_96', 'middle', **_ADAMW),
    'cnn_192': Task('192 digits, CNN', right_labels, 'cnn_192', 'middle', **_CLEAN),
    'cnn_480': Task('480 digits, CNN', right_labels, 'cnn_480', 'middle', **_CLEAN),
    'mlp_96': Task('96 digits, MLP', right_labels, 'mlp_96', 'short', **_CLEAN),
    'cifar_2000': Task(
        'CIFAR-100, 2,000 images, small ResNet',
        cifar100_small,
        'few',
        'long',
        radii=(0.05, 0.1, 0.2, 0.3, 0.4),
        rates=(0.1, 0.2),
        sgd_rates=(0.02, 0.05, 0.1, 0.2, 0.4),
        changes=(('data.train', 2000), ('batch_size', 96), ('epochs', 40)),
    ),
    'cifar_5000': Task(
        'CIFAR-100, 5,000 images, small ResNet',
        cifar100_small,
        'few',
        'long',
        radii=(0.05, 0.1, 0.2, 0.3, 0.4),
        rates=(0.1, 0.2),
        sgd_rates=(0.02, 0.05, 0.1, 0.2, 0.4),
        changes=(('batch_size', 96),),
    ),
    'plain_1000': Task(
        'CIFAR-100, 1,000 images, not augmented',
        cifar100_small,
        'noisy',
        'middle',
        radii=(0.05, 0.1, 0.2, 0.4, 0.8),
        rates=(0.05, 0.1, 0.2),
        sgd_rates=(0.02, 0.05, 0.1, 0.2, 0.4),
        # A quick network, which learns them by heart.
        changes=(
            ('label_noise', 0.0),
            ('data.train', 1000),
            ('models.small_resnet.stem_stride', 4),
            ('batch_size', 96),
            ('epochs', 40),
        ),
    ),
    **{
        f'bytes_{size}k': Task(
            f'Python, {size} kB, small transformer, AdamW',
            right_labels,
            f'bytes_{size}k',
            'long',
            **_TEXT,
        )
        for size in (8, 16, 32)
    },
    'bytes_256': Task(
        'Python, 32 kB, transformer, AdamW',
        right_labels,
        'bytes_256',
        'long',
        judge='loss',
        **_ADAMW,
    ),
    'bytes_1024': Task(
        'Python, 128 kB, transformer, AdamW',
        right_labels,
        'bytes_1024',
        'long',
        judge='loss',
        **_ADAMW,
    ),
}
TASKS = {**NOISY, **CANDIDATES}
# Of right labels those that SAM looked better on; the CNN on 48 digits and the texts
# were added to the plan later. All methods on the texts would exceed its limit.
_LATER = ('cnn_48', 'bytes_8k', 'bytes_16k')
CHOSEN: tuple[str, ...] = (*NOISY, 'vit_192', 'vit_480', 'cnn_96', *_LATER)
