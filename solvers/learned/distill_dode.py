"""Fit a D-ODE table: closed-form least squares on the student's own states, row after row.

Row i of a plan ends in an outcome, the input of row i + 1 or the final state. With the newest evaluation
d_i replaced by d_i + sum_j kappa_j (d_i - d_{i-j}) the outcome moves by sum_j kappa_j g_j, where
g_j = w (d_i - d_{i-j}) and w is d_i's weight in it: least squares against the teacher's state at the same
level, over samples and elements, has the normal equations <g_a, g_b> kappa_b = <g_a, r>.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..diffusion.dpm_solver_pp import DPMSolverPP
from ..errors import InputError, one_of
from ..grid import check_sigmas, sigma_grid
from ..plan import Plan
from ..problem import Denoising
from ..solver import DiffusionSolver
from .dode import DODE, Fingerprint

ALIGNMENTS = ("exact", "official")
RIDGE = 1e-12  # of the trace: only keeps exactly dependent directions apart


@dataclass(frozen=True)
class DODEReport:
    """How a fit went.

    Attributes:
        r2: per row, the share of the squared distance to the teacher that the fit took away on its batch.
        kept: per row, whether the fit also helped on the held-out noise; else kappa is 0 there.
        base_rmse, student_rmse: distance to the teacher's final state on held-out noise.
        fallback: why the whole table is the base's, else "".
        evaluations: of the network by student and teacher in the fit, in units of the batch.
        seconds: wall time.
    """

    r2: list[float]
    kept: list[bool]
    base_rmse: float
    student_rmse: float
    fallback: str
    evaluations: int
    seconds: float


class Walk:
    """One batch on its way through a plan's rows; the table may be edited ahead of it."""

    def __init__(self, problem: Denoising, plan: Plan, x: Tensor) -> None:
        self.problem, self.plan, self.x = problem, plan, x
        self.history: list[Tensor] = []

    def look(self, i: int) -> Tensor:
        """The input of row i, or the final state behind the last row."""
        if i == self.plan.nfe:
            return self.x
        return self._combine(float(self.plan.c[i]), self.plan.d[i])

    def evaluate(self, i: int) -> None:
        """The network at row i's input, pushed on the history."""
        at, sigma = self.look(i), self.plan.sigma[i]
        D = self.problem.denoiser(at, sigma.to(at))
        self.history.insert(0, D if self.plan.prediction == "data" else (at - D) / float(sigma))
        del self.history[self.plan.b.shape[1] :]

    def go(self, i: int) -> None:
        """The state after row i."""
        self.x = self._combine(float(self.plan.a[i]), self.plan.b[i])

    def _combine(self, scale: float, weights: Tensor) -> Tensor:
        out = self.x * scale if scale != 0 else torch.zeros_like(self.x)
        for weight, D in zip(weights.tolist(), self.history):
            if weight != 0:
                out = out.add_(D, alpha=weight)
        return out


def distill_dode(
    problem: Denoising,
    base: DiffusionSolver,
    *,
    noise: Tensor,
    steps: int | None = None,
    sigmas: Tensor | None = None,
    spacing: str = "logsnr",
    final: str = "x0",
    terms: int = 1,
    teacher: DiffusionSolver | None = None,
    teacher_substeps: int = 10,
    alignment: str = "exact",
    guard: bool = True,
    batch: int = 256,
    refine: str | None = None,
    learn_grid: bool = False,
    **training: Any,
) -> tuple[DODE, DODEReport]:
    """Fit a few numbers a row to any deterministic solver's plan, in seconds and without training.

    Args:
        base: the solver to start from; any whose plan draws no noise.
        noise: (n, *event) start states at the first level; one in eight is held out, and n >= 16. They
            are sent through the denoiser in batches of other sizes and orders, so it must not hold one
            label a sample; fit class by class, or with labels that follow from the state.
        steps, sigmas, spacing, final: the grid, as in `fewstep.sample`.
        terms: history terms a row; 1 is the paper's.
        teacher: a one-evaluation solver; by default `DPMSolverPP(2)`. The paper takes the base itself.
        teacher_substeps: teacher steps for each interval between the plan's levels.
        alignment: `"exact"` compares states at the same level; `"official"` takes the released code's
            targets, which are up to one student step noisier, for reproduction only.
        guard: keep a row's fit only if it helps on the held-out noise, and the table only if it ends
            closer to the teacher there than the base.
        batch: samples in a network call; results do not depend on it. Under torch.distributed each
            process takes its share of these, and all end with the same table.
        refine: (one process) `"global"` goes on from the greedy table by gradient descent on the final
            state's error, through all steps; takes `iterations`, `rate`, `seed`, `progress`.
        learn_grid: with refine, train levels, the levels the network is told, and all history weights
            together. Thousands of iterations and a rate of 0.03 pay here.

    Returns:
        the student and a `DODEReport`.
    """
    began = time.perf_counter()
    _check(alignment, refine, learn_grid, training, batch, teacher_substeps)
    plan = _base_plan(problem, base, steps, sigmas, spacing, final)
    chunks, held = _split(noise / problem.schedule.alpha(plan.sigmas[:1]).item(), batch)
    fine = _Teacher(problem, teacher or DPMSolverPP(2), plan, teacher_substeps, alignment)
    fit = _greedy(problem, plan, fine, chunks, held, terms, guard)
    if refine:
        from .refine import refine_plan

        fit = refine_plan(problem, fit, fine, chunks, held, learn_grid, **training)
    fit, fallback = _guarded(fit, plan) if guard else (fit, "")
    student = DODE(fit.plan.renamed(f"DODE({plan.name})"), fit.kappa, Fingerprint.of(problem, noise))
    return student, DODEReport(
        fit.r2, fit.kept, fit.base_rmse, fit.student_rmse, fallback,
        plan.nfe + fine.plan.nfe + fit.evaluations, time.perf_counter() - began,
    )  # fmt: skip


