"""Finds what a built site would load from a network.

    python docs/_ext/offline.py build/docs

prints every such place and fails if there is one. Links that a reader follows are fine.
"""

import pathlib
import re
import sys
from collections.abc import Iterator
from html import parser

# What a browser loads by itself: attributes of elements, whatever the element but <a>.
_LOADED = ('src', 'srcset', 'poster', 'data', 'href', 'xlink:href', 'action')
_FOLLOWED = ('a', 'area')
# Links of a page's head that load nothing.
_NAMED = ('canonical', 'alternate', 'license', 'author', 'index', 'next', 'prev')
_EXTERNAL = re.compile(r'^\s*(?:[a-z][a-z+.-]*:)?//', re.IGNORECASE)
_IN_STYLE = re.compile(r'(?:url\(|@import)\s*[\'"]?\s*((?:[a-z]+:)?//[^\'")\s]+)', re.I)
# Addresses in scripts name licenses and the like; these load what they name.
_IN_SCRIPT = re.compile(
    r'(?:\bimport\b\s*\(?|\bfetch\(|importScripts\(|\.src\s*=|\.href\s*=)'
    r'\s*[\'"`]((?:https?:)?//[^\'"`]+)'
)


class _Page(parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = ''

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or '' for name, value in attrs}
        self._inside = tag if tag in ('script', 'style') else ''
        self.found += in_style(given.get('style', ''))
        if tag in _FOLLOWED or (tag == 'link' and given.get('rel') in _NAMED):
            return
        for name in _LOADED:
            # A srcset has several.
            self.found += filter(_EXTERNAL.match, given.get(name, '').split(','))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ''

    def handle_data(self, data: str) -> None:
        if self._inside == 'script':
            self.found += in_script(data)
        elif self._inside == 'style':
            self.found += in_style(data)


def in_page(text: str) -> list[str]:
    """The addresses that a page in HTML loads from elsewhere."""
    page = _Page()
    page.feed(text)
    return page.found


def in_style(text: str) -> list[str]:
    """The addresses that a style sheet loads from elsewhere."""
    return _IN_STYLE.findall(text)


def in_script(text: str) -> list[str]:
    """The addresses that a script plainly loads from elsewhere."""
    return _IN_SCRIPT.findall(text)


_READERS = {
    '.html': in_page,
    '.svg': in_page,
    '.css': in_style,
    '.js': in_script,
}


def external(site: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """What a site loads from elsewhere.

    Args:
        site: the folder of a built site.

    Yields:
        A file and an address in it.
    """
    for file in sorted(site.rglob('*')):
        if file.suffix in _READERS:
            for address in _READERS[file.suffix](file.read_text(encoding='utf-8')):
                yield file, address


def main() -> int:
    """Checks the folder that the command line names."""
    site = pathlib.Path(sys.argv[1])
    if not (site / 'index.html').exists():
        print(f'{site} holds no built site: there is no index.html.')
        return 1
    found = list(external(site))
    for file, address in found:
        print(f'{file}: loads {address}')
    pages = len(list(site.rglob('*.html')))
    print(f'{pages} pages load {len(found) or "nothing"} from elsewhere.')
    return int(bool(found))


if __name__ == '__main__':
    sys.exit(main())
