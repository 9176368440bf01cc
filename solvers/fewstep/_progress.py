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
    """The items, iterated with a bar. Its attribute `disable` is True where there is none.

    Args:
        unit: what one item is, such as "step".
        show: False for no bar anywhere.
        total: the number of items, where they have no length or `initial` ones are not among them.
        initial: number of items done before.
    """
    from tqdm import tqdm

    # disable=None: a bar on a terminal only
    hidden = None if show and is_first() else True
    return tqdm(items, unit=unit, total=total, initial=initial, disable=hidden, leave=False)
