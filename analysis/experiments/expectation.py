"""Multilevel Monte Carlo against plain Monte Carlo: evaluations for an expectation by tolerance, and the levels.

Calls on geometric Brownian motion and on Heston's model, whose prices are known; each tolerance with several seeds.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fewstep as fs
from base import F64, Experiment, Job, Record, canvas, colour, progress, single_threaded, table, ticks, write
from fewstep_analysis.expectation import Expectation, expectation

RATE, VOLATILITY = 0.05, 0.2
KAPPA, THETA, XI, RHO = 5.0, 0.04, 0.25, -0.5  # of Heston's model, as in Giles 2008


@dataclass(frozen=True)
class Budget:
    """Tolerances of prices of about 10, seeds per tolerance, and the least tolerance at which plain paths are run."""

    tolerances: tuple[float, ...]
    seeds: int
    plain: float


BUDGETS = {"smoke": Budget((0.8,), 1, 0.8), "paper": Budget((0.8, 0.4, 0.2, 0.1, 0.05), 10, 0.2)}


class Case(NamedTuple):
    """A problem with its price."""

    sde: fs.SDE
    solver: fs.StochasticSolver
    y0: Tensor
    payoff: Any
    exact: float


def black_scholes() -> float:
    """The price of the call at the money."""
    d, cdf = (RATE + VOLATILITY**2 / 2) / VOLATILITY, NormalDist().cdf
    return 100 * cdf(d) - 100 * math.exp(-RATE) * cdf(d - VOLATILITY)


def heston() -> fs.SDE:
    """The logarithm of the price and its variance; the square root of a negative variance is taken as zero."""

    def drift(t: Tensor, y: Tensor) -> Tensor:
        v = y[..., 1].clamp(min=0)
        return torch.stack([RATE - 0.5 * v, KAPPA * (THETA - v)], -1)

    def diffusion(t: Tensor, y: Tensor) -> Tensor:
        root = y[..., 1].clamp(min=0).sqrt()[..., None, None]
        return root * y.new_tensor([[1.0, 0.0], [XI * RHO, XI * math.sqrt(1 - RHO**2)]])

    return fs.SDE(drift, diffusion, "general")


def heston_call() -> float:
    """The price at the money, by an integral of the characteristic function along Im u = -1/2 (after Lewis 2001)."""
    w = (torch.arange(40000, dtype=F64) + 0.5) * 0.005
    u = torch.complex(w, torch.full_like(w, -0.5))
    d = ((RHO * XI * 1j * u - KAPPA) ** 2 + XI**2 * (1j * u + u * u)).sqrt()
    a = KAPPA - RHO * XI * 1j * u - d
    ratio, decay = a / (a + 2 * d), (-d).exp()
    first = KAPPA * THETA / XI**2 * (a - 2 * ((1 - ratio * decay) / (1 - ratio)).log())
    second = 0.04 * a / XI**2 * (1 - decay) / (1 - ratio * decay)
    inside = (1j * u * RATE + first + second).exp() / (w * w + 0.25)
    return 100 - 100 * math.exp(-RATE) / math.pi * float(inside.real.sum()) * 0.005


def cases() -> dict[str, Case]:
    """Each curve."""
    stock = fs.SDE(lambda t, y: RATE * y, lambda t, y: VOLATILITY * y)
    one, two = torch.tensor([100.0], dtype=F64), torch.tensor([math.log(100.0), 0.04], dtype=F64)
    pay = lambda y: math.exp(-RATE) * (y[:, 0] - 100).clamp(min=0)  # noqa: E731
    pay_log = lambda y: math.exp(-RATE) * (y[:, 0].exp() - 100).clamp(min=0)  # noqa: E731
    return {
        "Milstein": Case(stock, fs.Milstein(), one, pay, black_scholes()),
        "EulerMaruyama": Case(stock, fs.EulerMaruyama(), one, pay, black_scholes()),
        "Heston": Case(heston(), fs.EulerMaruyama(), two, pay_log, heston_call()),
    }


def plain(case: Case, report: Expectation, seed: int) -> dict[str, float]:
    """Plain Monte Carlo with the steps and the number of paths of the report."""
    start, sums, count = time.perf_counter(), torch.zeros(2, dtype=F64), report.plain_paths
    grid, block = torch.linspace(0, 1, report.levels[-1].steps + 1), 1 << 16
    for k in range(0, count, block):
        y0 = case.y0.expand(min(block, count - k), -1)
        paid = case.payoff(fs.solve(case.sde, case.solver, y0, grid, seed=seed + k).y)
        sums += torch.stack([paid.sum(), paid.square().sum()])
    mean = float(sums[0] / count)
    error = math.sqrt((float(sums[1] / count) - mean**2) / count)
    return {"value": mean, "sampling": error, "seconds": time.perf_counter() - start}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Per case and tolerance: evaluations, seconds and how many intervals cover the price; levels at the least one."""
    single_threaded()
    data: dict[str, Any] = {}
    for name, case in progress(cases().items(), "case"):
        rows = []
        for tolerance in budget.tolerances:
            start = time.perf_counter()
            reports = [
                expectation(case.sde, case.solver, case.y0, (0, 1), case.payoff, tolerance=tolerance, seed=job.seed + k)
                for k in range(budget.seeds)
            ]
            seconds = (time.perf_counter() - start) / budget.seeds
            rows.append({
                "tolerance": tolerance, "seconds": seconds, "steps": max(r.levels[-1].steps for r in reports),
                "covered": sum(r.low < case.exact < r.high for r in reports), "seeds": budget.seeds,
                "rmse": math.sqrt(sum((r.value - case.exact) ** 2 for r in reports) / budget.seeds),
                "evaluations": sum(r.evaluations for r in reports) / budget.seeds,
                "plain_evaluations": sum(r.plain_evaluations for r in reports) / budget.seeds,
                "plain": plain(case, reports[0], job.seed) if tolerance >= budget.plain else None,
            })  # fmt: skip
        levels = [asdict(level) for level in reports[0].levels]
        data[name] = {"exact": case.exact, "rows": rows, "levels": levels}
    return {"expectation": Record("expectations", data, job.seed)}


