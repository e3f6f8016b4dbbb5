"""How Sphinx builds the site: ``make docs``."""

import hashlib
import importlib.metadata
import os
import pathlib
import sys

DOCS = pathlib.Path(__file__).parent
BUILD = DOCS.parent / 'build'
sys.path[:0] = [str(DOCS / '_ext')]

project = 'vsam-jax'
author = 'The vsam-jax authors'
copyright = author
release = version = importlib.metadata.version('vsam-jax')

extensions = [
    'mathml',
    'myst_nb',
    'number_cells',
    'sphinx.ext.autodoc',
    'sphinx.ext.autosummary',
    'sphinx.ext.napoleon',
    'sphinx_copybutton',
    'sphinx_design',
]
exclude_patterns = ['_ext', 'evidence/measured']
nitpicky = True
nitpick_ignore_regex = [
    # Of other packages: the site is built, and read, without a network.
    (r'py:.*', r'(chex|collections|flax|jax|numpy|optax|orbax)(\..*)?'),
]

# Pages and notebooks.
myst_enable_extensions = ['colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors = 4
nb_execution_mode = 'cache'
nb_execution_timeout = 300
# A failure is a warning, which `make docs` takes for an error after all have run.
nb_execution_raise_on_error = False
nb_execution_show_tb = True
nb_ipywidgets_js = {}
nb_merge_streams = True


def _what_notebooks_use() -> str:
    """A digest of this library and the versions of all others."""
    digest = hashlib.sha256()
    for package in ('vsam_jax', 'experiments'):
        for file in sorted((DOCS.parent / package).rglob('*.py')):
            digest.update(file.read_bytes())
    installed = importlib.metadata.distributions()
    digest.update(repr(sorted(f'{x.name} {x.version}' for x in installed)).encode())
    return digest.hexdigest()[:16]


# A notebook is run again where its code, this library or another package has changed.
nb_execution_cache_path = str(BUILD / 'notebooks' / _what_notebooks_use())
# Kernels inherit these. Nothing in a reader's own profile changes what they print.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(BUILD / 'jax_cache'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
os.environ['IPYTHONDIR'] = str(BUILD / 'ipython')
_PROFILE = BUILD / 'ipython' / 'profile_default'
_PROFILE.mkdir(parents=True, exist_ok=True)
# A kernel that nobody else can reach warns that it is not encrypted.
(_PROFILE / 'ipython_kernel_config.py').write_text('c.IPKernelApp.log_level = 40\n')

# The reference.
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
# Docstrings give shapes and dtypes, which annotations do not.
autodoc_typehints = 'none'
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 72
add_module_names = False
toc_object_entries_show_parents = 'hide'

# What readers see.
html_theme = 'furo'
html_title = 'vsam-jax'
html_math_renderer = 'mathml'
html_static_path = ['_static']
html_css_files = ['site.css']
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
copybutton_exclude = '.linenos, .gp, .go'
pygments_style = 'friendly'
pygments_dark_style = 'github-dark'
