"""The one progress report: a bar on a terminal, a line now and then in a pipe, nothing on processes but rank 0."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from ._distributed import is_first

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
LINE_SECONDS = 30.0  # the least time between two lines, and before the first one
LINE = "{unit} {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left{postfix}"


class _Lines:
    """Standard error for a bar that is not on a terminal: each state of the bar becomes a line."""

    def write(self, text: str) -> None:
        if line := text.strip():  # tqdm erases with carriage returns and blanks
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    items: Iterable[T], unit: str, *, show: bool = True, total: int | None = None, initial: int = 0
) -> tqdm[T]:
    """The items, iterated with a bar on standard error.

    Where standard error is not a terminal, the bar is a plain line at most every 30 seconds, the first one after 30.

    Args:
        unit: what one item is, such as "step".
        show: whether to report; never on processes other than rank 0.
        total, initial: the number of items, with those that were done before and are not among `items`.
    """
    from tqdm import tqdm

    options: dict[str, Any] = {"unit": unit, "total": total, "initial": initial, "leave": False}
    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "bar_format": LINE, "mininterval": LINE_SECONDS, "delay": LINE_SECONDS}
    return tqdm(items, disable=not (show and is_first()), **options)
