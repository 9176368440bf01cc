"""The one progress bar: shown on a terminal; silent in a pipe and on all processes but rank 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from ._distributed import is_first

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")


def progress(
    items: Iterable[T], unit: str, *, show: bool = True, total: int | None = None, initial: int = 0
) -> tqdm[T]:
    """The items, iterated with a bar, whose attribute `disable` is True where none is shown.

    Args:
        unit: what one item is, such as "step".
        total, initial: the number of items, with those that were done before and are not among `items`.
    """
    from tqdm import tqdm

    hidden = None if show and is_first() else True  # None: a bar on a terminal only
    return tqdm(items, unit=unit, total=total, initial=initial, disable=hidden, leave=False)
