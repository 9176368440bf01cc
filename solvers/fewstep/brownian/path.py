"""A Brownian path that can be queried over any interval, in any order, at any resolution."""

import functools
import math
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _validation
from .._tracing import made_outside
from ..errors import InputError, warn
from .bridge import VARIANCES, bridge_matrix, noise_scales, split
from .counter import CounterNormals, fields_of
from .increment import LEVY_ORDER, Increment, check_dtype
from .random_normals import Draw, GeneratorNormals, HashedNormals, Normals
from .time_scale import DEPTH, Clock, make_knots, rounding

ADVISED = 64  # times of a grid: more that are no cuts of the path are slow enough to say so
_CHUNK = 1 << 15  # normals drawn in one call where many intervals follow: amortises the call, fits the cache


class _Cell(NamedTuple):
    """An interval of the tree: its number (1, then 2n and 2n+1 for the parts of n), ends and [W, H, K]."""

    node: int
    low: int
    high: int
    values: list[Tensor]


_Place = tuple[int, int, int]  # number and ends of a cell
_Cut = tuple[int, int, int, int]  # number, first end, cut and last end of a cell


class Subtree(NamedTuple):
    """A cell and what its cuts need: tensors alone, for compiled programs."""

    values: list[Tensor]
    key: Tensor
    nodes: Tensor  # (m - 1,) of its cuts, generation by generation
    matrices: Tensor  # (m - 1, 2n, 2n), of `bridge_matrix`, with the lengths
    lengths: Tensor  # (m,) of its leaves

    def leaves(self) -> list[list[Tensor]]:
        """[W, H, K] of the m leaves, in time order."""
        n, cells, i = len(self.values), [self.values], 0
        key, rows = (self.key[0], self.key[1]), self.key.shape[1]
        z = fields_of(self.nodes, key, rows, n, self.values[0].shape).to(self.values[0].dtype).unbind(1)
        while len(cells) < len(self.lengths):
            parts: list[list[Tensor]] = []
            for values in cells:
                inputs = [*values, *z[i].unbind()]
                found = [_combined(row.unbind(), inputs) for row in self.matrices[i].unbind()]
                parts += [found[:n], found[n:]]
                i += 1
            cells = parts
        return cells


def _combined(row: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, map(torch.mul, row, inputs))


