"""Solving many paths at many refinements, in blocks that fit in memory, distributed over processes.

The noise of path i is a function of (seed, i), so results depend on the size of the blocks and on the number of
processes by rounding only. torchsde's paths come in intervals of 4,096 paths each on a CPU, and of as many as fit on
other devices; interval j is seeded from (seed, j).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fewstep import SDE, Increment, StochasticSolver, solve
from fewstep._distributed import rank_and_world, sum_over_processes
from fewstep._progress import progress
from fewstep.brownian.area_path import path_for
from fewstep.brownian.increment import letters_for
from fewstep.brownian.random_normals import key_of, wrapped
from fewstep.integrations.torchsde import TorchsdePath

BUDGET = 1 << 28  # bytes of increments held at a time; states and temporaries stay well below twice that
INTERVAL = 4096  # paths of one torchsde.BrownianInterval on a CPU: part of the identity of its paths
LARGEST = 1 << 20  # on other devices, which small batches leave idle
AREA_FINER = 1  # cells of an area path per finest step, as a power of two: all refinements join the same cells
TORCHSDE_METHODS = {"ito": ("srk", 1.5), "stratonovich": ("midpoint", 1.0)}


@dataclass(frozen=True)
class Experiment:
    """A convergence experiment: every solver at every refinement along the same paths, and a reference.

    Attributes:
        y0: (*event) the initial value of one path.
        ends: t0 and t1.
        levels: the refinements measured; refinement n takes 2^n steps.
        finest: the finest refinement of the noise.
        truth: None (differences of consecutive refinements), "exact", "torchsde", or a solver that is solved at the
            finest refinement.
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
        """The shape of W for that many paths."""
        start = self.start(count)
        t = torch.tensor(self.ends[0], dtype=self.dtype, device=self.device)
        return self.sde.noise_shape(start, self.sde.diffusion(t, start))

    def start(self, count: int) -> Tensor:
        """(count, *event) initial values."""
        return self.y0.to(self.device, self.dtype).expand(count, *self.y0.shape)

    @property
    def levy(self) -> str:
        """The last of "W", "H", "K" that some solver needs of the path."""
        return letters_for(*self.needs)

    @property
    def area(self) -> bool:
        """Whether some solver needs areas between channels."""
        return "A" in self.needs

    @property
    def needs(self) -> list[str]:
        """The Lévy data on the card of each solver."""
        return [s.card.levy for s in (*self.solvers, self.truth) if isinstance(s, StochasticSolver)]


class Stored:
    """A path with increments over equidistant steps in memory; coarser increments are made by joining pairs."""

    def __init__(self, increments: list[Increment], t0: float = 0.0) -> None:
        first = increments[0]
        self.pieces = increments
        self.t0 = t0
        self.t1: float = t0 + len(increments) * float(first.h)
        self.levy: str = first.levy
        self.area: bool = first.A is not None
        self.shape: tuple[int, ...] = tuple(first.W.shape)
        self.dtype: torch.dtype = first.W.dtype
        self.device: torch.device = first.W.device

    def increments(self, grid: Tensor) -> Iterator[Increment]:
        assert len(grid) - 1 == len(self.pieces)
        return iter(self.pieces)

    def increment(self, s: Any, t: Any) -> Increment:
        h = float(self.pieces[0].h)
        first, last = (round((float(v) - self.t0) / h) for v in (s, t))
        return reduce(lambda a, b: a.join(b), self.pieces[first:last])

    def coarser(self) -> Stored:
        """The same paths with half the steps."""
        pairs = zip(self.pieces[::2], self.pieces[1::2], strict=True)
        return Stored([a.join(b) for a, b in pairs], self.t0)

    def exchanged(self) -> Stored:
        """The same paths with the two halves of each pair of steps exchanged; `coarser` has the same W."""
        pairs = zip(self.pieces[::2], self.pieces[1::2], strict=True)
        return Stored([step for a, b in pairs for step in (b, a)], self.t0)

    def mirrored(self) -> Stored:
        """The antithetic paths -W. Areas between channels are even in W and stay."""

        def minus(x: Tensor | None) -> Tensor | None:
            return None if x is None else -x

        return Stored([Increment(i.h, -i.W, minus(i.H), minus(i.K), i.A) for i in self.pieces], self.t0)


def grid_of(ends: tuple[float, float], level: int) -> list[float]:
    """2^level + 1 equidistant times; a list, since drift and diffusion receive those in the state's dtype."""
    return torch.linspace(*ends, 2**level + 1, dtype=torch.float64).tolist()


def own_noise(e: Experiment, first: int, count: int) -> Stored:
    """Paths first, first + 1, ... of this library at the finest refinement."""
    base = key_of(e.seed)
    path = path_for(
        e.needs, e.noise_shape(count), e.ends, 2 ** (e.finest + AREA_FINER), dtype=e.dtype, device=e.device,
        seeds=[wrapped(base + i) for i in range(first, first + count)],
    )  # fmt: skip
    return Stored(list(path.increments(grid_of(e.ends, e.finest))), e.ends[0])


