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

default_role = "code"
# Attributes of one name in two classes are not a mistake.
suppress_warnings = ["ref.python"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

_LITERAL = re.compile(r"(``[^`]*``|`[^`]*`)")
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|References|Example|Examples|Note|Yields):$")


def _plain_text_to_markup(app, what, name, obj, options, lines):
    """Let docstrings stay plain text: formulas and tables indented or barred as one reads them.

    An indented paragraph becomes a literal block, a fenced one code, a table of bars a list-table,
    and bars of ``|det J|`` elsewhere are kept from being read as substitutions. Runs before
    Napoleon.
    """
    done = []
    fenced = literal = False
    heading = ""  # the last line that was not indented
    table = []
    for line in [*lines, ""]:
        indent = line[: len(line) - len(line.lstrip())]
        if line.lstrip().startswith("```"):
            fenced = not fenced
            done += ["", f"{indent}.. code-block:: python", ""] if fenced else [""]
            continue
        if fenced:
            done.append(f"    {line}")
            continue
        if line.startswith("|"):
            table.append(line)
            continue
        if table:
            done += _list_table(table)
            table = []
        if line and not line.startswith(" "):
            heading, literal = line.strip(), False
        elif line.startswith("    ") and not literal:
            opens = not done or not done[-1].strip()
            if opens and not _SECTION.match(heading) and not heading.endswith("::"):
                done += ["::", ""]
                literal = True
        done.append(line if literal or heading.endswith("::") else _escape(line))
    lines[:] = done[:-1]


def _escape(line):
    parts = _LITERAL.split(line)
    parts[::2] = [part.replace("|", r"\|").replace("*", r"\*") for part in parts[::2]]
    return "".join(parts)


def _list_table(rows):
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    out = [".. list-table::", "   :header-rows: 1", ""]
    for row in [cells[0], *cells[2:]]:
        out += [f"   {'*' if not n else ' '} - {cell}" for n, cell in enumerate(row)]
    return [*out, ""]


def _files_to_download(app, page, source):
    """Links to files above this folder work in the repository; in the site they are downloads."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+)\)", r"](path:\1)", source[0])


def setup(app):
    """Install the hooks above."""
    app.connect("source-read", _files_to_download)
    app.connect("autodoc-process-docstring", _plain_text_to_markup, priority=400)