def _check(
    alignment: str, refine: str | None, learn_grid: bool, training: dict[str, Any], batch: int, substeps: int
) -> None:
    if alignment not in ALIGNMENTS:
        raise one_of("alignment", alignment, ALIGNMENTS)
    if refine not in (None, "global") or (refine is None and (learn_grid or training)):
        raise one_of(f"refine (with {', '.join(['learn_grid', *training])})", refine, ("global",))
    if refine and _distributed():
        raise InputError("refine: got 'global' under torch.distributed; refine in one process.")
    if batch < 1 or substeps < 1:
        raise InputError(f"batch, teacher_substeps: got {batch}, {substeps}, wanted at least 1.")


def _guarded(fit: Fit, base: Plan) -> tuple[Fit, str]:
    """The base where the fit ends further from the teacher than it, and the reason."""
    if fit.student_rmse < fit.base_rmse:
        return fit, ""
    why = f"held-out distance to the teacher {fit.student_rmse:.3g}, with the base {fit.base_rmse:.3g}"
    return replace(fit, plan=base, kappa=torch.zeros_like(fit.kappa)), why


def _base_plan(
    problem: Denoising,
    base: DiffusionSolver,
    steps: int | None,
    sigmas: Tensor | None,
    spacing: str,
    final: str,
) -> Plan:
    if sigmas is None:
        if steps is None:
            raise InputError("steps: got None; wanted steps=... or sigmas=... for the grid.")
        sigmas = sigma_grid(problem.schedule, steps, spacing, final)
    plan = base.plan(check_sigmas(sigmas))
    if plan.levy:
        raise InputError(f"base: got {plan.name!r}, which draws noise; wanted a deterministic solver.")
    return plan


def _split(x: Tensor, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    if len(x) < 16:
        raise InputError(f"noise: got {len(x)} start states, wanted at least 16: two of them are held out.")
    every = torch.arange(len(x), device=x.device)
    rank, world = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size()) if _distributed() else (0, 1)
    )
    parts = [torch.split(x[which], batch) for which in (every % 8 > 0, every % 8 == 0)]
    return list(parts[0][rank::world]), list(parts[1][rank::world])


class _Teacher:
    """A fine solver that stops at the levels of a plan's outcomes."""

    def __init__(
        self, problem: Denoising, solver: DiffusionSolver, base: Plan, substeps: int, alignment: str
    ) -> None:
        self.problem, self.base, self.alignment = problem, base, alignment
        levels = [*base.sigma.tolist(), float(base.sigmas[-1])]
        nodes, self.stops = levels[:1], [0] * base.nfe
        order = sorted(range(1, len(levels)), key=lambda k: -levels[k])
        for k in order:
            start, end = nodes[-1], levels[k]
            if end < start:
                before = len(nodes)
                nodes += _between(start, end, substeps, problem.schedule.sigma_min)
                first = alignment == "official" and end > float(base.sigmas[-1])
                self.stops[k - 1] = before if first else len(nodes) - 1
            else:
                self.stops[k - 1] = len(nodes) - 1
        self.plan = solver.plan(torch.tensor(nodes, dtype=torch.float64))
        plain = bool((self.plan.c == 1).all()) and not bool(self.plan.d.any())
        if not plain or self.plan.nfe != len(nodes) - 1 or self.plan.levy:
            raise InputError(
                f"teacher: got {self.plan.name!r}, wanted a deterministic solver of one evaluation a step "
                "whose state is its next input, such as DDIM() or DPMSolverPP(2)."
            )

    def walk(self, x: Tensor) -> Iterator[Tensor]:
        """The states at the outcomes' levels, in the rows' order, each once asked for."""
        walk, seen, states = Walk(self.problem, self.plan, x), 0, {0: x}
        for stop in self.stops:
            while seen < stop:
                walk.evaluate(seen)
                walk.go(seen)
                seen += 1
                states[seen] = walk.x
            yield states[stop]
            for old in [k for k in states if k < stop]:
                del states[old]


