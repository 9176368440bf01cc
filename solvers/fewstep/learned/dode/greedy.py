"""The sequential fit: closed-form least squares on the student's own states, row after row.

Row i of a plan ends in an outcome, the input of row i + 1 or the final state. With the newest evaluation
d_i replaced by d_i + sum_j kappa_j (d_i - d_{i-j}) the outcome moves by sum_j kappa_j g_j, where
g_j = w (d_i - d_{i-j}) and w is d_i's weight in it: least squares against the teacher's state at the same
level, over samples and elements, has the normal equations <g_a, g_b> kappa_b = <g_a, r>.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._distributed import sum_over_processes
from ...errors import InputError
from ...plan import Plan
from .fitting_state import Teacher, Walk, Work, apply, rmse, weight, widened

CUT = 1e-12  # of the largest eigenvalue: directions that float64 sums cannot tell from dependent ones

Group = list[tuple[Walk, Iterator[Tensor]]]


@dataclass(frozen=True)
class Fit:
    """A table on its way, with its distances to the teacher on held-out noise."""

    plan: Plan
    kappa: Tensor
    r2: list[float]
    kept: list[bool]
    base_rmse: float
    student_rmse: float
    made: str = "greedy"  # in words


@torch.no_grad()
def greedy(work: Work, base: Plan, teacher: Teacher, terms: int, guard: bool, progress: bool) -> Fit:
    """Fit row after row, each from the states that the rows before have led to."""
    from tqdm import trange

    if terms < 1:
        raise InputError(f"terms: got {terms}, expected at least 1.")
    plan = widened(base, terms)
    kappa = torch.zeros(plan.nfe, terms, dtype=torch.float64)
    fitted, held = (_group(work, plan, teacher, which, terms) for which in (work.kept, work.held))
    r2, kept = [0.0] * plan.nfe, [False] * plan.nfe
    # disable=None: a bar on a terminal, none in a pipe
    for i in trange(plan.nfe, desc="fit", disable=None if progress else True, leave=False):
        sums = _evaluate(fitted, i, terms)
        if not math.isfinite(sums.rr):
            raise InputError("problem: its model gives values that are not finite, from such start states.")
        solution = sums.solve()
        test = _evaluate(held, i, terms)
        if len(solution) and (not guard or test.gain(solution) > 0):
            apply(plan, i, solution)
            kappa[i, : len(solution)] = solution
            r2[i], kept[i] = sums.gain(solution) / max(sums.rr, 1e-300), True
        for walk, _ in [*fitted, *held]:
            walk.go(i)
            walk.forget(i)
    del fitted, held  # their states, before the table is tried
    distances = [rmse(work, p, work.held, teacher) for p in (base, plan)]
    return Fit(plan, kappa, r2, kept, distances[0], distances[1])


def _group(work: Work, plan: Plan, teacher: Teacher, which: Tensor, terms: int) -> Group:
    walks = [work.walk(plan, index, terms) for index in work.share(which)]
    return [(walk, teacher.walk(walk.problem, walk.x)) for walk in walks]


def _evaluate(group: Group, i: int, terms: int) -> _Sums:
    """Row i's evaluation of each batch, and the normal equations of its outcome."""
    sums = _Sums(min(terms, i))
    for walk, targets in group:
        walk.evaluate(i)
        sums.add(walk, i, next(targets))
    return sums.everywhere()


class _Sums:
    """Normal equations of one row, summed over batches in float64."""

    def __init__(self, terms: int) -> None:
        self.G = torch.zeros(terms, terms, dtype=torch.float64)
        self.g, self.rr = torch.zeros(terms, dtype=torch.float64), 0.0

    def add(self, walk: Walk, i: int, target: Tensor) -> None:
        """The outcome of row i against its target, without changing the walk."""
        x = walk.x
        walk.go(i)
        r = (target - walk.look(i + 1)).flatten().double()
        walk.x = x
        new, *old = walk.history
        directions = [(new - D).flatten().double() * weight(walk.plan, i) for D in old[: len(self.g)]]
        self.rr += float(r @ r)
        for a, u in enumerate(directions):
            self.g[a] += float(u @ r)
            for b, v in enumerate(directions[: a + 1]):
                self.G[a, b] += float(u @ v)

    def everywhere(self) -> _Sums:
        """Summed over processes, where there are several."""
        packed = torch.cat([self.G.flatten(), self.g, torch.tensor([self.rr], dtype=torch.float64)])
        n, packed = len(self.g), sum_over_processes(packed)
        self.G, self.g, self.rr = packed[: n * n].reshape(n, n), packed[n * n : -1], float(packed[-1])
        self.G = self.G.tril() + self.G.tril(-1).T
        return self

    def solve(self) -> Tensor:
        """kappa; none where the evaluations did not move, or are not finite."""
        if not 0 < float(self.G.trace()) < math.inf:
            return self.g[:0]
        values, vectors = torch.linalg.eigh(self.G)
        # of dependent directions the shortest combination; a ridge would bend the others too
        inverse = torch.where(values > CUT * values[-1], 1 / values, 0.0)
        kappa: Tensor = vectors @ (inverse * (vectors.T @ self.g))
        return kappa

    def gain(self, kappa: Tensor) -> float:
        """How much kappa lowers the squared distance."""
        return float(2 * kappa @ self.g - kappa @ self.G @ kappa)
