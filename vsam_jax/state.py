"""The state of a sharpness-aware transformation."""

from typing import Any, NamedTuple

import jax

from vsam_jax.statistics import Rings


class VSAMState(NamedTuple):
    """Everything that a sharpness-aware transformation keeps between updates.

    All fields are arrays, trees of arrays or None; their structure, shapes and
    dtypes never change from update to update. *Statistics dtype* is float32, or
    the widest dtype of the parameters where that is wider.

    Attributes:
      step: int32 scalar, the number of updates made.
      position: int32 scalar in [0, K), which step of the plan comes next.
      plan: bool array [K], which steps of the current window are sampled. All
        True during warm-up. The last update of a window already leaves the plan
        of the next window here, so that a host can read it before that starts.
      budget: scalar in the statistics dtype, b; ⌊b⌋ steps of a window are
        sampled.
      psf: the latest usable PSF (projection of the second-order gradient onto
        the first-order one), a tree like the parameters in their dtypes or in
        ``psf_dtype``; zeros at first. None in methods that reuse nothing.
      age: int32 scalar, how many updates ago the PSF was sampled.
      rings: statistics of the last K samples, [K] each, in the statistics dtype;
        None in methods that use no statistics.
      grad_norm: scalar in the statistics dtype, ‖g‖ of the latest usable sample.
      psf_norm: the same of ‖s‖.
      sampled: bool scalar, whether the latest update took a second gradient.
      num_samples: int32 scalar, how many updates took a second gradient.
      num_rejected: int32 scalar, how many of those were not finite and were
        therefore neither kept nor counted in the statistics.
    """

    step: jax.Array
    position: jax.Array
    plan: jax.Array
    budget: jax.Array
    psf: Any
    age: jax.Array
    rings: Rings | None
    grad_norm: jax.Array
    psf_norm: jax.Array
    sampled: jax.Array
    num_samples: jax.Array
    num_rejected: jax.Array