class BrownianPath:
    """A Brownian path: an interval has the same increment in every query, whatever the order.

    The path is a binary tree over time. (W, H, K) of the span are drawn first, each interval is cut in two by its
    exact conditional law, and the normals of a cut are a function of the seed and of the cut's number in the tree.
    Iterating over `increments` costs one normal per step and letter and O(shape log n) memory; one `increment`
    costs O(log) cuts. Threads may share a path. It pickles to its arguments, without its bounded cache. For noise
    that is used once, `FreshIncrements` is cheaper.

    Args:
        shape: shape of W, batch axes first.
        t0, t1: the span, t0 < t1.
        seed: fixes the path, together with all arguments below except dtype and cache.
        levy: what is drawn: `"W"`, `"H"` (W and H) or `"K"` (W, H and K). It serves every solver
            that needs less. One seed with different levy gives *different* paths, since H needs
            normals of its own: choose the most that any of your solvers needs.
        dtype: float32 or float64, by default torch's. Both give one path up to rounding, since the
            normals are float32 in either case.
        device: where the normals are drawn. Another kind of device gives another path, unless the path
            is `portable`, has `seeds` or generator="counter".
        seeds: one integer per entry of shape[0], instead of seed. The numbers of an entry depend on
            neither the size nor the order of the batch, and agree on all devices to rounding.
        clock: `"linear"`, or `"log"` (t0 > 0) to halve intervals in log time, for full relative
            precision over many decades.
        knots: times at which the tree is cut first; t0 and t1 are added if they are missing. A grid
            other than t0 + (t1 - t0) k / 2^n is cheap if its times are knots; otherwise each of its
            times costs up to 48 cuts. Knots are part of the identity of the path.
        portable: draw the normals on the CPU and move them: the same bits on every device, but slower.
        generator: `"torch"` draws by the device's generator. `"counter"` draws another path, by Philox 4x32-10 in
            tensor operations: its numbers agree on all devices, compiled or not, to the rounding of log and cos,
            and `seeds` cost little more than one seed. It takes longer.
        cache: number of intervals kept between calls of `increment`; a query at arbitrary times touches 200.

    Raises:
        InputError: for invalid arguments.

    Source: Jelinčić, Foster & Kidger, arXiv 2405.06464: the tree, and Theorem 3.7 for the conditional laws.
    """

    def __init__(
        self, shape: Sequence[int], t0: float = 0.0, t1: float = 1.0, seed: int = 0, levy: str = "W",
        dtype: torch.dtype | None = None, device: torch.device | str = "cpu", *,
        seeds: Sequence[int] | None = None, clock: str = "linear",
        knots: Tensor | Sequence[float] | None = None, portable: bool = False, cache: int = 256,
        generator: str = "torch",
    ) -> None:  # fmt: skip
        made_outside("path")
        _validation.check_choice("clock", clock, ("linear", "log"))
        self.shape: tuple[int, ...] = _validation.check_shape(shape)
        self.levy: str = _validation.check_choice("levy", levy, LEVY_ORDER)
        self.dtype: torch.dtype = check_dtype(dtype)
        self.device: torch.device = _validation.check_device(device)
        self._clock = Clock(make_knots(t0, t1, knots, clock == "log"), clock == "log")
        self.t0: float = self._clock.knots[0]
        self.t1: float = self._clock.knots[-1]
        self.seed: int = _validation.check_seed(seed)
        self.seeds: list[int] | None = None
        if seeds is not None:
            self.seeds = _validation.check_seeds(seeds, sum(self.shape[:1]))
        self.portable: bool = _validation.check_flag("portable", portable)
        self.cache: int = _validation.check_int("cache", cache, 0)
        self.generator: str = _validation.check_choice("generator", generator, ("torch", "counter"))
        source = torch.device("cpu") if portable else self.device
        if generator == "counter":
            keys, each = ([self.seed], False) if self.seeds is None else (self.seeds, True)
            self._normals: Normals = CounterNormals(self.shape, keys, each, source)
        elif self.seeds is None:
            self._normals = GeneratorNormals(self.shape, seed, source)
        else:
            self._normals = HashedNormals(self.shape, self.seeds, source)
        self._numel = max(1, math.prod(self.shape))
        self.__setstate__({})

    def increment(self, ta: float | Tensor, tb: float | Tensor) -> Increment:
        """Return the increment over [ta, tb], t0 <= ta < tb <= t1: W, H, K of `shape`, as in levy.

        Raises:
            InputError: times outside the path, or not ta < tb.
        """
        times = _validation.check_float("ta", ta), _validation.check_float("tb", tb)
        low, high = self._clock.pair(*times, (rounding(ta), rounding(tb)))
        _check_apart(times, (low, high))
        return Increment(self._clock.length(low, high), *self._query(low, high))

    def increments(self, grid: Tensor | Sequence[float]) -> Iterator[Increment]:
        """Return the n - 1 increments over the intervals of `grid`, (n,) increasing times, in one pass.

        They equal those of `increment`, to the bit on a CPU, and never share memory.

        Raises:
            InputError: at once, for a grid that is too short, not increasing, or outside the path.
        """
        return self.walk(grid)

    def walk(self, grid: Tensor | Sequence[float], grain: int = 1) -> "Walk":
        """Return `increments(grid)`, as one that leaves cells of up to `grain` intervals for `subtree` to find."""
        ends = self._ends(_validation.check_times("grid", grid), rounding(grid))
        if len(ends) > ADVISED and self._clock.deep(ends[1]) and self._clock.deep(ends[len(ends) // 3]):
            cuts = DEPTH - len(ends).bit_length()
            cure = "Make the path with knots=grid, which makes it another path, or take 2^k equal steps."
            warn(f"grid: each of its {len(ends)} times costs {cuts} cuts of the path. {cure}")
        return Walk(self, ends, grain)

    def positions(self, times: Tensor) -> Sequence[int]:
        """Return the positions of float64 CPU `times` (n,) in the tree; raises InputError for one outside the path."""
        return self._clock.positions(times)

    def snapped(self, times: Tensor, rounding: float) -> Tensor:
        """Return the times of the path that increasing float64 CPU `times` (n,) stand for, given their rounding."""
        found = map(self._clock.time, self._clock.positions(times, rounding))
        return torch.tensor(list(found), dtype=torch.float64, device="cpu")

    def near(self, t: float, width: float) -> float:
        """Return a time within `width` of t that takes few cuts, for loops that choose their times."""
        return self._clock.near(t, width)

    def _ends(self, times: Tensor, rounding: float) -> Sequence[int]:
        ends = self._clock.positions(times, rounding)
        _check_apart(times, ends)
        return ends

    def nearby(self, times: Tensor) -> Iterator[Increment]:
        """Return the n - 1 increments between the nodes of the tree nearest to float64 CPU `times` (n,), in one pass.

        A time moves by at most 2^-20 of the clock's span, and takes less than half the cuts of an exact one. Times that
        would move to one node stay exact.
        """
        return Walk(self, self._clock.nodes(times))

    def _query(self, start: int, end: int) -> list[Tensor]:
        """[W, H, K] over an interval, by cuts of the smallest kept intervals that contain its ends."""
        with self._lock:
            draw = self._sources.pop() if self._sources else None
        clock, draw, kept = self._clock, draw or self._begin(), self._cache
        values = kept.get(1)
        used = {1: self._root(draw).values if values is None else values}
        todo, cuts, pieces = [(1, 0, clock.end)], list[_Cut](), list[_Place]()
        while todo:
            node, low, high = place = todo.pop()
            if start <= low and high <= end:
                pieces.append(place)
                continue
            cut, missing = clock.cut(low, high), False
            for part in ((2 * node + 1, cut, high), (2 * node, low, cut)):
                if start < part[2] and part[1] < end:
                    todo.append(part)
                    values = kept.get(part[0])
                    if values is None:
                        missing = True
                    else:
                        used[part[0]] = values
            if missing:
                cuts.append((node, low, cut, high))
        self._cut(cuts, used, draw)
        self._keep(used, draw)
        return self._joined([_Cell(*place, used[place[0]]) for place in pieces])

    def _joined(self, pieces: list[_Cell]) -> list[Tensor]:
        """[W, H, K] of adjacent cells together, in memory of their own."""
        if len(pieces) == 1:
            return [v.clone() for v in pieces[0].values]
        if self.levy == "W":
            total = pieces[0].values[0] + pieces[1].values[0]
            for piece in pieces[2:]:
                total.add_(piece.values[0])
            return [total]
        parts = (Increment(self._clock.length(c.low, c.high), *c.values) for c in pieces)
        joined = functools.reduce(Increment.join, parts)
        return [v for v in (joined.W, joined.H, joined.K) if v is not None]

    def _root(self, draw: Draw) -> _Cell:
        span = self._clock.length(0, self._clock.end)
        values = [z[0].clone() for z in draw([0])]
        for z, variance in zip(values, VARIANCES):
            z.mul_(math.sqrt(span * variance))
        return _Cell(1, 0, self._clock.end, values)

    def _cut(self, cuts: Sequence[_Cut], values: dict[int, list[Tensor]], draw: Draw, consume: bool = False) -> None:
        """Add the values of both parts of each cell, which may overwrite its own; parents come before their parts.

        Both are kept: the second may be the next interval that is asked.
        """
        clock, letters = self._clock, LEVY_ORDER[self.levy]
        # a device would wait for the factors
        room = max(1, _CHUNK // self._numel) if self.device.type == "cpu" else 1
        for i in range(0, len(cuts), room):
            some = cuts[i : i + room]
            shares = [clock.shares(low, cut, high) for _, low, cut, high in some]
            roots = [math.sqrt(clock.length(low, high)) for _, low, _, high in some]
            scales = [noise_scales(letters, x, root) for (x, _), root in zip(shares, roots)]
            fields = draw([c[0] for c in some])
            self._scale(fields, scales)
            each = zip(*(field.unbind() for field in fields), strict=True)
            for (node, *_), (x, y), z in zip(some, shares, each, strict=True):
                values[2 * node], values[2 * node + 1] = split(values[node], z, x, y, consume)

    def _scale(self, fields: list[Tensor], scales: Sequence[tuple[float, ...]]) -> None:
        """Multiply (count, *shape) fields, one per letter, by the factors of each cut, or of all."""
        for field, column in zip(fields, zip(*scales, strict=True), strict=True):
            if len(column) == 1:
                field.mul_(column[0])
            else:
                factors = torch.tensor(column, dtype=self.dtype, device=self.device)
                field.mul_(factors.reshape(-1, *(1 for _ in self.shape)))

    def _parts(self, cell: _Cell, ends: Sequence[int], inside: int, draw: Draw) -> list[_Cell]:
        """Cut a cell once, down to the only end inside, or several times in one call where it is small and many are."""
        # in a geometric clock the lengths of cells are not equal, and a device would wait for them
        several = not self._clock.log or self.device.type == "cpu"
        room = min(_CHUNK // self._numel, inside + 1)
        cuts = room.bit_length() - 1
        if cuts > 1 and several and self._clock.within(cell.low, cell.high):
            cuts = min(cuts, (cell.high - cell.low).bit_length() - 1)
            return self._cut_often(cell, ends, cuts, draw)
        alone = inside == 1 and _inside(ends, cell.low, cell.high) == 1  # a walk for programs counts in grains
        return self._cut_to(cell, ends[bisect_right(ends, cell.low)] if alone else None, draw)

    def _cut_to(self, cell: _Cell, end: int | None, draw: Draw) -> list[_Cell]:
        """Cut a cell until `end`, which lies inside, is a cut; once if there is none."""
        node, low, high, values = cell
        cuts, before, after, all_values = list[_Cut](), list[_Place](), list[_Place](), {node: values}
        while True:
            cut = self._clock.cut(low, high)
            cuts.append((node, low, cut, high))
            left, right = (2 * node, low, cut), (2 * node + 1, cut, high)
            if end is None or end == cut:
                break
            if end < cut:
                after.append(right)
                node, low, high = left
            else:
                before.append(left)
                node, low, high = right
        self._cut(cuts, all_values, draw, consume=True)
        return [_Cell(*place, all_values[place[0]]) for place in (*before, left, right, *reversed(after))]

    def _cut_often(self, cell: _Cell, ends: Sequence[int], cuts: int, draw: Draw) -> list[_Cell]:
        """Cut `cuts` times, each generation in one call, and return the largest cells without ends inside."""
        bounds, values = [cell.low, cell.high], [v.unsqueeze(0) for v in cell.values]
        generations = []
        for g in range(cuts):
            middles = [self._clock.cut(a, b) for a, b in pairwise(bounds)]
            x, y = self._clock.shares(bounds[0], middles[0], bounds[1])
            z = draw(range(cell.node << g, (cell.node + 1) << g))
            lengths = pairwise(bounds if self._clock.log else bounds[:2])  # those of a linear clock are equal
            self._scale(z, [noise_scales(len(z), x, math.sqrt(self._clock.length(a, b))) for a, b in lengths])
            parts = split(values, z, x, y)
            values = [torch.stack(pair, 1).flatten(0, 1) for pair in zip(*parts, strict=True)]
            bounds = sorted(bounds + middles)
            generations.append((bounds, values))
        out, todo = [], [(0, 1), (0, 0)]
        while todo:
            g, i = todo.pop()
            bounds, values = generations[g]
            if g < cuts - 1 and _inside(ends, bounds[i], bounds[i + 1]) > 0:
                todo += [(g + 1, 2 * i + 1), (g + 1, 2 * i)]
            else:
                node = (cell.node << (g + 1)) + i
                # a copy: cells are cut in place later, and views would share memory with yielded increments
                out.append(_Cell(node, bounds[i], bounds[i + 1], [v[i].clone() for v in values]))
        return out

    def _subtree(self, cell: _Cell, cells: list[tuple[int, int, int]]) -> Subtree:
        """A cell whose parts, with their cuts, are `cells`, generation by generation."""
        assert isinstance(self._normals, CounterNormals)
        n, matrices, lengths = len(cell.values), [], []
        for low, cut, high in cells:
            root = math.sqrt(self._clock.length(low, high))
            rows = bridge_matrix(n, *self._clock.shares(low, cut, high))
            matrices.append([[c if j < n else c * root for j, c in enumerate(row)] for row in rows])
        for low, cut, high in cells[len(cells) // 2 :]:
            lengths += [self._clock.length(low, cut), self._clock.length(cut, high)]
        nodes = [(cell.node << g) + i for g in range(len(lengths).bit_length() - 1) for i in range(1 << g)]
        numbers = [torch.tensor(v, dtype=d, device=self.device) for v, d in (
            (nodes, torch.int64), (matrices, self.dtype), (lengths, torch.float64),
        )]  # fmt: skip
        return Subtree(cell.values, self._normals.key, *numbers)

    def _begin(self) -> Draw:
        """The source of normals for one traversal, in this path's dtype and on its device."""
        draw = self._normals.begin(LEVY_ORDER[self.levy])
        if self.dtype == torch.float32 and not self.portable:
            return draw
        return lambda nodes: [z.to(self.device, self.dtype) for z in draw(nodes)]

    def _keep(self, used: dict[int, list[Tensor]], draw: Draw) -> None:
        """Keep the last of the intervals that a query used, the root being used by every query, and its source."""
        with self._lock:
            if not torch.is_inference_mode_enabled():  # its memory could not be written outside
                self._sources.append(draw)
            for node, values in reversed(used.items()):
                self._cache[node] = values
                self._cache.move_to_end(node)
            while len(self._cache) > self.cache:
                self._cache.popitem(last=False)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_cache", "_sources")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, list[Tensor]] = OrderedDict()
        self._sources: list[Draw] = []  # of earlier queries, as many as ran at once: a new one costs more than a cut

    def __repr__(self) -> str:
        seed = f"seed={self.seed}" if self.seeds is None else f"seeds=[{len(self.seeds)} integers]"
        return (
            f"BrownianPath(shape={self.shape}, t0={self.t0:g}, t1={self.t1:g}, {seed}, "
            f"levy={self.levy!r}, dtype={self.dtype}, device={str(self.device)!r}, generator={self.generator!r})"
        )


class Walk(Iterator[Increment]):
    """Traverses the tree depth first, in time order: cuts cells with an end inside, joins the others.

    An object rather than a generator: a run in which it takes part can be copied or pickled.
    """

    def __init__(self, path: BrownianPath, ends: Sequence[int], grain: int = 1) -> None:
        self.path: BrownianPath = path
        self.ends: Sequence[int] = ends
        self.grain: int = grain
        self.done: int = 0
        self.stack: list[_Cell] | None = None  # nothing is drawn before the first increment
        self.draw: Draw = path._begin()

    def __next__(self) -> Increment:
        path, ends, done = self.path, self.ends, self.done
        if done >= len(ends) - 1:
            raise StopIteration
        if self.stack is None:
            self.stack = [path._root(self.draw)]
        start, end, pieces = ends[0], ends[done + 1], list[_Cell]()
        while True:
            cell = self.stack.pop()
            inside = _inside(ends, cell.low, cell.high)
            if inside > 0:
                self.stack.extend(reversed(path._parts(cell, ends, inside // self.grain, self.draw)))
                continue
            if cell.high <= start:
                continue
            pieces.append(cell)
            if cell.high == end:
                break
        self.done += 1
        # nothing else holds the values of a single cell
        values = cell.values if len(pieces) == 1 else path._joined(pieces)
        return Increment(path._clock.length(ends[done], end), *values)

    def subtree(self) -> Subtree | None:
        """The next `grain` intervals as one cell, if `grain` = 2^g and g generations of its cuts are their ends."""
        path, ends, first, last = self.path, self.ends, self.done, self.done + self.grain
        assert self.stack is not None  # after an increment
        start, end = ends[first], ends[last]
        while (cell := self.stack[-1]).high <= start or (cell.high >= end and cell[1:3] != (start, end)):
            self.stack.pop()
            inside = _inside(ends, cell.low, cell.high)
            if cell.high > start:
                self.stack.extend(reversed(path._parts(cell, ends, inside // self.grain, self.draw)))
        bounds, cells = [cell.low, cell.high], list[tuple[int, int, int]]()
        while len(bounds) <= self.grain:
            middles = [path._clock.cut(a, b) for a, b in pairwise(bounds)]
            cells += [(a, c, b) for (a, b), c in zip(pairwise(bounds), middles, strict=True)]
            bounds = sorted(bounds + middles)
        if bounds != list(ends[first : last + 1]):
            return None
        self.stack.pop()
        self.done = last
        return path._subtree(cell, cells)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "draw"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.draw = self.path._begin()


def _check_apart(times: Sequence[float] | Tensor, ends: Sequence[int]) -> None:
    for i, (a, b) in enumerate(pairwise(ends)):
        if a >= b:
            raise InputError(
                f"grid: got {float(times[i])!r}, then {float(times[i + 1])!r}, expected increasing times further "
                "apart than the path's resolution, 2^-48 of its span. A path runs forward in time, and one over a "
                "shorter span resolves shorter steps."
            )


def _inside(ends: Sequence[int], low: int, high: int) -> int:
    """The number of ends strictly between low and high."""
    return bisect_left(ends, high) - bisect_right(ends, low)
