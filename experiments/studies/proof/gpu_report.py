"""Tables of what was measured on an accelerator, from the lines of its file alone."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.benchmark import report, variants
from experiments.common import files
from experiments.common.ledger import Ledger
from experiments.methods.compared import METHODS
from experiments.report import provenance, tables
from experiments.studies.proof import protocol
from experiments.studies.proof.tasks import ON_GPU

STEPS, RUNS = 'gpu_steps.md', 'gpu_runs.md'
THIRD = 'every 3rd step of vSAM sampled (sum of its steps)'
# A slice pays if it makes the step so much faster.
PAYS = 0.02


def write(folder: pathlib.Path) -> None:
    """Writes the tables.

    Args:
        folder: where ``gpu.jsonl`` is.
    """
    ledger = Ledger(folder / 'gpu.jsonl')
    for name, text in ((STEPS, of_steps(ledger)), (RUNS, of_runs(ledger))):
        with files.replacing(folder / name) as file:
            file.write(text.encode())
        print(f'written to {folder / name}')


def of_steps(ledger: Iterable[Mapping[str, Any]]) -> str:
    """The table of steps, a network per column, and what is to be said of it."""
    lines = _of_kind(ledger, 'steps')
    if not lines:
        return 'Nothing was timed yet.\n'
    contents = [{'problems': {line['key']: _as_column(line)}} for line in lines]
    text = tables.markdown(*report.overview(contents))
    for line in lines:
        pays = smallest_that_pays(line['steps'])
        said = 'no slices were timed'
        if pays == 1:
            said = 'no sampled step with a slice is faster than SAM’s'
        elif pays is not None:
            said = f'the smallest slice that still saves time is 1/{1 / pays:.0f}'
        without = f' (without PyTorch: {line["no_torch"]})' if line['no_torch'] else ''
        text += f'\n{line["title"]}: {said}{without}.'
    rounds = {row['rounds'] for line in lines for row in line['steps'].values()}
    return (
        f'{text}\n\nTime of a step as a multiple of the base optimizer of the same'
        f' library: median (quartiles) over {" or ".join(map(str, sorted(rounds)))}'
        f' interleaved rounds; –: not timed. {provenance.made_on(lines)}\n'
    )


def of_runs(ledger: Iterable[Mapping[str, Any]]) -> str:
    """The table of the runs, a method per row, and what failed."""
    header = ['ResNet-18', 'ρ', 'Seeds', 'Test, %', 'Best, %', 'NLL', 'ECE, %']
    header += ['Fitted, %']
    ledger = list(ledger)
    lines = _of_kind(ledger, 'run')
    rows = []
    for entry, (method, _) in ON_GPU.items():
        own = [line for line in lines if line['entry'] == entry]
        if not own:
            continue
        rows.append(
            [
                METHODS[method].title,
                f'{own[0]["rho"]:g}' if own[0]['rho'] else '–',
                str(len(own)),
                protocol.percent(own, 'last', 'test', 'accuracy'),
                protocol.percent(own, 'best', 'test', 'accuracy'),
                protocol.number(own, 'last', 'test', 'loss'),
                protocol.percent(own, 'last', 'test', 'calibration_error'),
                protocol.percent(own, 'fitted', 'accuracy'),
            ]
        )
    text = f'{tables.markdown(header, rows)}\n' if rows else 'Nothing was run yet.\n'
    failed = [f'- {x["key"]}: {x["error"]}\n' for x in ledger if 'error' in x]
    if failed:
        text += f'\nWhat failed:\n\n{"".join(failed)}'
    return (
        f'{text}Best: the epoch that is best on the images held back. Fitted: accuracy'
        ' on the training images as they are. NLL and ECE (expected calibration error):'
        f' of the test images after the last epoch. {provenance.made_on(lines)}\n'
    )


def smallest_that_pays(rows: Mapping[str, Any]) -> float | None:
    """The smallest slice whose step is faster than with any larger one, and than SAM's.

    Args:
        rows: of the steps, by title.

    Returns:
        The share; 1 if no slice pays, None where none was timed.
    """
    if variants.SAM not in rows:
        return None
    share, best = 1.0, rows[variants.SAM]['step_milliseconds']
    for smaller, title in variants.SLICES.items():
        taken = rows[title]['step_milliseconds']
        if taken <= (1 - PAYS) * best:
            share, best = smaller, taken
    return share


def _as_column(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line with its whole title, and with a row for a third of sampled steps."""
    steps = dict(line['steps'])
    if {variants.SAMPLED, variants.REUSE} <= set(steps):
        parts = (steps[variants.SAMPLED], steps[variants.REUSE])
        sampled, reuse = (row['times_base']['median'] for row in parts)
        steps[THIRD] = {'times_base': {'median': (sampled + 2 * reuse) / 3}}
    # Titles of columns end at the first comma.
    return {**line, 'steps': steps, 'title': line['title'].replace(',', '')}


def _of_kind(ledger: Iterable[Mapping[str, Any]], kind: str) -> list[Any]:
    return [x for x in ledger if x.get('kind') == kind and 'error' not in x]
