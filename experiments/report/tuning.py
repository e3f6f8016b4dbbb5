"""What tuning chose, and the table of what it tried."""

import json
import os
import pathlib
from typing import Any

from experiments.common import configuration
from experiments.methods.titles import title
from experiments.report import tables

TUNING = 'tuning.json'


def load_chosen(file: str | os.PathLike, name: str) -> dict[str, dict[str, Any]]:
    """What tuning chose for each method.

    Args:
        file: a ``tuning.json``.
        name: ``config.name`` of the runs that the settings are for.

    Returns:
        By method, dotted paths in the configuration and their values.

    Raises:
        ConfigError: if the file is none, or of another configuration.
    """
    try:
        tuning = json.loads(pathlib.Path(file).read_text())
        tuned, chosen = tuning['name'], tuning['chosen']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise configuration.ConfigError(
            f'tuning must be a file of experiments.tune, got {str(file)!r}: {error!r}.'
        ) from error
    if tuned != name:
        raise configuration.ConfigError(
            f'tuning must be of {name!r}, but {file} is of {tuned!r}.'
        )
    return chosen


def rows_of(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of what was tried."""
    rows = [
        [
            title(method, summary['config']['methods'][method]),
            # The last part of a path is what tells settings apart.
            ', '.join(
                f'{key.rsplit(".", 1)[-1]} {value}'
                for key, value in trial['settings'].items()
            ),
            tables.percent(trial['validation_accuracy']),
            str(len(trial['validation_accuracy']['values'])),
            f'{trial["sampling_rate"]:.2f}',
            'chosen' if trial['settings'] == summary['chosen'][method] else '',
        ]
        for method, trials in summary['tried'].items()
        for trial in trials
    ]
    return ['Method', 'Settings', 'Validation, %', 'Seeds', 'Sampled', ''], rows
