"""What the networks have in common: how a layer computes and starts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def conv(
    features: int,
    size: int = 3,
    stride: int = 1,
    dtype: Any = None,
    groups: int = 1,
) -> nn.Conv:
    """A convolution without bias, because a normalisation follows."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        # The same on both sides; 'SAME' pads one side alone where the stride is 2.
        padding=[(size // 2, size // 2)] * 2,
        feature_group_count=groups,
        use_bias=False,
        dtype=dtype,
        kernel_init=_conv_init,
    )


def norm(train: bool, dtype: Any = None, **kwargs: Any) -> nn.BatchNorm:
    """A BatchNorm; flax takes its mean and variance in float32 in any dtype."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, dtype=dtype, **kwargs
    )


def logits(x: jax.Array, num_classes: int) -> jax.Array:
    """The classifier, inside of a compact method: pooled and dense, in float32."""
    x = x.mean(axis=tuple(range(1, x.ndim - 1)), dtype=jnp.float32)
    return nn.Dense(num_classes, dtype=jnp.float32)(x)
