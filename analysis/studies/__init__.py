"""One file a study: a published experiment, or one of ours, that ends in a record.

A module with `run(out, *, budget, seed, device) -> lines to print` is a study of the command line, under its
name with dashes.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any


def names() -> list[str]:
    """The studies that `fewstep study` can run."""
    # read, not imported: one study's needs are none of another's
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [f.stem.replace("_", "-") for f in files if "\ndef run(" in f.read_text()]


def load(name: str) -> Any:
    """The module of a study."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
