"""The strong order of the learned SDE step, which never sees the derivative of the diffusion.

For each problem a `SigStep` (Euler-Maruyama and five learned coefficients) is fitted, and measured next to
Euler-Maruyama and Milstein against torchsde's `srk` on the same BrownianInterval, on [0, 1]. The criterion:
the two finest local slopes at least 0.9, and at h = 2^-6 an RMSE of at most 1.3 times Milstein's. A second
measurement, by differences of levels, continues to finer steps, where the error of the coefficient c_1 shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from base import F64, Experiment, Job, Record, Row, canvas, colour, progress, table, write
from fewstep.learned.training import Report
from fewstep_analysis import problems
from fewstep_analysis.convergence import OrderEstimate, strong_orders
from fewstep_analysis.figures import draw_orders
from fewstep_analysis.problems import TestProblem
from fewstep_analysis.records import provenance

NAME = "sigdeg-order"
LEAST_SLOPE, MOST_RATIO, AT = 0.9, 1.3, 6  # the criterion; the ratio is taken at h = 2^-AT
STEPS = 16


@dataclass(frozen=True)
class Budget:
    """Problems; the fit; the measurement against torchsde; the one at finer steps."""

    cases: tuple[str, ...]
    trajectories: int
    iterations: int
    paths: int
    levels: range
    finer: range
    finer_paths: int


@dataclass(frozen=True)
class Case:
    """A problem, its equation for the figure, and the initial states of the fit's trajectories."""

    problem: TestProblem
    title: str
    y0: Tensor


def starts(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 256, dtype=F64).unsqueeze(1)


def sine() -> Case:
    return Case(problems.sine(), "dy = -2 sin y dt + (0.8 + 0.6 cos y) dW", starts(-2.5, 2.5))


def arctangent(p: float = 0.7) -> Case:
    """torchsde's scalar example as one diagonal component; y_t = atan(p W_t + tan y_0)."""
    sde = fs.SDE(lambda t, y: -p * p * torch.sin(y) * torch.cos(y) ** 3, lambda t, y: p * torch.cos(y) ** 2)
    problem = TestProblem("arctangent", sde, torch.full((1,), 0.3, dtype=F64))
    return Case(problem, f"dy = -{p * p:.2g} sin y cos³y dt + {p:g} cos²y dW", starts(-1.2, 1.2))


def hyperbolic_sine() -> Case:
    return Case(problems.hyperbolic_sine(), "dy = (y/2 + r) dt + r dW, r = √(1 + y²)", starts(-1.5, 1.5))


def igbm() -> Case:
    return Case(problems.igbm(), "dy = 0.1 (0.04 - y) dt + 0.6 y dW", starts(0.03, 0.12))


def torchsde_diagonal() -> Case:
    y0 = 0.5 + torch.rand(256, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    return Case(problems.torchsde_diagonal(), "three components, dy = μ y dt + σ y dW", y0)


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f for f in (sine, arctangent, hyperbolic_sine, igbm, torchsde_diagonal)
}
BUDGETS = {
    "smoke": Budget(
        cases=("sine", "igbm"), trajectories=512, iterations=20, paths=128, levels=range(4, 7),
        finer=range(4, 7), finer_paths=32,
    ),
    "paper": Budget(
        cases=tuple(CASES), trajectories=4096, iterations=300, paths=4096, levels=range(3, 11),
        finer=range(9, 14), finer_paths=256,
    ),
}  # fmt: skip


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Fit and measure each problem."""
    rows = [measure_case(CASES[name](), budget, job) for name in progress(budget.cases, "problem")]
    settings = {"steps": STEPS, "trajectories": budget.trajectories, "iterations": budget.iterations}
    settings |= {"at": AT, "least_slope": LEAST_SLOPE, "most_ratio": MOST_RATIO}
    return {NAME: Record(NAME, {"settings": settings, "rows": rows}, job.seed, provenance(job.device))}


def measure_case(case: Case, budget: Budget, job: Job) -> Row:
    """The fitted step of one problem, its orders, and the error of its coefficient c_1."""
    problem, start = case.problem, time.perf_counter()
    step, report = learned(case, budget, job.seed)
    seconds = time.perf_counter() - start
    options: dict[str, Any] = {"t1": 1.0, "seed": job.seed + 1, "device": job.device}
    found = strong_orders([fs.EulerMaruyama(), fs.Milstein(), step], problem, levels=budget.levels,
                          reference="torchsde", paths=budget.paths, **options)  # fmt: skip
    finer = strong_orders([fs.Milstein(), step], problem, levels=budget.finer, reference="levels",
                          paths=budget.finer_paths, **options)  # fmt: skip
    return {
        "problem": problem.name, "title": case.title, "seconds": round(seconds, 1), "fit": vars(report),
        "y0": [float(case.y0.min()), float(case.y0.max())], "ratio": ratio(found),
        "derivative_error": derivative_error(step, problem, job.seed),
        "estimates": [e.record().data for e in found], "finer": [e.record().data for e in finer],
    }  # fmt: skip


def learned(case: Case, budget: Budget, seed: int) -> tuple[fs.SigStep, Report]:
    """The fitted step of a problem, and the report of its training."""
    return fs.distill_sigdeg_step(
        case.problem.sde, steps=STEPS, y0=case.y0, seed=seed,
        teacher_options=fs.TeacherOptions(trajectories=budget.trajectories),
        training=fs.TrainingOptions(iterations=budget.iterations),
    )  # fmt: skip


def ratio(found: list[OrderEstimate]) -> list[float]:
    """RMSE of the learned step over Milstein's at h = 2^-AT, with bounds from their 95 % intervals."""
    milstein, step = found[-2:]
    k = milstein.levels.index(AT)
    low, high = step.error_low[k] / milstein.error_high[k], step.error_high[k] / milstein.error_low[k]
    return [step.error[k] / milstein.error[k], low, high]


