"""The clock of a path's tree: where intervals are cut, and the positions of times in the tree.

Positions are integers, so rounding cannot make two queries disagree about a cut. Knot i of the path
has position `i << bits`; between two knots the clock is linear or geometric.
"""

from __future__ import annotations

import bisect
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import _validation
from ..errors import InputError

DEPTH = 48  # times are resolved to 2^-48 of the span: in W 6e-8 sqrt(span), the rounding of float32
FEW = 19  # cuts to the nodes of times that may move a little: by 2^-20 of the clock's span at most
EDGE = 1e-6  # the relative distance by which levels in float32 may miss the ends of a path
EXACT = 2.0**-50  # the relative rounding of float64 times after a few operations


@dataclass(frozen=True)
class Clock:
    """A map between times and integer positions, geometric (`log`) or linear between two increasing knots."""

    knots: tuple[float, ...]
    log: bool

    @cached_property
    def bits(self) -> int:
        """2^bits positions lie between two knots; bits is at least 16."""
        return max(16, DEPTH - (len(self.knots) - 2).bit_length())

    @property
    def end(self) -> int:
        """The position of the last knot."""
        return (len(self.knots) - 1) << self.bits

    def cut(self, low: int, high: int) -> int:
        """The position at which an interval is cut: its middle knot, or halfway where there is none."""
        first, last = low >> self.bits, high >> self.bits
        if (first << self.bits) == low and (last << self.bits) == high and last - first > 1:
            return ((first + last) // 2) << self.bits
        return (low + high) // 2

    def within(self, low: int, high: int) -> bool:
        """Whether no knot lies strictly between two positions, so every cut halves the clock's interval."""
        return (high - 1) >> self.bits == low >> self.bits

    def deep(self, position: int) -> bool:
        """Whether a position takes more cuts between two knots than those of 2^24 equal steps."""
        return bool(position & ((1 << max(0, self.bits - 24)) - 1))

    def time(self, position: int) -> float:
        """The time of a position."""
        i, rest = position >> self.bits, position & ((1 << self.bits) - 1)
        if not rest:
            return self.knots[i]
        a, b = self.knots[i], self.knots[i + 1]
        u = rest / (1 << self.bits)
        return a * math.exp(u * _log_ratio(a, b)) if self.log else a + (b - a) * u

    def length(self, low: int, high: int) -> float:
        """Return time(high) - time(low), without cancellation between two knots."""
        if not self.within(low, high):
            return self.time(high) - self.time(low)
        i = low >> self.bits
        a, b = self.knots[i], self.knots[i + 1]
        w = (high - low) / (1 << self.bits)
        return self.time(low) * math.expm1(w * _log_ratio(a, b)) if self.log else (b - a) * w

    def shares(self, low: int, cut: int, high: int) -> tuple[float, float]:
        """The two parts' shares of the length; between two knots they depend on high - low alone."""
        if not self.within(low, high):
            full = self.length(low, high)
            return self.length(low, cut) / full, self.length(cut, high) / full
        if not self.log:
            return 0.5, 0.5
        i, w = low >> self.bits, (high - low) / (1 << self.bits)
        growth = math.exp(0.5 * w * _log_ratio(self.knots[i], self.knots[i + 1]))
        return 1 / (1 + growth), growth / (1 + growth)

    def positions(self, times: Tensor, rounding: float | Tensor = EXACT) -> array[int]:
        """The positions of increasing float64 `times` in a path.

        A time is moved to a knot or a cut of few bits if there is one within its relative `rounding`, so that
        `linspace(0, 0.3, 65)` finds the same cuts in float32 as in float64; else it gets the nearest position, within
        2^-49 of the span. Raises InputError for a time outside the path.
        """
        slack = times.abs() * rounding
        # adjacent ones in a dtype that barely resolves the span must stay apart
        gaps = torch.nn.functional.pad(times.diff(), (1, 1), value=math.inf)
        width = torch.minimum(slack, torch.minimum(gaps[:-1], gaps[1:]) / 4)
        out = array("q")
        for i in range(0, len(times), 4096):  # lists of all times would take more memory than the path
            parts = (v[i : i + 4096].tolist() for v in (times, slack, width))
            out.extend(map(self._position, *parts))
        return out

    def pair(self, ta: float, tb: float, rounding: tuple[float, float]) -> tuple[int, int]:
        """The `positions` of two times, given their relative rounding."""
        gap = (tb - ta) / 4
        slacks = abs(ta) * rounding[0], abs(tb) * rounding[1]
        first, last = (self._position(t, slack, min(slack, gap)) for t, slack in zip((ta, tb), slacks))
        return first, last

    def nodes(self, times: Tensor) -> list[int]:
        """Positions of at most `FEW` cuts nearest to increasing float64 `times`; exact ones where two would be one."""
        exact = self.positions(times, EDGE)
        drop = max(0, self.end.bit_length() - 1 - FEW)
        near = [(place + (1 << drop >> 1)) >> drop << drop for place in exact]
        shared = {a for a, b in pairwise(near) if a == b}
        return [place if node in shared else node for place, node in zip(exact, near)]

    def near(self, t: float, width: float) -> float:
        """The time within `width` of t, and within the path, that takes the fewest cuts."""
        i, u, wide = self._inside(min(max(t, self.knots[0]), self.knots[-1]), width)
        return self.time((i << self.bits) + _simplest(u, wide, 1 << self.bits))

    def _inside(self, t: float, width: float) -> tuple[int, float, float]:
        """The last knot not after t, t's place between it and the next one, and a width there, in positions."""
        i = min(max(bisect.bisect_right(self.knots, t) - 1, 0), len(self.knots) - 2)
        a, b, full = self.knots[i], self.knots[i + 1], 1 << self.bits
        if self.log:
            scale = full / _log_ratio(a, b)
            return i, _log_ratio(a, t) * scale, width / t * scale
        return i, (t - a) / (b - a) * full, width / (b - a) * full

    def _position(self, t: float, slack: float, width: float) -> int:
        first, last = self.knots[0], self.knots[-1]
        if not (first - slack <= t <= last + slack and math.isfinite(t)):
            cure = "Make the path with t0 and t1 that cover it."
            raise InputError(f"grid: got time {t!r}, expected one in the path's [{first!r}, {last!r}]. {cure}")
        if t <= first or t >= last:
            return 0 if t <= first else self.end
        full = 1 << self.bits
        i, u, width = self._inside(t, width)
        place = _simplest(u, width, full)
        if 0 < place < full and place & -place < 128 * width:
            place = _simplest(u, 0.5, full)  # the other has too many bits to be the time that was rounded
        return (i << self.bits) + place


def _log_ratio(a: float, b: float) -> float:
    """log(b/a), without cancellation where a and b are close."""
    x = (b - a) / a
    return math.log1p(x) if x < 2.0**-10 else math.log(b / a)


def rounding(times: Any) -> float:
    """The relative rounding of times: that of the dtype in which they are given, a few roundings of float64."""
    dtype = _validation.times_dtype(times)
    return max(EXACT, torch.finfo(dtype).eps) if dtype is not None else EXACT


def _simplest(u: float, width: float, full: int) -> int:
    """Return the integer within `width` of u at which the tree cuts first: an end, or the one with the fewest bits."""
    width = max(width, 0.5)
    low, high = math.ceil(u - width), math.floor(u + width)
    if low <= 0:
        return 0
    if high >= full:
        return full
    # truncate high after the first bit in which it differs from low - 1
    drop = ((low - 1) ^ high).bit_length() - 1
    return (high >> drop) << drop


def make_knots(t0: float, t1: float, knots: Tensor | Sequence[float] | None, log: bool) -> tuple[float, ...]:
    """Return the knots of a path over [t0, t1], including the ends."""
    t0, t1 = _validation.check_float("t0", t0), _validation.check_float("t1", t1)
    if not (t0 < t1 and math.isfinite(t1 - t0)):
        raise InputError(f"t0, t1: got {t0!r} and {t1!r}, expected finite times with t0 < t1.")
    if log and t0 <= 0:
        raise InputError(
            f"t0: got {t0!r} with clock='log', expected t0 > 0. Start at the first time above 0 and "
            "draw the interval before it with FreshIncrements, or use clock='linear'."
        )
    if knots is None:
        return (t0, t1)
    given = _validation.check_numbers("knots", knots)
    if given.dim() != 1 or not bool(given.isfinite().all()) or not bool((given.diff() > 0).all()):
        some = ", ".join(f"{t:.4g}" for t in given.flatten()[:6].tolist()) + ", ..." * (given.numel() > 6)
        raise InputError(
            f"knots: got [{some}], expected (n,) finite, strictly increasing times. Sort and drop repeats."
        )
    times = given.tolist()
    # the ends of a rounded grid may be off; near 0 a linear clock resolves no more than a part of its span
    floor, eps = 0.0 if log else EXACT * (t1 - t0), rounding(knots)
    inner = [t for t in times if all(abs(t - end) > max(eps * abs(end), floor) for end in (t0, t1))]
    out = (t0, *inner, t1)
    if not all(a < b for a, b in pairwise(out)):
        cure = "expected increasing ones inside the path. Sort them and drop repeats."
        raise InputError(f"knots: got {len(times)} times not strictly increasing within [{t0!r}, {t1!r}], {cure}")
    return out
