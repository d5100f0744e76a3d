"""Sphinx's configuration: `.ci/docs` builds these pages, without a network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from lightning_ema_nesterov.version import __version__

project = "lightning-ema-nesterov"
author = "The authors of lightning-ema-nesterov"
copyright = f"{date.today().year}, {author}"
release = version = __version__

extensions = [
    "myst_parser",
    "rooms",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["extending/**"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_url_schemes = ["http", "https", "mailto"]

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes in a list, not each twice
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # an overridden method is described where it is defined
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
maximum_signature_line_length = 80

# A reference in a docstring that leads nowhere is an error; types of other packages have no target.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:(class|obj|exc|data)", r"(?!lightning_ema_nesterov\.).*"),
    (r"py:class", r".*\._\w+"),  # bases of our own that are not public
]

html_theme = "furo"
html_title = f"lightning-ema-nesterov {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_dark_style = "github-dark"


def find_elsewhere(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Resolve a name that a base class, or a package further up, describes."""
    for target in _candidates(node):
        found: nodes.reference | None = env.domains["py"].resolve_xref(
            env, node["refdoc"], app.builder, node["reftype"], target, node, content
        )
        if found is not None:
            return found
    return None


def _candidates(node: pending_xref) -> Iterator[str]:
    name = node["reftarget"].rpartition(".")[2]
    module = node["reftarget"].rpartition(".")[0] or node.get("py:module") or ""
    if not module.startswith("lightning_ema_nesterov"):
        return
    if node.get("py:module") == module:
        owner: Any = getattr(import_module(module), node.get("py:class") or "", None)
        for base in getattr(owner, "__mro__", ()):
            yield f"{base.__module__}.{base.__qualname__}.{name}"
    while module:
        yield f"{module}.{name}"
        module = module.rpartition(".")[0]


def mend_remarks(app: Sphinx, doctree: nodes.document) -> None:
    """Set remarks apart from their equations, which ``split`` does not, and keep underscores."""
    for block in doctree.findall(nodes.math_block):
        text = block.astext().replace(r"&& \text", r"&& \qquad \text").replace(r"\_", "_")
        block.children = [nodes.Text(text)]


def setup(app: Sphinx) -> None:
    """Register what is above."""
    app.connect("doctree-read", mend_remarks)
    app.connect("missing-reference", find_elsewhere)
