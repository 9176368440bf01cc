"""Sphinx configuration: `sphinx-build -q -W docs docs/_build/html`.

Building runs the examples of the pages first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import run_blocks  # noqa: E402
import torch  # noqa: E402

import fewstep  # noqa: E402

project = "fewstep"
author = copyright = "the fewstep authors"
version = release = fewstep.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
extensions += ["sphinx-mathjax-offline", "sphinx_copybutton"]  # MathJax in the site itself: no network is needed
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "figures"]
html_theme = "furo"
html_title = "fewstep"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["fewstep.css"]

default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"Tensor": "Tensor"}
python_use_unqualified_type_names = True
maximum_signature_line_length = 72
napoleon_use_ivar = True
napoleon_use_rtype = False


def escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape what reStructuredText would read as markup: docstrings are plain text with `code`."""
    for i, line in enumerate(lines):
        parts = line.split("`")
        if len(parts) % 2:  # outside backticks: the even ones
            parts[::2] = [p.replace("*", r"\*").replace("|", r"\|").replace("_ ", r"\_ ") for p in parts[::2]]
            lines[i] = "``".join(parts) if len(parts) > 1 and "``" not in line else "`".join(parts)


def prepare(app: Any) -> None:
    torch.set_num_threads(1)
    for page in run_blocks.PAGES:
        if run_blocks.missing(page) is None:
            run_blocks.run(page)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon
    app.connect("builder-inited", prepare)
