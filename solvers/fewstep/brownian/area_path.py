"""Space-space areas that belong to a path: drawn on fine cells, joined by Chen's relation."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _validation
from .._tracing import made_outside
from ..errors import InputError
from .increment import Increment, letters_for
from .levy_area import METHODS, MOST_TERMS, levy_area
from .path import BrownianPath
from .random_normals import mix
from .time_scale import DEPTH, rounding

MOST_CELLS = 1 << 28  # their ends are stored, eight bytes each


class AreaPath:
    """A `BrownianPath` whose increments carry A, for solvers of non-commutative noise.

    The span is cut into `cells` equal cells. Each has an area by `levy_area`, and A of a longer
    interval is their join, so coarse and fine solves see one A, which is additive like W. An
    interval that ends inside a cell cuts the cell, which changes A by the error of that cell.

    With method `"legendre"` (default) and a path with H, the area of a cell is E[A | W, H], a function of the path
    alone, with error h / sqrt(12 n) over n cells of total length h. The other methods draw normals keyed by `seed`
    and the first time of the cell.

    Args:
        path: the source of W, H and K, of shape (..., m) with channels last, preferably with levy="H".
        cells: number of cells; a power of two is cheapest (see `BrownianPath` on knots).
        method, terms: as in `levy_area`.

    Raises:
        InputError: cells below 1, or a path without channels.
    """

    area = True

    def __init__(
        self, path: BrownianPath, cells: int, method: str = "legendre", terms: int | None = None, seed: int = 0
    ) -> None:
        made_outside("path")
        _validation.check_instance("path", path, BrownianPath, "a BrownianPath, preferably with levy='H'")
        cells = _validation.check_int("cells", cells, 1, MOST_CELLS)
        _validation.check_choice("method", method, METHODS)
        terms = _validation.check_int_or_none("terms", terms, 1, MOST_TERMS)
        if not path.shape:
            raise InputError("path: got shape (), expected (..., m) with channels last, as of BrownianPath((m,)).")
        self.path: BrownianPath = path
        self.cells: int = cells
        self.method: str = method
        self.seed: int = _validation.check_seed(seed)
        self.terms: int | None = 1 if method == "legendre" and terms is None else terms
        self.shape: tuple[int, ...] = path.shape
        self.t0: float = path.t0
        self.t1: float = path.t1
        self.levy: str = path.levy
        self.dtype: torch.dtype = path.dtype
        self.device: torch.device = path.device
        self._fine = torch.linspace(path.t0, path.t1, cells + 1, dtype=torch.float64, device="cpu")

    def increment(self, ta: float | Tensor, tb: float | Tensor) -> Increment:
        """Return the path's increment over [ta, tb] with its A (..., m, m); raises as `BrownianPath` does."""
        both = _validation.check_times("ta, tb", [ta, tb])
        return next(self._increments(both, max(rounding(ta), rounding(tb))))

    def increments(self, grid: Tensor | Sequence[float]) -> Iterator[Increment]:
        """Return the n - 1 increments over the intervals of `grid` with their A, in one pass."""
        return self._increments(_validation.check_times("grid", grid), rounding(grid))

    def _increments(self, times: Tensor, eps: float) -> Iterator[Increment]:
        times = self.path.snapped(times, eps)  # raises for times outside the path
        # the ends of cells are no cuts of the path unless their number is a power of two
        near = (torch.searchsorted(self._fine, times) - 1).clamp(0, self.cells - 1)
        slack = eps * times.abs() + 2.0**-DEPTH * (self.t1 - self.t0)
        slack = slack.clamp(max=float(times.diff().min()) / 4)
        for side in (near, near + 1):
            close = (self._fine[side] - times).abs() <= slack
            times = torch.where(close, self._fine[side], times)
        inner = self._fine[(self._fine > times[0]) & (self._fine < times[-1])]
        merged = torch.unique(torch.cat([times, inner]))
        return self._join(set(times[1:].tolist()), merged)

    def snapped(self, times: Tensor, rounding: float) -> Tensor:
        """Return `BrownianPath.snapped` of the path."""
        return self.path.snapped(times, rounding)

    def _join(self, ends: set[float], merged: Tensor) -> Iterator[Increment]:
        joined: Increment | None = None
        positions = self.path.positions(merged[:-1])
        pieces = zip(self.path.increments(merged), merged[1:].tolist(), positions, strict=True)
        for piece, end, position in pieces:
            cell = replace(piece, A=levy_area(piece, self.method, mix(mix(self.seed) + position), terms=self.terms))
            joined = cell if joined is None else joined.join(cell)
            if end in ends:
                yield joined
                joined = None


def path_for(
    needs: Sequence[str], shape: Sequence[int], ends: tuple[float, float], cells: int, **options: Any
) -> BrownianPath | AreaPath:
    """A path over `ends` with what solvers need whose cards have these `levy`.

    Args:
        cells: of the `AreaPath`, where one of them needs A.
        options: of `BrownianPath`.
    """
    path = BrownianPath(shape, *ends, levy=letters_for(*needs), **options)
    return AreaPath(path, cells) if "A" in needs else path
