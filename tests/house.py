"""Which module of the project imports which, read from the files."""

import ast
import functools
import pathlib
from collections.abc import Mapping


def modules(root: pathlib.Path, package: str) -> dict[str, pathlib.Path]:
    """The modules of a package by their dotted names.

    Args:
        root: the directory that the package lies in.
        package: its name.
    """
    found = {}
    for path in sorted((root / package).rglob('*.py')):
        parts = path.relative_to(root).with_suffix('').parts
        found['.'.join(part for part in parts if part != '__init__')] = path
    return found


def named(path: pathlib.Path, root: pathlib.Path) -> set[str]:
    """What a file names where it imports, at any depth: modules, or names in them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(root).parts[: -node.level]
            base = '.'.join((*(package if node.level else ()), *_parts(node.module)))
            # What is imported from a package may be a module of it.
            found |= {base, *(f'{base}.{alias.name}' for alias in node.names)}
    return found


def _parts(name: str | None) -> list[str]:
    return name.split('.') if name else []


def imports(root: pathlib.Path, package: str) -> dict[str, set[str]]:
    """For each module of a package the others that it imports.

    A package is none of them: it runs first whatever is imported from it.
    """
    there = modules(root, package)
    packages = {name for name, path in there.items() if path.stem == '__init__'}
    return {
        name: (named(path, root) & there.keys()) - packages - {name}
        for name, path in there.items()
    }


def levels(imported: Mapping[str, set[str]]) -> dict[str, int]:
    """The length of the longest chain of imports that begins with each module."""

    @functools.cache
    def level(name: str) -> int:
        return 1 + max(map(level, imported[name]), default=0)

    return {name: level(name) for name in imported}
