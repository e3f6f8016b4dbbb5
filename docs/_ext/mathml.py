"""Formulas as MathML, made when the site is built: no script and no font is loaded."""

import html
import itertools
import re
from xml.etree import ElementTree

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

_LOG = logging.getLogger(__name__)

# The converter takes letters beyond ASCII for variables. These are operators.
_OPERATORS = {
    '‖': r'\|',
    '∥': r'\|',
    '⟨': r'\langle ',
    '⟩': r'\rangle ',
    '⌊': r'\lfloor ',
    '⌋': r'\rfloor ',
    '⌈': r'\lceil ',
    '⌉': r'\rceil ',
    '≤': r'\le ',
    '≥': r'\ge ',
    '≠': r'\ne ',
    '≈': r'\approx ',
    '∼': r'\sim ',
    '∈': r'\in ',
    '∝': r'\propto ',
    '∇': r'\nabla ',
    '∂': r'\partial ',
    '⊥': r'\perp ',
    '·': r'\cdot ',
    '⊙': r'\odot ',
    '×': r'\times ',
    '±': r'\pm ',
    '→': r'\to ',
    '←': r'\leftarrow ',
    '…': r'\ldots ',
    '−': '-',
}
_OPERATOR = re.compile('|'.join(_OPERATORS))
# Upright words are one word, not a row of variables.
_WORD = re.compile(r'\\(?:mathrm\{([A-Za-z]+)\}|(arg)\b)')
_COMMAND = re.compile(r'\\[A-Za-z]+')
_NAMESPACE = 'http://www.w3.org/1998/Math/MathML'
_MI, _MO, _MROW, _MSPACE, _MSUB, _MUNDER = (
    f'{{{_NAMESPACE}}}{tag}' for tag in ('mi', 'mo', 'mrow', 'mspace', 'msub', 'munder')
)
# The converter takes these for variables.
_FENCES = '⌊⌋⌈⌉⟨⟩‖'
# What stands under them on a line of their own.
_WITH_LIMITS = ('min', 'max', 'inf', 'sup', 'lim', 'argmin', 'argmax')

ElementTree.register_namespace('', _NAMESPACE)


def mathml(latex: str, *, display: bool) -> str:
    r"""A formula as MathML.

    Args:
        latex: the formula; letters and operators may be written as they are, such as
            ``ρ`` and ``≤``. Several lines are separated by ``\\`` and aligned at
            ``&``.
        display: whether it stands on lines of its own.

    Returns:
        The element ``math``.

    Raises:
        ValueError: if the formula cannot be converted, or a command is not known.
    """
    text = _OPERATOR.sub(lambda found: _OPERATORS[found[0]], latex.strip())
    text = _WORD.sub(lambda found: rf'\operatorname{{{found[1] or found[2]}}}', text)
    text = text.replace('{aligned}', '{split}')
    if display and (r'\\' in text or '&' in text) and not text.startswith(r'\begin'):
        text = rf'\begin{{split}}{text}\end{{split}}'
    try:
        made = latex2mathml.converter.convert(
            text, display='block' if display else 'inline'
        )
        formula = ElementTree.fromstring(made)
    except Exception as error:
        raise ValueError(f'Formula is not understood: {latex!r}: {error!r}.') from None
    if unknown := _COMMAND.findall(' '.join(formula.itertext())):
        raise ValueError(f'Formula has unknown commands {unknown}: {latex!r}.')
    _mend(formula, display=display)
    return ElementTree.tostring(formula, encoding='unicode')


def _mend(formula: ElementTree.Element, *, display: bool) -> None:
    """Tells operators from variables, and gives them the space that TeX gives them."""
    for element in formula.iter():
        text = element.text or ''
        if element.tag == _MI and text and text in _FENCES:
            element.tag = _MO
            element.attrib.update(stretchy='false', lspace='0', rspace='0')
        elif element.tag == _MO and len(text) > 1 and text.isalpha():
            element.tag = _MI
        elif display and element.tag == _MSUB and element[0].text in _WITH_LIMITS:
            element.tag = _MUNDER
    for element in list(formula.iter()):
        if element.tag != _MROW:
            continue
        children = list(element)
        for before, after in reversed(list(itertools.pairwise(children))):
            apart = _MO in (before.tag, after.tag) or _MSPACE in (before.tag, after.tag)
            if not apart and (_is_named(before) or _is_named(after)):
                space = ElementTree.Element(_MSPACE, width='0.167em')
                element.insert(children.index(after), space)


def _is_named(element: ElementTree.Element) -> bool:
    """Whether it is a function with a name, such as max, perhaps with a subscript."""
    if element.tag in (_MSUB, _MUNDER):
        element = element[0]
    return element.tag == _MI and len(element.text or '') > 1


def _made(node: nodes.math | nodes.math_block, *, display: bool) -> str:
    try:
        return mathml(node.astext(), display=display)
    except ValueError as error:
        _LOG.warning('%s', error, location=node, type='mathml')
        return html.escape(node.astext())


def _visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(_made(node, display=False))
    raise nodes.SkipNode


def _visit_display(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, 'div', CLASS='math-block'))
    self.body.append(_made(node, display=True))
    if number := node.get('number'):
        self.body.append(f'<span class="eqno">({number})')
        self.add_permalink_ref(node, 'Link to this equation')
        self.body.append('</span>')
    self.body.append('</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Offers the renderer ``mathml``."""
    app.add_html_math_renderer('mathml', (_visit_inline, None), (_visit_display, None))
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
