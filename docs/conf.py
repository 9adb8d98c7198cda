"""How Sphinx builds these pages: `sphinx-build -W docs build/site`."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import gradnorm_jax

project = "gradnorm_jax"
author = "The authors of gradnorm_jax"
version = release = gradnorm_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = "gradnorm_jax"
html_math_renderer = "mathml"
default_role = "code"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False


def show_formula(translator: Any, node: nodes.Element) -> None:
    """Writes a formula as MathML, which browsers show without a script from another host."""
    tex = re.sub(r"\\Big\b", r"\\Bigl", node.astext())  # docutils knows \Bigl and \Bigr alone
    translator.body.append(tex2mathml(tex, as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Shows formulas, and leaves out what named tuples say of their fields: docstrings say more."""
    app.add_html_math_renderer("mathml", (show_formula, None), (show_formula, None))

    def skip(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
        return True if str(member.__doc__).startswith("Alias for field number") else None

    app.connect("autodoc-skip-member", skip)
