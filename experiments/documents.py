"""Writes the measured tables of the documents, so that none is typed by hand.

    python -m experiments.documents            # writes them
    python -m experiments.documents --check    # fails if one would change

Each table is a file of its own in docs/evidence/measured, which pages include. In
README.md, which code hosts show without includes, a table stands between
``<!-- begin: name -->`` and ``<!-- end: name -->``. A table is made from a result file
in ``experiments/results``, or is what the report of a study wrote.
"""

import argparse
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

from experiments.benchmark import report, variants
from experiments.report import tables
from experiments.report.provenance import device_of, on

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENTS = pathlib.Path(__file__).parent
README = ROOT / 'README.md'
PAGES = ROOT / 'docs' / 'evidence'
MEASURED = PAGES / 'measured'


def _comparison(folder: str) -> str:
    summary = _load(f'{folder}/compare.json')
    timed = {
        'command': summary['command'],
        'variables': summary['timing']['variables'],
    }
    seeds = len(summary['methods'][summary['baseline']]['seeds'])
    return (
        f'{tables.markdown(*tables.of_comparison(summary))}\n'
        f'{tables.markdown(*tables.of_differences(summary))}\n'
        f'{tables.FOOTNOTE}{tables.DIFFERENCES} Mean ± sd of'
        f' {seeds} seeds; {on(summary)}.'
        f' Command: {_commands(timed)}.\n'
    )


def _benchmark() -> str:
    # With PyTorch in the same process the transformer's times are not steady: what
    # JAX does was measured again without it.
    names = ('cpu', 'cpu_transformer', 'cpu_closely')
    contents = [_load(f'results/benchmark/{name}.json') for name in names]
    default, again, closely = contents
    return (
        f'{tables.markdown(*report.overview(contents))}\nTime of a step as a'
        ' multiple of the base optimizer of the same library: median (quartiles) over'
        f' interleaved rounds, {closely["rounds"]} for single steps in JAX,'
        f' {again["rounds"]} for the other ways in JAX on the ViT,'
        f' {default["rounds"]} for the rest; {device_of(default)},'
        f' {_versions(default)}. Commands: {_commands(*contents)}.\n'
    )


def _pages() -> str:
    names = ('small_pages', 'closely')
    small, huge = (_load(f'results/benchmark/cpu_{name}.json') for name in names)
    return (
        f'{tables.markdown(*report.of_pages(small, huge))}\nOne program after the'
        f' other: medians (quartiles) over {small["rounds"]} and {huge["rounds"]}'
        f' rounds; {device_of(small)}, {_versions(small)}. Commands:'
        f' {_commands(small, huge)}.\n'
    )


def _kept_memory() -> str:
    content = _load('results/benchmark/cpu_kept_memory.json')
    steps = content['problems']['mlp']['steps']
    cost = lambda name, to: tables.quartiles(steps[name][to])
    return (
        'There a sampled step of vSAM costs'
        f' {cost(variants.SAMPLED, "times_optax_sam")} × optax.contrib.sam, SAM that'
        f' stores the PSF {cost(variants.STORING, "times_optax_sam")} ×, a traced reuse'
        f' step {cost(variants.TRACED_REUSE, "times_base")} × SGD: medians (quartiles)'
        f' over {content["rounds"]} rounds; {device_of(content)}, {_versions(content)}.'
        f' Command: {_commands(content)}.\n'
    )


def _large() -> str:
    names = ('sweeps', 'sweeps_kept_memory')
    contents = [_load(f'results/benchmark/cpu_{name}.json') for name in names]
    largest = [content['sweeps']['parameters'][-1] for content in contents]
    shown = (
        variants.OPTAX_SAM,
        variants.STORING,
        variants.SAMPLED,
        variants.REUSE,
    )
    header = ['Step', '× SGD', 'with memory kept']
    rows = [
        [name, *(tables.quartiles(x['steps'][name]['times_base']) for x in largest)]
        for name in shown
    ]
    return (
        f'{tables.markdown(header, rows)}\nThe MLP of'
        f' {largest[0]["parameters"]:,} parameters, batch'
        f' {largest[0]["batch_size"]}: medians (quartiles) over'
        f' {contents[0]["rounds"]} rounds; {device_of(contents[0])},'
        f' {_versions(contents[0])}. Commands: {_commands(*contents)}.\n'
    )


def _whole_runs() -> str:
    content = _load('results/benchmark/cpu_runs.json')
    return (
        f'{tables.markdown(*report.of_runs(content["whole_runs"]))}\nThe parts cost'
        ' (1 + p (T_sampled / T_base − 1)) T_base a step, p the share of sampled steps.'
        f' Median (quartiles) over chunks of the run; {device_of(content)},'
        f' {_versions(content)}. Command: {_commands(content)}.\n'
    )


def _slices() -> str:
    content = _load('results/benchmark/cpu_slices.json')
    return (
        f'{tables.markdown(*report.of_runs(content["whole_runs"]))}\nTemporaries: those'
        ' of the sampled and of the reuse program. Median (quartiles) over chunks of'
        f' the run; {device_of(content)}, {_versions(content)}. Command:'
        f' {_commands(content)}.\n'
    )


