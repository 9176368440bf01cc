"""The times of the tree: where each interval is cut, and where in the tree a given time lies.

Positions are integers, so that no rounding can make two queries disagree on where a cut is. Knot i
of the path lies at position `i << bits`; between two knots the clock runs linearly or
geometrically.
"""

from __future__ import annotations

import bisect
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import Tensor

from .. import _validation
from ..errors import InputError

DEPTH = 48
"""Times are resolved to 2^-48 of the span. In W that is 6e-8 sqrt(span), float32's own rounding."""


@dataclass(frozen=True)
class Clock:
    """Maps times to integer positions and back.

    `knots` are increasing times; between two of them the clock is linear or, with `log`, geometric.
    """

    knots: tuple[float, ...]
    log: bool

    @cached_property
    def bits(self) -> int:
        """2^bits positions lie between two knots; at least 2^16, however many knots there are."""
        return max(16, DEPTH - (len(self.knots) - 2).bit_length())

    @property
    def end(self) -> int:
        """The position of the last knot."""
        return (len(self.knots) - 1) << self.bits

    def cut(self, low: int, high: int) -> int:
        """Where the interval between two positions is cut: at its middle knot, or else halfway."""
        first, last = low >> self.bits, high >> self.bits
        if (first << self.bits) == low and (last << self.bits) == high and last - first > 1:
            return ((first + last) // 2) << self.bits
        return (low + high) // 2

    def within(self, low: int, high: int) -> bool:
        """Whether no knot lies strictly between, so that all cuts below are halves in the clock."""
        return (high - 1) >> self.bits == low >> self.bits

    def time(self, position: int) -> float:
        """The time of a position."""
        i, rest = position >> self.bits, position & ((1 << self.bits) - 1)
        if not rest:
            return self.knots[i]
        a, b = self.knots[i], self.knots[i + 1]
        u = rest / (1 << self.bits)
        return a * math.exp(u * math.log(b / a)) if self.log else a + (b - a) * u

    def length(self, low: int, high: int) -> float:
        """time(high) - time(low), without cancellation between two knots."""
        if not self.within(low, high):
            return self.time(high) - self.time(low)
        i = low >> self.bits
        a, b = self.knots[i], self.knots[i + 1]
        w = (high - low) / (1 << self.bits)
        if self.log:
            return self.time(low) * math.expm1(w * math.log(b / a))
        return (b - a) * w

    def shares(self, low: int, cut: int, high: int) -> tuple[float, float]:
        """The two parts' shares of the length; between two knots a function of high - low alone."""
        if not self.within(low, high):
            whole = self.length(low, high)
            return self.length(low, cut) / whole, self.length(cut, high) / whole
        if not self.log:
            return 0.5, 0.5
        i, w = low >> self.bits, (high - low) / (1 << self.bits)
        growth = math.exp(0.5 * w * math.log(self.knots[i + 1] / self.knots[i]))
        return 1 / (1 + growth), growth / (1 + growth)

    def positions(self, times: Tensor) -> array[int]:
        """The positions of float64 `times`: the nearest, to 2^-49 of the span.

        A time that is exactly a float32 number goes to a knot or a cut of few bits where there is
        one within a unit in its last place: `linspace(0, 0.3, 65)` in float32 finds the same cuts
        as in float64. InputError outside the path.
        """
        out = array("q")
        for i in range(0, len(times), 4096):  # a list of all times would outweigh the path
            part = times[i : i + 4096]
            single = (part.float().double() == part).tolist()
            out.extend(map(self._position, part.tolist(), single))
        return out

    def _position(self, t: float, single: bool) -> int:
        slack = abs(t) * 2.0**-23 if single else abs(t) * 2.0**-50
        first, last = self.knots[0], self.knots[-1]
        if not (first - slack <= t <= last + slack and math.isfinite(t)):
            raise InputError(
                f"grid: got time {t!r}, expected one in the path's [{first!r}, {last!r}]. Make it "
                "with a t0 and t1 that cover it."
            )
        i = min(max(bisect.bisect_right(self.knots, t) - 1, 0), len(self.knots) - 2)
        a, b = self.knots[i], self.knots[i + 1]
        full = 1 << self.bits
        if t <= a or t >= b:
            return (i if t <= a else i + 1) << self.bits
        if self.log:
            scale = full / math.log(b / a)
            u, width = math.log(t / a) * scale, slack / t * scale
        else:
            u, width = (t - a) / (b - a) * full, slack / (b - a) * full
        place = _simplest(u, width, full) if single else None
        if place is None or (0 < place < full and place & -place < 128 * width):
            # not so simple that it must be what the rounding to float32 stood for
            place = _simplest(u, 0.5, full)
        return (i << self.bits) + place


def _simplest(u: float, width: float, full: int) -> int:
    """The integer within `width` of u that the tree cuts first: an end, or that of fewest bits."""
    width = max(width, 0.5)
    low, high = math.ceil(u - width), math.floor(u + width)
    if low <= 0:
        return 0
    if high >= full:
        return full
    # it is high, cut off after the first bit in which high differs from low - 1
    drop = ((low - 1) ^ high).bit_length() - 1
    return (high >> drop) << drop


def make_knots(t0: float, t1: float, knots: Tensor | Sequence[float] | None, log: bool) -> tuple[float, ...]:
    """The knots of a path over [t0, t1], ends included.

    Raises:
        InputError: not t0 < t1; a log clock with t0 <= 0; knots that do not increase or leave it.
    """
    t0, t1 = _validation.check_float("t0", t0), _validation.check_float("t1", t1)
    if not (t0 < t1 and math.isfinite(t1 - t0)):
        raise InputError(f"t0, t1: got {t0!r} and {t1!r}, expected finite times with t0 < t1.")
    if log and t0 <= 0:
        raise InputError(
            f"t0: got {t0!r} with clock='log', expected t0 > 0. Start at the first time above 0 and "
            "draw the interval before it with FreshIncrements, or take clock='linear'."
        )
    if knots is None:
        return (t0, t1)
    given = _validation.check_numbers("knots", knots)
    if given.dim() != 1 or not bool(given.isfinite().all()) or not bool((given.diff() > 0).all()):
        raise InputError(f"knots: got shape {tuple(given.shape)}, expected (n,) finite increasing times.")
    times = given.tolist()
    # A float32 grid misses the ends by a rounding.
    slack = max(abs(t0), abs(t1)) * 2.0**-23
    inner = [t for t in times if abs(t - t0) > slack and abs(t - t1) > slack]
    out = (t0, *inner, t1)
    if not all(a < b for a, b in pairwise(out)):
        raise InputError(
            f"knots: got {len(times)} times that do not increase strictly within [{t0!r}, {t1!r}], "
            "expected increasing ones inside the path. Sort them and drop repeats."
        )
    return out
