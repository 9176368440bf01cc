"""A grid for one model and one solver: dynamic programming over a fine trajectory, then moves of single levels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .. import _validation
from .._progress import progress as progress_bar
from ..errors import InputError, named
from ..executor import run
from ..grid import FINALS, MOST, refined, sigma_grid
from ..plan import Plan
from ..problem import DiffusionModel
from ..samplers.dpm import DPMSolverPP
from ..solver import DiffusionSolver
from .labelled_model import Labelled, Model
from .loss_weighting import left_at_end
from .start_states import Work

MOST_NODES = 1000
SUBSTEPS = 2  # of the fine solution, per interval between nodes
POWERS = (0.0, 0.5, 1.0, 1.5, 2.0)  # of the share of a local error that is left at the end
GROWTHS = (1.1, 1.2, 1.3, 1.4)  # of GITS's costs, which are distances, from a step to the next
USUAL = ("logsnr", "karras", "uniform", "beta")
MOVES = (-4, -2, -1, 1, 2, 4)


@named
@torch.no_grad()
def fit_grid(
    problem: DiffusionModel | Labelled, steps: int, *, noise: Tensor, labels: Tensor | None = None,
    solver: DiffusionSolver | None = None, final: str = "x0", nodes: int = 64, sweeps: int = 2,
    batch: int | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    r"""Return the levels at which a deterministic solver samples this model best, without gradients.

    The levels are chosen among nodes that are even in log sigma. Along a fine solution x_i the cost of a DDIM step
    from node i to node j is

    .. math:: c_{ij} = w_j^{2p} \,\operatorname{mean}\|\mathrm{DDIM}(x_i;\,\sigma_i \to \sigma_j) - x_j\|^2,\qquad
        w_j = \frac{s^2}{s^2 + \sigma_j^2}

    with w the share of an error that is left at the end (s^2: the variance of the samples). Dynamic programming finds
    the path with the smallest sum for p = 0, 1/2, 1, 3/2, 2, and for GITS's costs: distances that count 1.1 to 1.4
    times more from step to step. The solver itself chooses among these paths and the usual spacings, by its distance to
    the end of the fine solution, and then moves single levels while the distance falls.

    Costs 2 * nodes evaluations per start state, and at most 14 + 6 * steps * sweeps runs of the solver.

    Args:
        problem: the model; with `labels` a function `labels -> DiffusionModel` of one label per sample.
        steps: the number of intervals of the grid, as in `fewstep.sigma_grid`.
        noise: (n, *event) start states at the schedule's largest level, n >= 16; 64 are usually enough.
        labels: (n, ...) one for each start state, distributed as in sampling.
        solver: the deterministic solver that will sample on the grid; by default `DPMSolverPP(2)`.
        final: `"x0"` or `"sigma_min"`, as in `fewstep.sigma_grid`.
        nodes: number of levels to choose from, more than steps.
        sweeps: most passes of moves over the levels; 0 keeps the result of the dynamic programming.
        batch: samples per network call; results do not depend on it. By default a quarter of the start states and at
            most 256. One batch of fine solutions, 2 * nodes states per sample, is held in memory.
        progress: show a progress bar on a terminal, in a pipe a line every 30 seconds.

    Returns:
        (steps + 1,) float64 decreasing levels, for `sigmas=`, or for `spacing=` at any number of steps.

    Raises:
        InputError: too few start states or nodes, labels that do not belong to them, a solver that draws noise.

    Source: GITS (Chen et al. 2024, arXiv 2405.11326) has the dynamic programming, with another cost; OSS (arXiv
    2503.21774) has it with the solver's own states.
    """
    model = Model.of(problem, labels, noise)
    _validation.check_choice("final", final, FINALS)
    steps = _validation.check_int("steps", steps, 1, MOST_NODES - 1)
    nodes = _validation.check_int("nodes", nodes, steps + 1, MOST_NODES)
    sweeps = _validation.check_int("sweeps", sweeps, 0)
    batch = _validation.check_int_or_none("batch", batch, 1, MOST)
    solver = DPMSolverPP(2) if solver is None else solver
    _validation.check_instance("solver", solver, DiffusionSolver, "a diffusion solver such as fewstep.UniPC(2)")
    levels = sigma_grid(model.schedule, nodes - 1, "logsnr", "sigma_min")
    work = Work.of(model, noise, float(levels[0]), batch)
    last = 0.0 if final == "x0" else float(levels[-1])
    search = Search(work, solver, levels, last, progress)
    return search.grid(search.moved(search.start(steps), sweeps))


@dataclass
class Search:
    """Paths of a solver through nodes, whose ends are compared with those of a fine solution.

    A path holds the nodes of a grid but its end, which is 0 or sigma_min.

    Attributes:
        levels: (N,) the nodes.
        last: the end of the grids, 0 or sigma_min.
    """

    work: Work
    solver: DiffusionSolver
    levels: Tensor
    last: float
    show: bool

    def __post_init__(self) -> None:
        fine = DPMSolverPP(2).plan(torch.cat([refined(self.levels, SUBSTEPS), self.levels.new_zeros(1)]))
        self.batches: tuple[Tensor, ...] = torch.split(torch.arange(len(self.work.x)), self.work.batch)
        found = [self._fine(fine, index) for index in progress_bar(self.batches, "batch", show=self.show)]
        self.costs: Tensor = torch.stack([costs for costs, _ in found]).sum(0).cpu()
        self.ends: list[Tensor] = [end for _, end in found]

    def _fine(self, plan: Plan, index: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors of DDIM steps between the nodes of a fine solution, (N, N + 1), the last to 0; its end."""
        states, estimates = [self.work.start(index)], []

        def keep(i: int, x: Tensor, D: Tensor) -> None:
            if i % SUBSTEPS == 0:
                estimates.append(D)
            if (i + 1) % SUBSTEPS == 0:
                states.append(x)

        run(plan, states[0], self.work.evaluator(plan, index), lambda *_: (), keep)
        targets, nodes = [*states, estimates[-1]], [*self.levels.tolist(), 0.0]
        costs = torch.full((len(states), len(targets)), math.inf, dtype=torch.float64, device=states[0].device)
        for i, (x, D) in enumerate(zip(states, estimates, strict=True)):
            for j in range(i + 1, len(targets)):
                ratio = nodes[j] / nodes[i]
                costs[i, j] = (torch.lerp(D, x, ratio) - targets[j]).double().square().sum()
        return costs, targets[-1] if self.last == 0 else states[-1]

    def grid(self, path: list[int]) -> Tensor:
        """The levels of a path."""
        return torch.cat([self.levels[path], self.levels.new_tensor([self.last])])

    def error(self, path: list[int]) -> float:
        """The squared distance of the solver's final states to those of the fine solution."""
        plan = self.solver.plan(self.grid(path), self.work.model.schedule)
        if plan.levy:
            raise InputError(f"solver: got {plan.name!r}, which draws noise; expected a deterministic solver.")
        gaps = [self.work.ends(plan, index) - end for index, end in zip(self.batches, self.ends, strict=True)]
        return float(torch.stack([gap.double().square().sum() for gap in gaps]).sum())

    def start(self, steps: int) -> list[int]:
        """The path that is best for the solver: of the dynamic programming with several costs, and the usual ones."""
        at = torch.cat([self.levels, self.levels.new_zeros(1)])
        weights = left_at_end(torch.cat(self.ends).cpu(), at).square()
        end = -1 if self.last == 0 else -2
        sums = [(self.costs * weights**p, 1.0) for p in POWERS] + [(self.costs.sqrt(), g) for g in GROWTHS]
        paths = [shortest(c[:, :-1], c[:, end], steps, growth) for c, growth in sums]
        return min([*paths, *self._usual(steps)], key=self.error)

    def _usual(self, steps: int) -> Iterator[list[int]]:
        """The paths nearest to the usual spacings, where their nodes differ."""
        for spacing in USUAL:
            sigmas = sigma_grid(self.work.model.schedule, steps, spacing)[:-1]
            path = (sigmas.log()[:, None] - self.levels.log()).abs().argmin(1).tolist()
            if all(a < b for a, b in pairwise([*path, len(self.levels) - int(self.last > 0)])):
                yield path

    def moved(self, path: list[int], sweeps: int) -> list[int]:
        """The path after moves of single nodes that bring the solver closer to the fine solution."""
        least = self.error(path)
        for _ in progress_bar(range(sweeps), "sweep", show=self.show):
            before = path
            for k in range(1, len(path)):
                for move in MOVES:
                    moved = [*path[:k], path[k] + move, *path[k + 1 :]]
                    room = [*moved, len(self.levels) - int(self.last > 0)]
                    if room[k - 1] < room[k] < room[k + 1] and (error := self.error(moved)) < least:
                        path, least = moved, error
            if path == before:
                break
        return path


def shortest(costs: Tensor, last: Tensor, steps: int, growth: float) -> list[int]:
    """The path of `steps` nodes from node 0 with the least sum of costs (N, N), and of `last` (N,) of its last node.

    Step k counts growth^k times.
    """
    left, choices = last, []
    for _ in range(steps - 1):
        left, choice = (costs + growth * left).min(1)
        choices.append(choice.tolist())
    path = [0]
    for choice in reversed(choices):
        path.append(choice[path[-1]])
    return path
