"""Plans of studies: how long all runs take, written down before any is made."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from experiments.common import configuration, files
from experiments.report import provenance, tables

PLAN = 'plan.json'
# Processes that make runs side by side, each on a core of its own.
CORES = 2


def total(core_hours: float, limit_hours: float) -> dict[str, Any]:
    """What every plan says besides its tasks.

    Args:
        core_hours: of all runs.
        limit_hours: how long they may take on :data:`CORES` cores.
    """
    return {
        'core_hours': core_hours,
        'cores': CORES,
        'hours': core_hours / CORES,
        'limit_hours': limit_hours,
        'command': provenance.command(),
        **provenance.environment(),
    }


def write(
    plan: Mapping[str, Any],
    folder: pathlib.Path,
    header: list[str],
    rows: list[list[str]],
    note: str,
) -> None:
    """Writes ``plan.json`` and ``plan.md``.

    Args:
        plan: the plan, with what :func:`total` gives.
        folder: where to.
        header: of the table.
        rows: of the table.
        note: a sentence on how seconds were measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / PLAN, plan)
    text = (
        f'{tables.markdown(header, rows)}\nOn {plan["cores"]} cores, a process each:'
        f' {plan["hours"]:.1f} hours (at most {plan["limit_hours"]:g}). {note} Command:'
        f' `{plan["command"]}`.\n'
    )
    with files.replacing(folder / 'plan.md') as file:
        file.write(text.encode())


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The plan in a folder.

    Raises:
        ConfigError: if there is none.
    """
    path = folder / PLAN
    if not path.exists():
        raise configuration.ConfigError(
            f'{folder} must hold {PLAN}; make it with --plan and look at it.'
        )
    return json.loads(path.read_text())


def check_length(
    plan: Mapping[str, Any], core_hours: float, way_out: str, over: bool = False
) -> None:
    """Raises ConfigError if what is wanted of a plan takes longer than is allowed.

    Args:
        plan: the plan.
        core_hours: what is wanted of it; ``plan['core_hours']`` for all.
        way_out: what makes it shorter.
        over: whether a longer one is allowed.
    """
    hours = core_hours / plan['cores']
    if hours > plan['limit_hours'] and not over:
        raise configuration.ConfigError(
            f'these runs take {hours:.1f} hours on {plan["cores"]} cores, more than'
            f' {plan["limit_hours"]:g}: {way_out}, or allow it with --over.'
        )


def share_out(
    names: Iterable[str], length: Callable[[str], float], count: int
) -> list[list[str]]:
    """Pieces of work for each of several processes, so that they take about as long.

    Args:
        names: the pieces.
        length: how long one takes.
        count: how many processes there are.

    Returns:
        ``count`` lists of names.

    Example:
        >>> share_out('abcd', {'a': 3, 'b': 2, 'c': 2, 'd': 1}.get, 2)
        [['a', 'd'], ['b', 'c']]
    """
    shares: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(names, key=length, reverse=True):
        least = min(shares, key=lambda share: sum(map(length, share)))
        least.append(name)
    return shares
