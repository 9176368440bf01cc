"""Solving on many paths at many levels in blocks that fit in memory, shared out over processes.

The noise of path i is a function of (seed, i), whatever the block it falls in: results depend on the size
of the blocks and the number of processes by rounding only. torchsde's paths come in intervals of 4,096
paths each, number j seeded from (seed, j).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep import SDE, AreaPath, BrownianPath, Increment, StochasticSolver, solve
from fewstep.brownian.random_normals import key_of
from fewstep.integrations.torchsde import TorchsdePath

from .parallel import gathered, is_first, place

BUDGET = 1 << 28  # bytes of increments held at a time; states and temporaries stay well below as much again
INTERVAL = 4096  # paths of one torchsde.BrownianInterval: part of the identity of its paths
AREA_FINER = 1  # cells of an area path per finest step, as a power of two: all levels see the same join


@dataclass(frozen=True)
class Experiment:
    """What is solved: every solver at every level along the same paths, and a truth.

    Attributes:
        y0: (*event) one path's start.
        ends: t0 and t1.
        finest: the finest level expected of the noise.
        truth: None (neighbouring levels), "exact", "torchsde", or a solver for the finest level.
    """

    sde: SDE
    solvers: Sequence[StochasticSolver]
    y0: Tensor
    ends: tuple[float, float]
    levels: Sequence[int]
    finest: int
    paths: int
    truth: Any
    exact: Callable[[Tensor, float, Tensor], Tensor] | None
    device: str
    dtype: torch.dtype
    seed: int
    block: int | None = None
    antithetic: bool = False

    def noise_shape(self, count: int) -> tuple[int, ...]:
        """Of W for that many paths."""
        start = self.start(count)
        t = torch.tensor(self.ends[0], dtype=self.dtype, device=self.device)
        return self.sde.noise_shape(start, self.sde.diffusion(t, start))

    def start(self, count: int) -> Tensor:
        return self.y0.to(self.device, self.dtype).expand(count, *self.y0.shape)

    def levy(self) -> str:
        """The richest that a solver needs."""
        kinds = {s.card.levy or "W" for s in self.everyone()}
        return max((k if k != "A" else "H" for k in kinds), key="WHK".index)

    def area(self) -> bool:
        return any(s.card.levy == "A" for s in self.everyone())

    def everyone(self) -> list[StochasticSolver]:
        truth = [self.truth] if isinstance(self.truth, StochasticSolver) else []
        return [*self.solvers, *truth]


class Stored:
    """The increments of one level, in memory; coarser levels by joining neighbours."""

    def __init__(self, increments: list[Increment], area: bool) -> None:
        first = increments[0]
        self.pieces = increments
        self.area = area
        self.levy: str = first.levy
        self.shape: tuple[int, ...] = tuple(first.W.shape)
        self.dtype: torch.dtype = first.W.dtype

    def increments(self, grid: Tensor) -> Iterator[Increment]:
        assert len(grid) - 1 == len(self.pieces)
        return iter(self.pieces)

    def coarser(self) -> Stored:
        """The level above: the same paths with half the steps."""
        pairs = zip(self.pieces[::2], self.pieces[1::2], strict=True)
        return Stored([a.join(b) for a, b in pairs], self.area)

    def mirrored(self) -> Stored:
        """The paths -W: an antithetic twin. Areas between channels are even in W and stay."""
        return Stored([_mirror(i) for i in self.pieces], self.area)


def _mirror(i: Increment) -> Increment:
    return Increment(i.h, -i.W, None if i.H is None else -i.H, None if i.K is None else -i.K, i.A)


def grid_of(ends: tuple[float, float], level: int) -> Tensor:
    return torch.linspace(*ends, 2**level + 1, dtype=torch.float64)


def own_noise(e: Experiment, first: int, count: int) -> Stored:
    """The paths first, first + 1, ... of this library at the finest level."""
    base = key_of(e.seed)
    path: Any = BrownianPath(
        e.noise_shape(count), *e.ends, levy=e.levy(), dtype=e.dtype, device=e.device,
        seeds=[base + i for i in range(first, first + count)],
    )  # fmt: skip
    if e.area():
        path = AreaPath(path, 2 ** (e.finest + AREA_FINER))
    return Stored(list(path.increments(grid_of(e.ends, e.finest))), e.area())


def own_ends(e: Experiment, first: int, count: int, mirror: bool) -> tuple[list[dict[int, Tensor]], Any]:
    """For each solver its final states by level; the truth at two resolutions, where there is one."""
    noise, start = own_noise(e, first, count), e.start(count)
    if mirror:
        noise = noise.mirrored()
    expected = {*e.levels} if e.truth is not None else {*e.levels, *(n + 1 for n in e.levels)}
    found: list[dict[int, Tensor]] = [{} for _ in e.solvers]
    truth: list[Tensor] = []
    for level in range(e.finest, -1, -1):
        grid = grid_of(e.ends, level)
        if isinstance(e.truth, StochasticSolver) and level > e.finest - 2:
            truth.append(solve(e.sde, e.truth, start, grid, path=noise).y)
        if level in expected:
            for solver, ys in zip(e.solvers, found, strict=True):
                ys[level] = solve(e.sde, solver, start, grid, path=noise).y
        if level == min(expected) and e.truth != "exact":
            break
        noise = noise.coarser() if level else noise
    if e.truth == "exact":
        assert e.exact is not None
        truth = [e.exact(start, e.ends[1] - e.ends[0], noise.pieces[0].W)]
    return found, truth


TORCHSDE_METHODS = {"ito": ("srk", 1.5), "stratonovich": ("midpoint", 1.0)}


def torchsde_ends(e: Experiment, first: int, count: int) -> tuple[list[dict[int, Tensor]], list[Tensor]]:
    """The same along torchsde's paths, with torchsde's solver at two resolutions for the truth."""
    import torchsde

    start, T = e.start(count), e.ends[1] - e.ends[0]
    interval = torchsde.BrownianInterval(
        *e.ends, size=e.noise_shape(count), dtype=e.dtype, device=e.device, tol=0.0,
        entropy=key_of(key_of(e.seed) + first // INTERVAL) >> 1,
        levy_area_approximation="space-time", dt=T / 2**e.finest,
    )  # fmt: skip
    path = TorchsdePath(interval)
    found: list[dict[int, Tensor]] = [{} for _ in e.solvers]
    # coarse before fine: asked the other way round, torchsde's tree degenerates
    for level in e.levels:
        grid = grid_of(e.ends, level)
        noise = Stored(list(path.increments(grid)), area=False)
        for solver, ys in zip(e.solvers, found, strict=True):
            ys[level] = solve(e.sde, solver, start, grid, path=noise).y
    theirs, ts = Torchsde(e.sde, start.shape[-1]), torch.tensor(e.ends, dtype=torch.float64)
    method = TORCHSDE_METHODS[e.sde.sde_type][0]
    truth = [
        torchsde.sdeint(theirs, start, ts, bm=interval, method=method, dt=T / 2**level)[-1]
        for level in (e.finest, e.finest - 1)
    ]
    return found, truth


class Torchsde(torch.nn.Module):
    """An SDE in torchsde's form, where additive noise is always a matrix."""

    def __init__(self, sde: SDE, d: int) -> None:
        super().__init__()
        self.sde = sde
        self.f: Callable[[Tensor, Tensor], Tensor] = sde.drift
        self.sde_type: str = sde.sde_type
        self.eye: Tensor = torch.eye(d, dtype=torch.float64)
        self.noise_type: str = "general" if sde.noise_type == "commutative" else sde.noise_type

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        g = self.sde.diffusion(t, y)
        if self.noise_type == "additive" and g.dim() <= y.dim():
            return g.expand_as(y).unsqueeze(-1) * self.eye.to(y)
        return g


