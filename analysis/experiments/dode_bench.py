"""Shared by the D-ODE experiments: bases, ways of fitting, and a bench that judges them on held-out noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from base import Row, colour, curve, table, ticks
from fewstep.untrained import plan_of
from fewstep_analysis.distillation import Task
from fewstep_analysis.sampler_work import SOLVERS as NAMED
from memory import PeakMemory

UNTRAINED, GREEDY, TERMS, TABLE = "untrained", "greedy, 1 term", "greedy, 3 terms", "fitted table"
KINDS = (UNTRAINED, GREEDY, TERMS)
ANY = "fit_table"  # the base of fitted tables, which choose their own
WAYS: dict[str, Row] = {GREEDY: {}, TERMS: {"terms": 3}}
STYLES = {
    UNTRAINED: ("0.5", ":"), GREEDY: ("#56B4E9", "--"), TERMS: ("#0072B2", "-."),
    TABLE: ("#D55E00", "-"),
}  # fmt: skip
BEST = "best untrained"
SPACINGS = ("logsnr", "karras", "uniform")
SOLVERS = NAMED | {"DPMSolver(1)": fs.DPMSolver(1), "DPMSolver(2M)": fs.DPMSolver(2, multistep=True)}
# families of untrained samplers, and the solver whose colour each has in the figures
PEERS = {
    "DPM-Solver++": ("DPMSolverPP(2)", "DPMSolverPP(3)"), "UniPC": ("UniPC(2)", "UniPC(3)"),
    "DEIS": ("DEIS(2)", "DEIS(3)"), "iPNDM": ("IPNDM(2)", "IPNDM(3)", "IPNDM(4)"),
}  # fmt: skip
PEER_SHADES = {
    "DPM-Solver++": "DPMSolverPP",
    "UniPC": "UniPC",
    "DEIS": "LogODE",
    "iPNDM": "DerivativeFreeMilstein",
}


@dataclass
class Bench:
    """Initial states to fit to and others to judge on, with the exact ODE's final states.

    Attributes:
        fitted, labels: what tables are fitted to.
        test, test_labels: what they are judged on.
        exact: final states of `test`.
        rows: one per solver measured.
        made: those solvers by base, kind and number of evaluations.
    """

    task: Task
    fitted: Tensor
    test: Tensor
    labels: Tensor | None
    test_labels: Tensor | None
    exact: Tensor
    rows: list[Row] = field(default_factory=list)
    made: dict[tuple[str, str, int], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task, fit: int, test: int, seed: int, steps: int = 400) -> Bench:
        """`exact` is UniPC(3) with so many steps even in log sigma."""
        noise, others = task.noise(fit, seed), task.noise(test, seed + 99)
        bench = cls(task, noise, others, task.labels(fit, seed), task.labels(test, seed + 99), others)
        bench.exact = bench.sample(fs.UniPC(3), steps=steps)
        return bench

    @torch.no_grad()
    def sample(self, solver: Any, batch: int = 512, **grid: Any) -> Tensor:
        """The final states of the test states."""
        parts = []
        for index in torch.arange(len(self.test)).split(batch):
            labels = None if self.test_labels is None else self.test_labels[index]
            parts.append(fs.sample(self.task.at(labels), solver, noise=self.test[index], **grid))
        return torch.cat(parts)

    def rmse(self, ends: Tensor) -> float:
        """To the exact ODE: per element of an image, of the vector for points."""
        gap = (ends - self.exact).double().square().flatten(1)
        return float((gap.mean(1) if len(self.task.event) > 1 else gap.sum(1)).mean().sqrt())

    def plan(self, name: str, n: int, spacing: str) -> fs.Plan | None:
        """A solver's plan of n evaluations or of the most below it, where there is one."""
        return plan_of(SOLVERS[name], n, spacing, self.task.schedule)

    def fit(self, base: str, n: int, spacing: str = "logsnr", **options: Any) -> Any:
        """The table of `n` evaluations fitted to a base, and its report."""
        plan = self.plan(base, n, spacing)
        assert plan is not None
        return fs.distill_dode(self.task.problem, SOLVERS[base], noise=self.fitted, labels=self.labels,
                               sigmas=plan.sigmas, **options)  # fmt: skip

    def keep(self, base: str, kind: str, n: int, made: Any, **more: Any) -> Tensor:
        """Judge a solver and keep its row; returns its final states."""
        ends = self.sample(made)
        self.made[base, kind, n] = made
        row = {"base": base, "kind": kind, "budget": n, "evaluations": getattr(made, "plan", made).nfe}
        self.rows.append(row | {"rmse": self.rmse(ends), "seconds": 0.0} | more)
        return ends

    def learned(self, base: str, n: int, kinds: dict[str, Row] = WAYS, spacing: str = "logsnr") -> dict[str, Tensor]:
        """Judge the base and each way of fitting it; returns the final states by kind."""
        plan = self.plan(base, n, spacing)
        if plan is None:
            return {}
        ends = {UNTRAINED: self.keep(base, UNTRAINED, n, plan)}
        for kind, options in kinds.items():
            start = time.process_time()  # of this program alone: other work may run on the machine
            student, report = self.fit(base, n, spacing, **options)
            facts: Row = {"seconds": round(time.process_time() - start, 2)}
            facts |= {"fallback": report.fallback} if report.fallback else {}
            ends[kind] = self.keep(base, kind, n, student, **facts)
        return ends

    def table(self, n: int, most: int = 512, **options: Any) -> Tensor:
        """Judge the fitted table of n evaluations, from at most so many of the states."""
        start, labels = time.process_time(), None if self.labels is None else self.labels[:most]
        made, report = fs.fit_table(self.task.problem, nfe=n, noise=self.fitted[:most], labels=labels, **options)
        facts: Row = {"seconds": round(time.process_time() - start, 2), "fallback": report.fallback}
        return self.keep(ANY, TABLE, n, made, which=report.start or report.base, **facts)

    def peers(self, n: int, spacings: Sequence[str] = SPACINGS, scout: Bench | None = None, kind: str = BEST) -> None:
        """Judge each family's best of its orders and of the spacings.

        It is chosen on the scout's initial states; without a scout on those it is judged on, in its favour.
        """
        judge = scout or self
        for family, names in PEERS.items():
            found = []
            for name in names:
                for spacing in spacings:
                    plan = self.plan(name, n, spacing)
                    if plan is not None and plan.nfe == n:
                        found.append((judge.rmse(judge.sample(plan)), name, spacing, plan))
            _, name, spacing, plan = min(found, key=lambda f: f[:3])
            self.keep(family, kind, n, plan, which=f"{name}, {spacing}")

    def row(self, base: str, kind: str, n: int) -> Row:
        """The row of a solver measured."""
        return next(r for r in self.rows if (r["base"], r["kind"], r["budget"]) == (base, kind, n))


