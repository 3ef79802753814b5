"""Sphinx: pages in Markdown (MyST), the reference from docstrings, the theme Furo."""

import re

from laminar._version import __version__

project = "laminar"
author = "the laminar maintainers"
copyright = "the laminar maintainers"
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_parser",
]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_title = f"laminar {release}"
html_show_sphinx = False
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

_LITERAL = re.compile(r"(``[^`]*``|`[^`]*`)")


def _escape_bars(app, what, name, obj, options, lines):
    """Keep the bars of |det J| and the stars of *batch from being read as markup."""
    block = None  # indentation of the line that opened a literal block
    for n, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indent <= block:
            block = None
        if block is None and not line.lstrip().startswith((">>>", "...", "..", ":")):
            parts = _LITERAL.split(line)
            parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
            lines[n] = "".join(parts)
        if block is None and line.rstrip().endswith("::"):
            block = indent


def setup(app):
    """Install the hook above."""
    app.connect("autodoc-process-docstring", _escape_bars, priority=900)
