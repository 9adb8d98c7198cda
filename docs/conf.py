"""How Sphinx builds these pages: `sphinx-build -W docs build/site`."""

from typing import Any

import gradnorm_jax

project = "gradnorm_jax"
author = "The authors of gradnorm_jax"
version = release = gradnorm_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = "gradnorm_jax"
default_role = "code"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False


def setup(app: Any) -> None:
    """Leaves out what named tuples say of their fields; their docstrings say more."""

    def skip(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
        return True if str(member.__doc__).startswith("Alias for field number") else None

    app.connect("autodoc-skip-member", skip)
