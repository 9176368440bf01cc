"""One file a study: a published experiment, or one of ours, that ends in a record.

A module with `run(out, *, budget, seed, device) -> lines to print` is a study of the command line, under its
name with dashes.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any


def names() -> dict[str, str]:
    """The studies that `fewstep study` can run, each with a line of what it is."""
    # read, not imported: one study's needs are none of another's
    texts = {f.stem.replace("_", "-"): f.read_text() for f in sorted(Path(__file__).parent.glob("*.py"))}
    studies = {name: ast.get_docstring(ast.parse(s)) or "" for name, s in texts.items() if "\ndef run(" in s}
    return {name: " ".join(said.split("\n\n")[0].split()) for name, said in studies.items()}


def load(name: str) -> Any:
    """The module of a study."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
