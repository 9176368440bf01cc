"""Learned samplers of papers, as tables that are functions of a few numbers, and their training by Adam.

Each is written from its paper in the notation of `fewstep.learned.table`: what the inputs of the evaluations and the
final state are made of. Levels are given as logarithms, scores as eps = (x - D) / sigma. Data-dependent networks
(AMED's and EPD's bottleneck features) are replaced by one number for all samples, and LD3's start states do not move.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fewstep as fs
from fewstep.learned.table.coefficients import Coefficients
from fewstep.learned.table.objective import Pairs
from fewstep.learned.table.unrolled import pulled_back
from fewstep.schedule import Schedule

ADAMS = ((1.0, 0.0, 0.0), (1.5, -0.5, 0.0), (23 / 12, -16 / 12, 5 / 12))  # iPNDM(3), the newest evaluation first
RATE, BATCH, LOOK = 0.02, 64, 20  # of Adam; iterations between looks at the held-out states
SMALLEST = 0.05  # gap of levels at the start, in log sigma
SPACINGS = ("logsnr", "karras", "trailing")  # the best at the start is taken

Table = tuple[Tensor, Tensor]
"""Weights (R + 1, 1 + R) and the logarithms of the levels that the network is given (R,)."""


class Rows:
    """Inputs and levels of evaluations, collected while a sampler runs on symbols."""

    def __init__(self, rows: int) -> None:
        self.symbols = torch.eye(1 + rows, dtype=torch.float64)
        self.inputs: list[Tensor] = []
        self.levels: list[Tensor] = []

    def evaluated(self, x: Tensor, level: Tensor) -> Tensor:
        """The symbol of the network's answer."""
        self.inputs.append(x)
        self.levels.append(level)
        return self.symbols[len(self.inputs)]

    def table(self, end: Tensor) -> Table:
        return torch.stack([*self.inputs, end]), torch.stack(self.levels)


@dataclass(frozen=True)
class Method:
    """A sampler of a number of evaluations.

    Attributes:
        start: numbers to begin with.
        table: the table as a differentiable function of them.
        turns: masks of the numbers that are trained in turns; one of ones trains all.
    """

    start: Tensor
    table: Callable[[Tensor], Table]
    turns: tuple[Tensor, ...]


def multistep(levels: Tensor, given: Tensor, weights: Tensor) -> Table:
    """x' = x + (s' - s) sum_j weights_ij eps_{i-j}, to 0 at the end."""
    rows, past = Rows(len(levels)), list[Tensor]()
    x, s = rows.symbols[0], torch.cat([levels.exp(), levels.new_zeros(1)])
    for i in range(len(levels)):
        past.insert(0, (x - rows.evaluated(x, given[i])) / s[i])
        x = x + (s[i + 1] - s[i]) * sum(w * e for w, e in zip(weights[i], past))
    return rows.table(x)


def method(name: str, schedule: Schedule, nfe: int, spacing: str) -> Method | None:
    """The sampler of a paper; None where it has none of this number of evaluations."""
    if name in ("AMED", "EPD"):
        return middles(schedule, nfe, spacing, 1 if name == "AMED" else 2)
    first, last = math.log(schedule.sigma_max), math.log(schedule.sigma_min)
    grid = fs.sigma_grid(schedule, nfe, spacing)[:-1].log()
    gaps = (-torch.cat([grid, grid.new_tensor([last])]).diff()).clamp(min=SMALLEST).log()
    adams = torch.tensor([ADAMS[min(i, 2)] for i in range(nfe)], dtype=torch.float64)
    below = torch.ones(nfe + 1, 1 + nfe).tril().bool()
    below[0] = False
    unit = torch.ones(1 + nfe, dtype=torch.float64)
    unit[0] = 1 / schedule.sigma_max  # of the start state
    sizes = {
        "LD3": (nfe, nfe), "S4S-Alt": (nfe, nfe, 3 * nfe), "GS": (nfe, nfe, int(below.sum())),
        "BNS": (nfe, nfe, int(below.sum())),
    }[name]  # fmt: skip

    def table(numbers: Tensor) -> Table:
        free, shift, *more = numbers.split(sizes)
        falls = (first - last) * free.softmax(0).cumsum(0)
        levels = first - torch.cat([falls.new_zeros(1), falls[:-1]])
        used = adams + more[0].reshape(nfe, 3) if name == "S4S-Alt" else adams
        if name == "BNS":  # its weights do not follow the levels
            weights, _ = multistep(grid, grid, adams)
        else:
            weights, _ = multistep(levels, levels, used)
        if name in ("GS", "BNS"):
            weights = weights + torch.zeros_like(weights).masked_scatter(below, more[0]) * unit
        return weights, (levels + shift).clamp(last, first)

    count = sum(sizes)
    start = torch.cat([gaps, torch.zeros(count - nfe, dtype=torch.float64)])
    ones, grids = torch.ones(count), (torch.arange(count) < 2 * nfe).double()
    return Method(start, table, (grids, 1 - grids) if name == "S4S-Alt" else (ones,))