@torch.no_grad()
def derivative_error(step: fs.SigStep, problem: TestProblem, seed: int, paths: int = 1024) -> list[float]:
    """RMS and largest distance of c_1 to g'g over fine paths, in units of the RMS of g'g."""
    sde, grid = problem.sde, torch.linspace(0, 1, 129, dtype=F64)
    start = problem.y0.expand(paths, *problem.y0.shape)
    ys = fs.solve(sde, fs.SRID2(), start, grid, seed=seed + 2, save="all").ys
    assert ys is not None
    errors, sizes = [], []
    for t, y in zip(grid[::8], ys[::8]):
        g = sde.diffusion(t, y)
        exact = torch.func.jvp(lambda x, t=t: sde.diffusion(t, x), (y,), (g,))[1]
        errors.append(step.network(t, y)[..., 0] - exact)
        sizes.append(exact)
    relative = torch.stack(errors) / torch.stack(sizes).square().mean().sqrt()
    return [float(relative.square().mean().sqrt()), float(relative.abs().max())]


def meets(row: Row) -> bool:
    """The criterion on a row of the record: the two finest local slopes, and the ratio."""
    return min(row["estimates"][-1]["local"][-2:]) >= LEAST_SLOPE and row["ratio"][0] <= MOST_RATIO


def tables(records: dict[str, Record]) -> dict[str, str]:
    """Slopes with intervals, ratio, error of c_1, seconds of the fit; the local slopes at finer steps."""

    def slopes(e: Row) -> list[str]:
        return [f"{v:.2f} [{a:.2f}, {b:.2f}]" for v, a, b in zip(e["local"], e["local_low"], e["local_high"])]

    data, rows, finer = records[NAME].data["rows"], [], []
    for row in data:
        local = " ".join(f"{v:.2f}" for v in row["estimates"][-1]["local"])
        gained = "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"])
        rows.append([f"`{row['problem']}`", *(slopes(e)[-1] for e in row["estimates"]), local, gained,
                     f"{row['derivative_error'][0]:.1e}", f"{row['seconds']:.0f}",
                     "met" if meets(row) else "missed"])  # fmt: skip
        milstein, step = row["finer"]
        finer.append([f"`{row['problem']}`", *slopes(step), f"{milstein['rmse'][-1] / step['rmse'][-1]:.1f}"])
    head = ["problem", "Euler-Maruyama", "Milstein", "`SigStep`", "coarse to fine",
            "RMSE / Milstein's at $2^{-6}$", "error of $c_1$", "fit, s", "criterion"]  # fmt: skip
    levels = data[0]["finer"][-1]["levels"]
    pairs = [f"$2^{{-{a}}}$ to $2^{{-{b}}}$" for a, b in zip(levels, levels[1:])]
    last = f"Milstein's RMSE / its at $2^{{-{levels[-1]}}}$"
    return {NAME: table(head, rows), f"{NAME}-finer": table(["problem", *pairs, last], finer)}


def draw(records: dict[str, Record], folder: Path) -> None:
    """One panel per problem, and one of the learned step's local slopes on all of them."""
    rows = records[NAME].data["rows"]
    across = min(len(rows) + 1, 3)
    down = -(-(len(rows) + 1) // across)
    figure, axes = canvas(3.6 * across, 3.5 * down, nrows=down, ncols=across, squeeze=False)
    for panel in axes.flat[len(rows) + 1 :]:
        panel.set_axis_off()
    for panel, row in zip(axes.flat, rows, strict=False):
        euler, milstein, step = row["estimates"]
        # the triangle shows the order of the expansion that it is fitted to; its card promises its parent's
        draw_orders(panel, [euler, milstein, step | {"declared": 1.5}], labels_inside=True)
        panel.set_title(f"{row['problem'].replace('_', ' ')}\n{row['title']}", fontsize=8.5)
    for line in axes:
        line[0].set_ylabel(f"RMSE at t = 1 over {rows[0]['estimates'][0]['paths']:,} paths")
    draw_slopes(axes.flat[len(rows)], rows)
    figure.suptitle("Strong order of the learned step, torchsde's paths (slope [95 % interval])", fontsize=10)
    write(figure, folder / f"{NAME}.svg")


def draw_slopes(panel: Any, rows: list[Row]) -> None:
    """Local slopes against the finer of the two steps: along torchsde's paths, then (dotted) of levels."""
    for k, row in enumerate(rows):
        names = (row["problem"].replace("_", " "), None)
        for e, style, name in zip((row["estimates"][-1], row["finer"][-1]), ("-", ":"), names, strict=True):
            steps = [2.0**-n for n in e["levels"][1:]]
            panel.plot(steps, e["local"], style + "os^Dv"[k % 5], color=colour("SigStep"), alpha=1 - 0.16 * k,
                       ms=3.5, lw=1, label=name)  # fmt: skip
    for slope in (0.5, LEAST_SLOPE, 1.5):
        panel.axhline(slope, color="0.6", lw=0.7, ls="--" if slope == LEAST_SLOPE else "-")
    panel.set_xscale("log", base=2)
    panel.set_xlabel("step size h (the finer of two)")
    panel.set_ylabel("local slope")
    panel.set_title("local slopes of SigStep\ndotted: differences of levels", fontsize=8.5)
    panel.legend(fontsize=6.5, loc="lower right")
    panel.grid(True, alpha=0.3)


EXPERIMENT = Experiment(NAME, __doc__, 10, BUDGETS, measure, tables, draw, figures=(f"{NAME}.svg",))

if __name__ == "__main__":
    EXPERIMENT.main()
