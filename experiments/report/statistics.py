"""Numbers over seeds and rounds."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats


def summary(values: Iterable[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values themselves."""
    values = [float(value) for value in values]
    return {
        'mean': float(np.mean(values)),
        'sd': float(np.std(values, ddof=1)) if len(values) > 1 else None,
        'values': values,
    }


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Mean of the differences ``values − others``, and its 95 % interval (t).

    Args:
        values: numbers, one per seed.
        others: as many, of the same seeds.

    Returns:
        The mean, and ``low`` and ``high``, which are None for a single seed.
    """
    differences = np.subtract(values, others)
    number, mean = len(differences), float(np.mean(differences))
    if number < 2:
        return {'mean': mean, 'low': None, 'high': None}
    error = float(np.std(differences, ddof=1)) / math.sqrt(number)
    half = float(stats.t.ppf(0.975, number - 1)) * error
    return {'mean': mean, 'low': mean - half, 'high': mean + half}


def quartiles(values: Iterable[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = np.quantile(list(values), (0.25, 0.5, 0.75))
    return {'median': float(median), 'low': float(low), 'high': float(high)}


def band(values: Any) -> dict[str, list[float]]:
    """Mean and range over seeds, point by point; NaN where a seed has no value.

    Args:
        values: [seeds, points].

    Returns:
        ``mean``, ``low`` and ``high``, each [points].
    """
    values = np.asarray(values, float)
    values = np.where(np.isfinite(values).all(axis=0), values, np.nan)
    return {
        'mean': values.mean(axis=0).tolist(),
        'low': values.min(axis=0).tolist(),
        'high': values.max(axis=0).tolist(),
    }