def tables(records: dict[str, Record]) -> dict[str, str]:
    """Evaluations of both by tolerance, and the coverage."""
    titles = {
        "Milstein": "call, `Milstein`",
        "EulerMaruyama": "call, `EulerMaruyama`",
        "Heston": "Heston, `EulerMaruyama`",
    }
    lines = [
        [
            titles[name], f"{row['tolerance']:g}", f"{row['rmse']:.2g}", f"{row['covered']} of {row['seeds']}",
            row["steps"], f"{row['evaluations']:.2g}", f"{row['plain_evaluations']:.2g}",
            f"{row['plain_evaluations'] / row['evaluations']:.2g}",
        ]
        for name, found in records["expectation"].data.items()
        for row in found["rows"]
    ]  # fmt: skip
    head = ["problem", "tolerance", "RMSE", "covered", "most steps", "evaluations", "plain Monte Carlo", "ratio"]
    return {"expectation": table(head, lines)}


def draw(records: dict[str, Record], folder: Path) -> None:
    """Evaluations by tolerance with the slopes -2 and -3; variances of the levels."""
    data = records["expectation"].data
    drawing, (left, right) = canvas(9.6, 4.0, ncols=2)
    shades = {"Milstein": colour("Milstein"), "EulerMaruyama": colour("EulerMaruyama"), "Heston": colour("SigStep")}
    for name, found in data.items():
        x = [row["tolerance"] for row in found["rows"]]
        left.loglog(x, [row["evaluations"] for row in found["rows"]], "o-", color=shades[name], ms=4)
        left.loglog(x, [row["plain_evaluations"] for row in found["rows"]], "s:", color=shades[name], ms=4, mfc="white")
        steps = [level["steps"] for level in found["levels"]]
        label = name if name != "Heston" else "Heston, EulerMaruyama"
        right.loglog(steps[1:], [level["variance"] for level in found["levels"][1:]], "o-", color=shades[name], ms=4,
                     label=label)  # fmt: skip
        right.loglog(steps, [level["payoff_variance"] for level in found["levels"]], "s:", color=shades[name], ms=4,
                     mfc="white")  # fmt: skip
    x, low = [row["tolerance"] for row in data["Milstein"]["rows"]], data["Milstein"]["rows"][0]["evaluations"] / 2.5
    high = data["Milstein"]["rows"][0]["plain_evaluations"] * 2.5
    for at, power in ((low, 2), (high, 3)):
        left.loglog(x, [at * (x[0] / v) ** power for v in x], "-", color="0.6", lw=0.8)
        left.annotate(f"slope -{power}", (x[-1], at * (x[0] / x[-1]) ** power), color="0.4", fontsize=8,
                      xytext=(4, 0), textcoords="offset points", va="center", annotation_clip=False)  # fmt: skip
    ticks(left, x)
    left.invert_xaxis()
    left.set(xlabel="tolerance", ylabel="drift evaluations", title="Multilevel (solid), plain (dotted)")
    right.set(xlabel="steps of the level", title="Variance of differences (solid), of payoffs (dotted)")
    right.set_xscale("log", base=2)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(True, which="major", alpha=0.3)
    write(drawing, folder / "expectation.svg")


EXPERIMENT = Experiment(
    "expectation", __doc__, 5, BUDGETS, measure, tables, draw, ("expectation",), ("expectation.svg",)
)

if __name__ == "__main__":
    EXPERIMENT.main()
