"""Run the python blocks of a page, in order, in one namespace, in a temporary directory.

A text block directly after a python block states what it must print. The traceback of an exception shows the
page's name and line. Example: python docs/run_blocks.py README.md docs/sdes.md
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NEEDS = re.compile(r"<!-- needs: (?P<module>\w+) -->")
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n?^```text\n(?P<out>.*?)^```\n)?", re.M | re.S)
DOCS = Path(__file__).parent
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("*/*.md"))]
PAGES = [page for page in PAGES if page.parent.name[0] != "_"]


def blocks(page: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line, code, expected output or None) of each python block."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        yield text[: found.start("code")].count("\n"), found["code"], found["out"]


def missing(page: Path) -> str | None:
    """The package that a page declares as needed, if it is not installed; else None."""
    needed = NEEDS.match(page.read_text())
    return needed["module"] if needed and importlib.util.find_spec(needed["module"]) is None else None


def run(page: Path) -> int:
    """Run a page; returns the number of its blocks.

    Raises:
        ValueError: a block prints something else than the page shows.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    ran, home = 0, os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for line, code, expected in blocks(page):
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    # empty lines in front give the traceback the line numbers of the page
                    exec(compile("\n" * line + code, str(page), "exec"), names)
                if expected is not None and _plain(printed.getvalue()) != _plain(expected):
                    raise ValueError(
                        f"{page.name}, line {line}: the block prints\n{printed.getvalue()}\nnot\n{expected}"
                    )
                ran += 1
        finally:
            os.chdir(home)
    return ran


def _plain(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)  # tensors are small: more threads only wait for each other
    for name in sys.argv[1:] or PAGES:
        page = Path(name).resolve()
        print(f"{name}: " + (f"needs {missing(page)}" if missing(page) else f"{run(page)} blocks"))
