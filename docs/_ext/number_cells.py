"""Marks the cells of tables that hold figures: a narrow page keeps them whole."""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

# A figure, perhaps with what is around it: 1.00 (0.95–1.07), +2.7 [+1.8, +3.5], 22 ± 1.
_FIGURE = re.compile(r'–|[+\-−]?\d[\d.,e+\-−–±/%×() \[\]]{0,30}')


class _Mark(SphinxTransform):
    default_priority = 800

    def apply(self) -> None:
        for cell in self.document.findall(nodes.entry):
            if _FIGURE.fullmatch(cell.astext().strip()):
                cell['classes'].append('number')


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the class ``number``."""
    app.add_transform(_Mark)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