def _between(start: float, end: float, substeps: int, smallest: float) -> list[float]:
    """Levels after start down to end, even in log sigma; on the way to 0 not below the smallest."""
    if end > 0:
        return [start * (end / start) ** (k / substeps) for k in range(1, substeps)] + [end]
    low = min(start, smallest)
    inner = [] if low >= start * (1 - 1e-9) else _between(start, low, substeps - 1 or 1, smallest)
    return [*inner, 0.0]


@dataclass(frozen=True)
class Fit:
    """A table on its way, with its distances to the teacher on held-out noise."""

    plan: Plan
    kappa: Tensor
    r2: list[float]
    kept: list[bool]
    base_rmse: float
    student_rmse: float
    evaluations: int = 0  # beyond the greedy fit's


@torch.no_grad()
def _greedy(
    problem: Denoising, base: Plan, teacher: _Teacher, chunks: list[Tensor], held: list[Tensor],
    terms: int, guard: bool,
) -> Fit:  # fmt: skip
    """Fit row after row, each from the states that the rows before have led to."""
    if terms < 1:
        raise InputError(f"terms: got {terms}, wanted at least 1.")
    grow = (0, max(0, terms + 1 - base.b.shape[1]))
    plan = replace(base, b=torch.nn.functional.pad(base.b, grow), d=torch.nn.functional.pad(base.d, grow))
    kappa = torch.zeros(plan.nfe, terms, dtype=torch.float64)
    groups = [[(Walk(problem, plan, x), teacher.walk(x)) for x in some] for some in (chunks, held)]
    r2, kept = [0.0] * plan.nfe, [False] * plan.nfe
    for i in range(plan.nfe):
        fits = []
        for group in groups:
            sums = _Sums(min(terms, i))
            for walk, targets in group:
                walk.evaluate(i)
                sums.add(walk, i, next(targets))
            fits.append(sums.everywhere())
        fitted, test = fits
        solution = fitted.solve()
        if len(solution) and (not guard or test.gain(solution) > 0):
            apply(plan, i, solution)
            kappa[i, : len(solution)] = solution
            r2[i], kept[i] = fitted.gain(solution) / max(fitted.rr, 1e-300), True
        for group in groups:
            for walk, _ in group:
                walk.go(i)
    distances = [rmse(problem, p, held, teacher) for p in (base, plan)]
    return Fit(plan, kappa, r2, kept, distances[0], distances[1])


class _Sums:
    """Normal equations of one row, summed over chunks in float64."""

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
            for b, v in enumerate(directions):
                self.G[a, b] += float(u @ v)

    def everywhere(self) -> _Sums:
        """Summed over processes, where there are several."""
        packed = torch.cat([self.G.flatten(), self.g, torch.tensor([self.rr], dtype=torch.float64)])
        n, packed = len(self.g), sum_over_processes(packed)
        self.G, self.g, self.rr = packed[: n * n].reshape(n, n), packed[n * n : -1], float(packed[-1])
        return self

    def solve(self) -> Tensor:
        """kappa; nought where the evaluations did not move."""
        ridge = RIDGE * float(self.G.trace())
        if not len(self.g) or ridge == 0:
            return self.g[:0]
        kappa: Tensor = torch.linalg.solve(self.G + ridge * torch.eye(len(self.g)).double(), self.g)
        return kappa

    def gain(self, kappa: Tensor) -> float:
        """How much kappa lowers the squared distance."""
        return float(2 * kappa @ self.g - kappa @ self.G @ kappa)


def weight(plan: Plan, i: int) -> float:
    """The newest evaluation's weight in row i's outcome."""
    return float(plan.b[i, 0] if in_state(plan, i) else plan.d[i + 1, 0])


def in_state(plan: Plan, i: int) -> bool:
    """Whether row i's outcome is the state itself; else the next input is formed apart from it."""
    return i + 1 == plan.nfe or (float(plan.c[i + 1]) == 1 and not bool(plan.d[i + 1].any()))


def apply(plan: Plan, i: int, kappa: Tensor) -> None:
    """Write O_i = d_i + sum_j kappa_j (d_i - d_{i-j}) into the table, in place."""
    row, w = (plan.b[i] if in_state(plan, i) else plan.d[i + 1]), weight(plan, i)
    row[0] += w * kappa.sum()
    row[1 : len(kappa) + 1] -= w * kappa


@torch.no_grad()
def rmse(problem: Denoising, plan: Plan, held: list[Tensor], teacher: _Teacher) -> float:
    """Root mean square distance to the teacher's final state, per element."""
    total, count = 0.0, 0
    for x in held:
        walk = Walk(problem, plan, x)
        for i in range(plan.nfe):
            walk.evaluate(i)
            walk.go(i)
        *_, target = teacher.walk(x)
        total += float((walk.x - target).double().square().sum())
        count += x.numel()
    total, count = sum_over_processes(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return float((total / count) ** 0.5)


def sum_over_processes(x: Tensor) -> Tensor:
    """All-reduced where torch.distributed runs, else x itself."""
    if _distributed():
        torch.distributed.all_reduce(x)
    return x


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
