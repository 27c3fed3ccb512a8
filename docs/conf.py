"""How Sphinx builds the documentation: `sphinx-build -W docs build/docs`; nothing is downloaded."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

from sidestep import __version__

project = "sidestep"
copyright = "the authors of sidestep, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"sidestep {__version__}"
html_copy_source = False
highlight_language = "none"

default_role = "py:obj"  # `Plan.run` in a docstring: a link where there is one, else code
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False
viewcode_line_numbers = True

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$")
_COLON = "\uf03a"  # of the private use area
_ABOVE = re.compile(r"\]\(((?:\.\./)+(?:README|CONTRIBUTING|CHANGELOG)\.md)\)")


def mark_formulae(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """Docstrings indent formulae and code, without the `::` that makes a literal block of it."""
    marked: list[str] = []
    last, indent = "", 0  # the last line of text, and how far it is indented
    for line in lines:
        here = len(line) - len(line.lstrip())
        if line.strip():
            begins = here > indent and marked and not marked[-1].strip()
            if begins and last and not last.endswith("::") and not _SECTION.match(last):
                marked += [" " * indent + "::", ""]
                last = "::"
            if not (last.endswith("::") and here > indent):
                last, indent = line.strip(), here
        marked.append(line)
    if what in ("attribute", "property"):  # napoleon takes what stands before a colon for the type
        marked[:1] = [line.replace(":", _COLON) for line in marked[:1]]
    lines[:] = marked


def put_colons_back(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """After napoleon."""
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def offer_above(app: Sphinx, docname: str, content: list[str]) -> None:
    """Pages above this folder are no pages of the site: as source files are, they are offered."""
    content[0] = _ABOVE.sub(r"](path:\1)", content[0])


def setup(app: Sphinx) -> None:
    """Around napoleon, whose priority is 500, and before the pages are read."""
    app.connect("autodoc-process-docstring", mark_formulae, priority=400)
    app.connect("autodoc-process-docstring", put_colons_back, priority=600)
    app.connect("source-read", offer_above)
