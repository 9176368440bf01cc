"""A path's own space-space area: drawn on fine cells, joined by Chen's relation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import _validation
from ..errors import InputError
from .increment import Increment
from .levy_area import METHODS, levy_area
from .levy_area import MOST as TERMS
from .path import BrownianPath
from .random_normals import mix

MOST = 1 << 28  # cells: their ends are held, eight bytes each


class AreaPath:
    """A `BrownianPath` whose increments carry A, for solvers of non-commutative noise.

    The span is cut into `cells` equal fine cells; each has an area of its own by `levy_area`, and
    A of a longer interval is their join, so that coarse and fine solves see one A, and A is
    additive as W is. Asked for an interval whose ends are not fine cells' ends, the cell is cut
    there, which changes A by the cell's own error.

    With method `"legendre"` (default) and a path that knows H, a cell's area is E[A | W, H], a
    function of the path alone; over n cells of total length h its error is h / sqrt(12 n).
    Where the method draws, the numbers are keyed by `seed` and the cell's first time.

    Args:
        path: where W, H and K come from; shape (..., m), channels last, best with levy="H".
        cells: how many fine cells; a power of two costs least (see `BrownianPath` on knots).
        method, terms: as in `levy_area`.

    Raises:
        InputError: cells below 1, or a path without channels.
    """

    area = True

    def __init__(
        self,
        path: BrownianPath,
        cells: int,
        method: str = "legendre",
        terms: int | None = None,
        seed: int = 0,
    ) -> None:
        _validation.check_instance("path", path, BrownianPath, "a BrownianPath, best with levy='H'")
        _validation.check_int("cells", cells, 1, MOST)
        _validation.check_choice("method", method, METHODS)
        _validation.check_int("terms", 1 if terms is None else terms, 1, TERMS)
        if not path.shape:
            raise InputError("path: got shape (), expected (..., m) with channels last.")
        self.path = path
        self.cells = cells
        self.seed: int = _validation.check_int("seed", seed, -math.inf)
        self.method = method
        self.terms: int | None = 1 if method == "legendre" and terms is None else terms
        self.shape: tuple[int, ...] = path.shape
        self.t0: float = path.t0
        self.t1: float = path.t1
        self.levy: str = path.levy
        self.dtype: torch.dtype = path.dtype
        self.device: torch.device = path.device
        self._fine = torch.linspace(path.t0, path.t1, cells + 1, dtype=torch.float64, device="cpu")

    def increment(self, ta: float, tb: float) -> Increment:
        """The path's increment over [ta, tb] with its A (..., m, m); errors as `BrownianPath`'s."""
        return next(self.increments([ta, tb]))

    def increments(self, grid: Tensor | Sequence[float]) -> Iterator[Increment]:
        """The n - 1 increments of `grid` with their A, in one pass over the fine cells."""
        times = _validation.check_numbers("grid", grid)
        if times.dim() != 1 or len(times) < 2:
            raise InputError(f"grid: got shape {tuple(times.shape)}, expected (n,) with n >= 2.")
        self.path.check(times)
        # Grid times within rounding of a fine cell's end are that end.
        near = (torch.searchsorted(self._fine, times) - 1).clamp(0, self.cells - 1)
        for side in (near, near + 1):
            close = (self._fine[side] - times).abs() <= 2.0**-23 * times.abs()
            times = torch.where(close, self._fine[side], times)
        inner = self._fine[(self._fine > times[0]) & (self._fine < times[-1])]
        merged = torch.unique(torch.cat([times, inner]))
        return self._join(set(times[1:].tolist()), merged)

    def _join(self, ends: set[float], merged: Tensor) -> Iterator[Increment]:
        joined: Increment | None = None
        places = self.path.places(merged[:-1])
        pieces = zip(self.path.increments(merged), merged[1:].tolist(), places, strict=True)
        for piece, end, place in pieces:
            area = levy_area(piece, self.method, mix(mix(self.seed) + place), terms=self.terms)
            whole = replace(piece, A=area)
            joined = whole if joined is None else joined.join(whole)
            if end in ends:
                yield joined
                joined = None
