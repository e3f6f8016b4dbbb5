"""What the files of a release must agree on.

    python -m tests.release

compares version and date; with ``--next`` it prints what is left to do by hand. Both
are parts of ``make release``.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
_VERSION = r'(\d+\.\d+\.\d+)'
# Where the version stands, and the date, if it stands there too.
PLACES = {
    'vsam_jax/__init__.py': (rf"^__version__ = '{_VERSION}'$", None),
    'CHANGELOG.md': (rf'^## \[{_VERSION}\] - ', r'^## \[[\d.]+\] - (\S+)$'),
    'CITATION.cff': (rf'^version: {_VERSION}$', r'^date-released: (\S+)$'),
}


def found(root: pathlib.Path) -> dict[str, tuple[str | None, str | None]]:
    """The first version and the first date in each file; None where there is none."""
    values = {}
    for name, patterns in PLACES.items():
        text = (root / name).read_text()
        version, date = (
            match[1] if pattern and (match := re.search(pattern, text, re.M)) else None
            for pattern in patterns
        )
        values[name] = version, date
    return values


def disagreements(root: pathlib.Path) -> list[str]:
    """What keeps a tree from being released, a line each.

    Args:
        root: the root of the repository, or of a source distribution.
    """
    values = found(root)
    lines = []
    if len({version for version, _ in values.values()}) > 1 or None in {
        version for version, _ in values.values()
    }:
        said = ', '.join(f'{name}: {version}' for name, (version, _) in values.items())
        lines.append(f'the version must be the same everywhere: {said}')
    dates = {name: date for name, (_, date) in values.items() if PLACES[name][1]}
    iso = all(re.fullmatch(r'\d{4}-\d\d-\d\d', date or '') for date in dates.values())
    if not iso or len(set(dates.values())) > 1:
        said = ', '.join(f'{name}: {date}' for name, date in dates.items())
        lines.append(f'the date must be the same, as YYYY-MM-DD: {said}')
    if unreleased(root):
        lines.append(
            'CHANGELOG.md has entries under [Unreleased]: put them under the version'
        )
    return lines


def unreleased(root: pathlib.Path) -> str:
    """What stands under ``[Unreleased]`` in the changelog."""
    text = (root / 'CHANGELOG.md').read_text()
    match = re.search(r'^## \[Unreleased\]\n(.*?)(?=^## |\Z)', text, re.M | re.S)
    return match[1].strip() if match else ''


def main(arguments: list[str]) -> None:
    """Compares, or prints the next steps."""
    version = found(ROOT)['vsam_jax/__init__.py'][0]
    if arguments == ['--next']:
        print(
            f'\nvsam-jax {version} is built in dist/ and works. What is left:\n'
            f'  git tag -a v{version} -m "vsam-jax {version}" && git push --tags\n'
            '  .venv-release/bin/twine upload dist/*'
        )
        return
    lines = disagreements(ROOT)
    if lines:
        sys.exit('\n'.join(lines))
    print(f'{", ".join(PLACES)}: version {version}')


if __name__ == '__main__':
    main(sys.argv[1:])