def _driver() -> str:
    content = _load('results/benchmark/cpu_driver.json')
    taken = content['milliseconds']
    cost = lambda name: '{median:.2f} ({low:.2f}–{high:.2f}) ms'.format(**taken[name])
    return (
        f'For parameters of {content["leaves"]:,} arrays and as many of the PSF a call'
        f' of `jax.jit` takes {cost("jit")}, one of `PlannedStep`'
        f' {cost("planned")}, its identities of arrays looked at, and one with a state'
        ' that it did not make, whose memory is looked at too,'
        f' {cost("planned, a state from elsewhere")}: medians (quartiles) over'
        f' {content["rounds"]} rounds; {device_of(content)}, {_versions(content)}.'
        f' Command: {_commands(content)}.\n'
    )


def _commands(*contents: dict[str, Any]) -> str:
    given = (
        # The benchmark sets another one itself.
        [f'{k}={v}' for k, v in content['variables'].items() if k.startswith('GLIBC_')]
        for content in contents
    )
    return ', '.join(
        f'`{" ".join([*variables, content["command"]])}`'
        for variables, content in zip(given, contents, strict=True)
    )


def _versions(content: dict[str, Any]) -> str:
    shown = ('jax', 'torch', 'pytorch_optimizer')
    found = content['versions']
    return ', '.join(f'{name} {found[name]}' for name in shown if name in found)


def _of_study(file: str) -> str:
    """What a study has written for the documents."""
    return (EXPERIMENTS / 'studies' / file).read_text()


TABLES: dict[str, Callable[[], str]] = {
    'gains': lambda: _of_study('frontier/results/gains.md'),
    'frontier': lambda: _of_study('frontier/results/table.md'),
    'proof': lambda: _of_study('proof/results/table.md'),
    'gpu_steps': lambda: _of_study('proof/results/gpu_steps.md'),
    'gpu_runs': lambda: _of_study('proof/results/gpu_runs.md'),
    'digits': lambda: _comparison('results/digits'),
    'noisy': lambda: _comparison('results/cifar100_small/noisy'),
    'underfitted': lambda: _comparison('results/cifar100_small/underfitted'),
    'lsq4': lambda: _comparison('studies/quantization/results/digits/4'),
    'benchmark': _benchmark,
    'pages': _pages,
    'kept_memory': _kept_memory,
    'large': _large,
    'whole_runs': _whole_runs,
    'slices': _slices,
    'driver': _driver,
    'lsq_images': lambda: _comparison('studies/quantization/results/cifar100_small/4'),
    'controllers': lambda: _of_study('controllers/results/summary.md'),
    'noise': lambda: _of_study('noise/results/noise.md'),
    'defects': lambda: _of_study('defects/results/table.md'),
    'flatness': lambda: _of_study('flatness/results/noisy/table.md'),
    'lemma': lambda: _of_study('flatness/results/lemma1/lemma1.md'),
}


def _load(name: str) -> dict[str, Any]:
    return json.loads((EXPERIMENTS / name).read_text())


def documents() -> list[pathlib.Path]:
    """README.md and the pages that report what was measured; examples in them run."""
    first = [ROOT / 'docs' / name for name in ('index.md', 'limits.md')]
    return [README, *first, *sorted(PAGES.glob('*.md'))]


def made() -> dict[pathlib.Path, str]:
    """Every file that has a table, with the text that it should have."""
    files = {MEASURED / f'{name}.md': table(name, MEASURED) for name in TABLES}
    return {README: with_tables(README), **files}


def table(name: str, folder: pathlib.Path) -> str:
    """A table made anew.

    Args:
        name: of :data:`TABLES`.
        folder: where the file that it stands in lies; links start there.

    Returns:
        Markdown that ends with a newline.

    Raises:
        ValueError: if nothing makes it.
    """
    if name not in TABLES:
        raise ValueError(f'Table must be one of {list(TABLES)}, got {name!r}.')

    def link(match: re.Match[str]) -> str:
        return f']({os.path.relpath(ROOT / match[1], folder)}'

    # Tables are made with their links from the root.
    return re.sub(r'\]\(((?:docs|experiments)/[^)#]+)', link, TABLES[name]())


def with_tables(file: pathlib.Path) -> str:
    """The text of a document with every table between marks made anew.

    Args:
        file: the document.

    Returns:
        The text.

    Raises:
        ValueError: for a table that nothing makes.
    """

    def block(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        return f'{begin}\n{table(name, file.parent)}{end}'

    pattern = r'(<!-- begin: (\w+) -->)\n.*?(<!-- end: \2 -->)'
    return re.sub(pattern, block, file.read_text(), flags=re.DOTALL)


def main() -> int:
    """Writes or checks the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing')
    check = parser.parse_args().check
    outdated = []
    for file, text in made().items():
        if not file.exists() or text != file.read_text():
            outdated.append(file.name)
            if not check:
                file.parent.mkdir(exist_ok=True)
                file.write_text(text)
    if check:
        print('out of date: ' + ', '.join(outdated) if outdated else 'up to date')
    return int(check and bool(outdated))


if __name__ == '__main__':
    sys.exit(main())