def gains(rows: list[Row], counts: Sequence[int], kinds: Sequence[str] = (UNTRAINED, BEST)) -> dict[str, float]:
    """Per count, the smallest error of these untrained kinds over the smallest of the learned ones."""

    def least(n: int, among: Sequence[str]) -> float:
        return min(r["rmse"] for r in rows if r["budget"] == n and r["kind"] in among)

    return {str(n): least(n, kinds) / least(n, (GREEDY, TERMS, TABLE)) for n in counts}


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that tensors take at a time while a function runs."""
    with PeakMemory() as memory, torch.no_grad():
        run()
    return memory.peak


def cell(found: dict[Any, Row], base: str, kind: str, n: int) -> str:
    """The error of a row; "base" where a fit fell back to its base."""
    row, untrained = found.get((base, kind, n)), found.get((base, UNTRAINED, n))
    if row is None:
        return ""
    same = kind != UNTRAINED and untrained is not None and row["rmse"] == untrained["rmse"]
    return "base" if same else f"{row['rmse']:.2g}"


def bases_table(rows: list[Row], counts: Sequence[int] = (5, 8, 10)) -> str:
    """RMSE of every base and way of fitting, at several counts of evaluations per cell."""
    found = {(r["base"], r["kind"], r["budget"]): r for r in rows}
    lines = []
    for base in dict.fromkeys(r["base"] for r in rows if r["kind"] == GREEDY):
        cells = [[cell(found, base, kind, n) for n in counts if (base, UNTRAINED, n) in found] for kind in KINDS]
        lines.append([base, *(" / ".join(c) if any(c) else None for c in cells)])
    cells = [cell(found, ANY, TABLE, n) for n in counts]
    lines += [[f"{TABLE}, from any base", " / ".join(c or "-" for c in cells)]] if any(cells) else []
    return table(["base", *KINDS], [[*line, *[None] * (1 + len(KINDS) - len(line))] for line in lines])


def draw_errors(axes: Any, rows: list[Row], counts: Sequence[int], widths: dict[str, float]) -> None:
    """Error against evaluations: untrained families dotted, and the fits of bases with these line widths."""

    def points(base: str, kind: str) -> list[tuple[float, float]]:
        return [(r["evaluations"], r["rmse"]) for r in rows if (r["base"], r["kind"]) == (base, kind)]

    for family, shade in PEER_SHADES.items():
        label = f"{family}, untrained"
        curve(axes, points(family, BEST), ":", color=colour(shade), marker="s", ms=3, lw=1, label=label)
    for base, width in widths.items():
        for kind, (shade, style) in STYLES.items():
            if kind != TABLE and (kind != UNTRAINED or base == "DDIM"):
                label = f"{base}, {kind}"
                curve(axes, points(base, kind), style, color=shade, marker="o", ms=3, lw=width, label=label)
    shade, style = STYLES[TABLE]
    curve(axes, points(ANY, TABLE), style, color=shade, marker="o", ms=3, lw=1.8, label=TABLE)
    axes.set_xlabel("network evaluations")
    ticks(axes, counts)