def own_ends(e: Experiment, first: int, count: int, mirror: bool) -> tuple[list[dict[int, Tensor]], Any]:
    """The final states of each solver by refinement, and the reference (a solver's at two resolutions)."""
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


def torchsde_ends(e: Experiment, first: int, count: int) -> tuple[list[dict[int, Tensor]], list[Tensor]]:
    """The same along torchsde's paths; the reference is torchsde's solver at two resolutions."""
    import torchsde

    start, T = e.start(count), e.ends[1] - e.ends[0]
    interval = torchsde.BrownianInterval(
        *e.ends, size=e.noise_shape(count), dtype=e.dtype, device=e.device, tol=0.0,
        entropy=key_of(key_of(e.seed) + first // interval_size(e)) >> 1,
        levy_area_approximation="space-time", dt=T / 2**e.finest,
    )  # fmt: skip
    path = TorchsdePath(interval)
    found: list[dict[int, Tensor]] = [{} for _ in e.solvers]
    # coarse before fine: in the other order torchsde's tree degenerates
    for level in e.levels:
        grid = grid_of(e.ends, level)
        noise = Stored(list(path.increments(grid)), e.ends[0])
        for solver, ys in zip(e.solvers, found, strict=True):
            ys[level] = solve(e.sde, solver, start, grid, path=noise).y
    theirs, ts = TorchsdeSDE(e.sde, start.shape[-1]), torch.tensor(e.ends, dtype=torch.float64)
    method = TORCHSDE_METHODS[e.sde.sde_type][0]
    truth = [
        torchsde.sdeint(theirs, start, ts, bm=interval, method=method, dt=T / 2**level)[-1]
        for level in (e.finest, e.finest - 1)
    ]
    return found, truth


class TorchsdeSDE(torch.nn.Module):
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


def sweep(e: Experiment, error: Callable[[Tensor, Tensor], Tensor]) -> tuple[list[Tensor], Tensor]:
    """Solve all paths, block by block; rank r processes blocks r, r + world_size, ...

    Args:
        error: of two final states, (paths, *event) -> (paths,).

    Returns:
        the (paths, refinements) errors of each solver, to the reference or else to the next finer refinement, and
        those of the reference at its two resolutions, (paths,); on the CPU, and the same in each process.
    """
    rank, world = rank_and_world()
    out = [torch.zeros(e.paths, len(e.levels), dtype=torch.float64) for _ in e.solvers]
    own = torch.zeros(e.paths, dtype=torch.float64)
    size = interval_size(e) if e.truth == "torchsde" else _block_size(e, world)
    starts = list(range(0, e.paths, size))
    for k in progress(starts, "block", show=len(starts) > 1):
        if (k // size) % world != rank:
            continue
        count = min(size, e.paths - k)
        rows = slice(k, k + count)
        for mirror in (False, True) if e.antithetic else (False,):
            share = 0.5 if e.antithetic else 1.0
            ends, truth = torchsde_ends(e, k, count) if e.truth == "torchsde" else own_ends(e, k, count, mirror)
            for mine, ys in zip(out, ends, strict=True):
                errors = [error(ys[n], ys[n + 1] if e.truth is None else truth[0]) for n in e.levels]
                mine[rows] += share * torch.stack(errors, 1).to("cpu", torch.float64)
            if len(truth) > 1:
                own[rows] += share * error(*truth).to("cpu", torch.float64)
    # each row is non-zero in one process only: the sum is bitwise that of a single process
    return [sum_over_processes(o) for o in out], sum_over_processes(own)


def _block_size(e: Experiment, world: int) -> int:
    """Paths per block: what the memory budget allows, and no fewer blocks than processes."""
    if e.block is not None:
        return e.block
    shape = e.noise_shape(1)
    per_step = "WHK".index(e.levy) + 1 + (2 * shape[-1] if e.area and len(shape) > 1 else 2 * e.area)
    # a refinement and the next coarser one are held at once
    bytes_each = 1.5 * 2**e.finest * torch.Size(shape).numel() * per_step * e.dtype.itemsize
    return max(1, min(int(_budget(e) / bytes_each), -(-e.paths // world)))


def interval_size(e: Experiment) -> int:
    """Paths of one torchsde.BrownianInterval: a power of two whose W and U at the finest of the levels fit."""
    if e.device == "cpu":
        return INTERVAL
    bytes_each = 2 * 2 ** e.levels[-1] * torch.Size(e.noise_shape(1)).numel() * e.dtype.itemsize
    return min(1 << max(int(_budget(e) / bytes_each).bit_length() - 1, 0), LARGEST)


def _budget(e: Experiment) -> int:
    return BUDGET if e.device == "cpu" else 32 * BUDGET