def middles(schedule: Schedule, nfe: int, spacing: str, parallel: int) -> Method | None:
    """AMED (one middle point per step) and EPD (several in parallel, whose mean is taken).

    Numbers per step and point: where the point lies, the scale of the level that the network is given there, and its
    weight. EPD's steps take one batch of `parallel` evaluations, counted as one, as in its paper.
    """
    if nfe % 2:
        return None
    steps, rows = nfe // 2, nfe // 2 * (1 + parallel)
    s = torch.cat([fs.sigma_grid(schedule, steps, spacing)[:-1], torch.zeros(1, dtype=torch.float64)])
    low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)

    def table(numbers: Tensor) -> Table:
        where, scale, weight = numbers.reshape(3, steps, parallel).unbind()
        made = Rows(rows)
        x = made.symbols[0]
        for i in range(steps):
            D = made.evaluated(x, s[i].log().clamp(low, high))
            end = s[i + 1].clamp(min=schedule.sigma_min)
            points = []
            for k in range(parallel):
                level = torch.lerp(s[i].log(), end.log(), where[i, k].sigmoid())
                ratio = level.exp() / s[i]
                points.append((torch.lerp(D, x, ratio), level, k))
            eps = [
                (z - made.evaluated(z, (level + scale[i, k]).clamp(low, high))) / level.exp() for z, level, k in points
            ]
            used = 1 + weight[i] / s[i].clamp(min=1)  # so that a number moves the state by as much at every level
            x = x + (s[i + 1] - s[i]) * sum(w * e for w, e in zip(used, eps)) / parallel
        return made.table(x)

    apart = torch.linspace(-0.3, 0.3, parallel, dtype=torch.float64) if parallel > 1 else torch.zeros(1).double()
    start = torch.cat([apart.repeat(steps), torch.zeros(2 * steps * parallel, dtype=torch.float64)])
    return Method(start, table, (torch.ones(len(start)),))


def coefficients(made: Table) -> Coefficients:
    return Coefficients(made[0].detach(), made[1].detach())


def fitted(name: str, pairs: Pairs, nfe: int, seconds: float, seed: int) -> tuple[Coefficients | None, int]:
    """The table of a method after so many CPU seconds of Adam, the best on the held-out states; its iterations."""
    found = [m for s in SPACINGS if (m := method(name, pairs.model.schedule, nfe, s)) is not None]
    if not found:
        return None, 0
    chosen = min(found, key=lambda m: distance(pairs, coefficients(m.table(m.start)), pairs.kept[: pairs.batch]))
    began, generator = time.process_time(), torch.Generator().manual_seed(seed)
    numbers = chosen.start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([numbers], RATE)
    best = numbers.detach().clone()
    least = distance(pairs, coefficients(chosen.table(best)), pairs.held)
    for i in itertools.count():
        share = (time.process_time() - began) / seconds
        if share >= 1 and i > 0:
            return coefficients(chosen.table(best)), i
        optimiser.param_groups[0]["lr"] = RATE * (0.5 + 0.5 * math.cos(math.pi * share) + 0.01)
        index = pairs.kept[torch.randperm(len(pairs.kept), generator=generator)[: min(BATCH, pairs.batch)]]
        made = chosen.table(numbers)
        c = coefficients(made)
        denoiser, run, ends = pairs.run(c, index)
        pull = 2 * (run.end - ends) / ends.numel()
        by_coefficient = pulled_back(c, denoiser, run, pull[None])[0].sum(0).double()
        (gradient,) = torch.autograd.grad(torch.cat([made[0].flatten(), made[1]]), numbers, by_coefficient)
        if bool(gradient.isfinite().all()):
            numbers.grad = gradient * chosen.turns[i // LOOK % len(chosen.turns)]
            optimiser.step()
        if i % LOOK == LOOK - 1 and (now := distance(pairs, coefficients(chosen.table(numbers)), pairs.held)) < least:
            best, least = numbers.detach().clone(), now
    raise AssertionError


@torch.no_grad()
def distance(pairs: Pairs, c: Coefficients, which: Tensor) -> float:
    """Mean square distance to the teacher's ends."""
    total = torch.zeros(())
    for index in which.split(pairs.batch):
        _, run, ends = pairs.run(c, index)
        total = total + (run.end - ends).double().square().flatten(1).mean(1).sum()
    return float(total) / len(which)
