"""One file a study: a published experiment, or one of ours, that ends in a record.

A module with `run(out, *, budget, seed, device) -> lines to print` and its time in `TAKES` is a study of the
command line, under its name with dashes.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any


def names() -> dict[str, str]:
    """The studies that `fewstep study` can run, each with a line of what it is and how long it takes."""
    # read, not imported: one study's needs are none of another's
    texts = {f.stem.replace("_", "-"): f.read_text() for f in sorted(Path(__file__).parent.glob("*.py"))}
    trees = {name: ast.parse(text) for name, text in texts.items() if "\ndef run(" in text}
    return {name: f"{_summary(tree)} Takes {_takes(tree)}." for name, tree in trees.items()}


def _summary(tree: ast.Module) -> str:
    return " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())


def _takes(tree: ast.Module) -> str:
    """A study's TAKES: its rough time at budget paper, of one CPU core."""
    found = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    return str(ast.literal_eval(found["TAKES"]))


def load(name: str) -> Any:
    """The module of a study."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
