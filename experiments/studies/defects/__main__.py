r"""Measures what public implementations compute beside what the authors' formulas give.

    python -m experiments.studies.defects \
        --output=experiments/studies/defects/results/defects.json

The table is written beside the output. A package that is not installed is left out.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence

from experiments.studies.defects import report
from experiments.studies.defects.finding import Finding

# A package, and what has to be installed for it.
PACKAGES = {
    'optax': ('optax', 'jax'),
    'pytorch_optimizer': ('pytorch_optimizer', 'torch'),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the arguments say."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--output', type=pathlib.Path, help='the JSON file')
    parser.add_argument(
        '--packages',
        type=lambda text: text.split(','),
        default=list(PACKAGES),
        help=f'separated by commas; there are {", ".join(PACKAGES)}',
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.packages if name not in PACKAGES]
    if unknown:
        parser.error(f'--packages: {", ".join(unknown)}: not {", ".join(PACKAGES)}')
    chosen = [name for name in options.packages if _is_installed(name)]

    versions = {'python': platform.python_version()}
    findings = []
    for name in options.packages:
        if name not in chosen:
            print(f'{name}: left out, {" or ".join(PACKAGES[name])} is not installed')
            continue
        for package in PACKAGES[name]:
            versions[package] = importlib.metadata.version(package)
        for finding in findings_of(name):
            print(finding.line(versions[name]))
            findings.append(finding)

    command = shlex.join(['python', '-m', 'experiments.studies.defects', *arguments])
    content = report.content_of(findings, versions, command)
    if options.output:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        options.output.write_text(f'{text}\n')
        options.output.with_name('table.md').write_text(report.table(content))


def findings_of(package: str) -> list[Finding]:
    """What a package computes; imports it.

    Args:
        package: one of :data:`PACKAGES`.

    Returns:
        The measured numbers.
    """
    # One of them may not be installed.
    if package == 'optax':
        from experiments.studies.defects import optax_ as module
    else:
        from experiments.studies.defects import pytorch_optimizer_ as module

    return module.findings()


def _is_installed(package: str) -> bool:
    return all(map(importlib.util.find_spec, PACKAGES[package]))


if __name__ == '__main__':
    main()