Reduce = Callable[[dict[int, Tensor], Any], Tensor]


def sweep(e: Experiment, reduce: Reduce, floor: Callable[[Any], Tensor]) -> tuple[list[Tensor], Tensor]:
    """For each solver (paths, levels) of what `reduce` makes of (states by level, truth); and the floor's.

    Every process takes every so-manieth block; all return the same, on the CPU.
    """
    rank, world = place()
    out = [torch.zeros(e.paths, len(e.levels), dtype=torch.float64) for _ in e.solvers]
    own = torch.zeros(e.paths, dtype=torch.float64)
    size = INTERVAL if e.truth == "torchsde" else block_size(e, world)
    starts = range(0, e.paths, size)
    for k in _bar(list(starts)):
        if (k // size) % world != rank:
            continue
        count = min(size, e.paths - k)
        rows = slice(k, k + count)
        for sign in (False, True) if e.antithetic else (False,):
            share = 0.5 if e.antithetic else 1.0
            ends = torchsde_ends(e, k, count) if e.truth == "torchsde" else own_ends(e, k, count, sign)
            for mine, ys in zip(out, ends[0], strict=True):
                mine[rows] += share * reduce(ys, ends[1]).to("cpu", torch.float64)
            if len(ends[1]) > 1:
                own[rows] += share * floor(ends[1]).to("cpu", torch.float64)
    return [gathered(o) for o in out], gathered(own)


def block_size(e: Experiment, world: int) -> int:
    """Paths at a time: what the budget allows, and no fewer blocks than processes."""
    if e.block is not None:
        return e.block
    m = e.noise_shape(1)[-1] if len(e.noise_shape(1)) > 1 else 1
    letters = "WHK".index(e.levy()) + 1 + (2 * m if e.area() else 0)
    numbers = torch.Size(e.noise_shape(1)).numel() * letters
    # a level and the one above it are held at once
    bytes_each = 1.5 * 2**e.finest * numbers * torch.finfo(e.dtype).bits / 8
    budget = BUDGET if e.device == "cpu" else 32 * BUDGET
    return max(1, min(int(budget / bytes_each), -(-e.paths // world)))


def _bar(starts: list[int]) -> Any:
    from tqdm import tqdm

    return tqdm(starts, unit="block", leave=False, disable=None if is_first() and len(starts) > 1 else True)
