"""The strong order of the learned SDE step: it never sees the diffusion's derivative.

For each problem a `SigStep` (Euler-Maruyama and five learned coefficients) is fitted, and measured beside
Euler-Maruyama and Milstein against torchsde's `srk` on the same BrownianInterval, on [0, 1]. The criterion:
finest local slopes of at least 0.9, and at h = 2^-6 an RMSE of at most 1.3 times Milstein's. A second
measurement, by differences of levels, goes on to finer steps, where the error of c_1 begins to show.
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
from fewstep_analysis import problems
from fewstep_analysis.convergence import OrderEstimate, strong_orders
from fewstep_analysis.figures import canvas, colour, draw_orders, write
from fewstep_analysis.parallel import is_first, progress
from fewstep_analysis.problems import F64, TestProblem
from fewstep_analysis.records import Record, provenance

TAKES = "10 min"
LEAST_SLOPE, MOST_RATIO, AT = 0.9, 1.3, 6  # the criterion; the ratio at h = 2^-AT
STEPS = 16


@dataclass(frozen=True)
class Budget:
    """What a run spends: of the fit, of the measurement against torchsde, of the one at finer steps."""

    cases: tuple[str, ...]
    trajectories: int
    iterations: int
    paths: int
    levels: range
    finer: range
    finer_paths: int


@dataclass(frozen=True)
class Case:
    """A problem, its equation in a figure's title, and the states that the fit's trajectories start from."""

    problem: TestProblem
    title: str
    y0: Tensor


def sine() -> Case:
    y0 = torch.linspace(-2.5, 2.5, 256, dtype=F64).unsqueeze(1)
    return Case(problems.sine(), "dy = -2 sin y dt + (0.8 + 0.6 cos y) dW", y0)


def arctangent(p: float = 0.7) -> Case:
    """torchsde's scalar example as one diagonal component; y_t = atan(p W_t + tan y_0)."""
    sde = fs.SDE(lambda t, y: -p * p * torch.sin(y) * torch.cos(y) ** 3, lambda t, y: p * torch.cos(y) ** 2)
    problem = TestProblem("arctangent", sde, torch.full((1,), 0.3, dtype=F64))
    y0 = torch.linspace(-1.2, 1.2, 256, dtype=F64).unsqueeze(1)
    return Case(problem, f"dy = -{p * p:.2g} sin y cos³y dt + {p:g} cos²y dW", y0)


def hyperbolic_sine() -> Case:
    y0 = torch.linspace(-1.5, 1.5, 256, dtype=F64).unsqueeze(1)
    return Case(problems.hyperbolic_sine(), "dy = (y/2 + r) dt + r dW, r = √(1 + y²)", y0)


def igbm() -> Case:
    y0 = torch.linspace(0.03, 0.12, 256, dtype=F64).unsqueeze(1)
    return Case(problems.igbm(), "dy = 0.1 (0.04 - y) dt + 0.6 y dW", y0)


def torchsde_diagonal() -> Case:
    y0 = 0.5 + torch.rand(256, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    return Case(problems.torchsde_diagonal(), "three components, dy = μ y dt + σ y dW", y0)


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f for f in (sine, arctangent, hyperbolic_sine, igbm, torchsde_diagonal)
}
BUDGETS = {
    "smoke": Budget(("sine", "igbm"), 512, 20, 128, range(4, 7), range(4, 7), 32),
    "paper": Budget(tuple(CASES), 4096, 300, 4096, range(3, 11), range(9, 14), 256),
}


def run(
    out: Path, budget: str = "paper", seed: int = 0, device: str = "cpu", paths: int | None = None
) -> list[str]:
    """Fit and measure, save the record and draw it into out/records and out/figures; lines to print."""
    plan = BUDGETS[budget]
    rows = [measure(CASES[name](), plan, seed, device, paths) for name in progress(plan.cases, "problem")]
    if not is_first():
        return []
    settings = {"steps": STEPS, "trajectories": plan.trajectories, "iterations": plan.iterations, "at": AT,
                "least_slope": LEAST_SLOPE, "most_ratio": MOST_RATIO}  # fmt: skip
    record = Record("sigdeg-order", {"settings": settings, "rows": rows}, seed, provenance(device))
    file = record.save(out / "records" / "sigdeg-order.json")
    figure = draw(file, out / "figures" / "sigdeg-order.svg")
    return [*table(file).splitlines(), f"wrote {file} and {figure}"]


def measure(
    case: Case, plan: Budget, seed: int, device: str = "cpu", paths: int | None = None
) -> dict[str, Any]:
    """Fit a step and measure it; what the record holds of a problem."""
    problem, began = case.problem, time.perf_counter()
    step, report = learned(case, plan, seed)
    seconds = time.perf_counter() - began
    found = strong_orders(
        [fs.EulerMaruyama(), fs.Milstein(), step], problem, t1=1.0, levels=plan.levels, reference="torchsde",
        paths=paths or plan.paths, seed=seed + 1, device=device,
    )  # fmt: skip
    finer = strong_orders([fs.Milstein(), step], problem, t1=1.0, levels=plan.finer, reference="levels",
                          paths=plan.finer_paths, seed=seed + 1, device=device)  # fmt: skip
    return {
        "problem": problem.name, "title": case.title, "seconds": round(seconds, 1), "fit": vars(report),
        "y0": [float(case.y0.min()), float(case.y0.max())], "ratio": ratio(found),
        "derivative_error": derivative_error(step, problem, seed),
        "estimates": [e.record().data for e in found], "finer": [e.record().data for e in finer],
    }  # fmt: skip


def learned(case: Case, plan: Budget, seed: int) -> tuple[fs.SigStep, fs.Report]:
    """The fitted step of a problem."""
    return fs.distill_sigdeg(
        case.problem.sde, steps=STEPS, y0=case.y0, trajectories=plan.trajectories, iterations=plan.iterations,
        seed=seed,
    )  # fmt: skip


def ratio(found: list[OrderEstimate]) -> list[float]:
    """RMSE of the last over that of the one before at h = 2^-AT, and its bounds from their 95 % intervals."""
    milstein, learned = found[-2:]
    k = milstein.levels.index(AT)
    return [
        learned.error[k] / milstein.error[k],
        learned.error_low[k] / milstein.error_high[k],
        learned.error_high[k] / milstein.error_low[k],
    ]


@torch.no_grad()
def derivative_error(step: fs.SigStep, problem: TestProblem, seed: int, paths: int = 1024) -> list[float]:
    """RMS and largest distance of c_1 to g'g over fine paths, in units of the RMS of g'g."""
    sde, grid = problem.sde, torch.linspace(0, 1, 129, dtype=F64)
    start = problem.y0.expand(paths, *problem.y0.shape)
    ys = fs.solve(sde, fs.SRID2(), start, grid, seed=seed + 2, save="all").ys
    assert ys is not None
    off, size = [], []
    for t, y in zip(grid[::8], ys[::8]):
        g = sde.diffusion(t, y)
        exact = torch.func.jvp(lambda x, t=t: sde.diffusion(t, x), (y,), (g,))[1]
        off.append(step.network(t, y)[..., 0] - exact)
        size.append(exact)
    unit = torch.stack(size).square().mean().sqrt()
    wrong = torch.stack(off) / unit
    return [float(wrong.square().mean().sqrt()), float(wrong.abs().max())]


def meets(row: dict[str, Any]) -> bool:
    """The criterion on a row of the record: the two finest local slopes, and the ratio."""
    learned = row["estimates"][-1]
    return min(learned["local"][-2:]) >= LEAST_SLOPE and row["ratio"][0] <= MOST_RATIO


def table(record: Path) -> str:
    """The record's rows in Markdown: slopes with intervals, ratio, error of c_1, seconds of the fit."""
    lines = [
        "| problem | Euler-Maruyama | Milstein | `SigStep` | coarse to fine | RMSE / Milstein's at $2^{-6}$ "
        "| error of $c_1$ | fit, s | criterion |",
        "| --- " * 9 + "|",
    ]
    for row in Record.load(record).data["rows"]:
        estimates = [OrderEstimate(**e) for e in row["estimates"]]
        cells = [f"`{row['problem']}`", *(_finest(e) for e in estimates)]
        cells += [" ".join(f"{v:.2f}" for v in estimates[-1].local)]
        cells += ["{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"]), f"{row['derivative_error'][0]:.1e}"]
        cells += [f"{row['seconds']:.0f}", "met" if meets(row) else "missed"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def finer_table(record: Path) -> str:
    """The learned step's local slopes between neighbouring levels at finer steps, and its gain there."""
    rows = Record.load(record).data["rows"]
    levels = rows[0]["finer"][-1]["levels"]
    heads = [f"$2^{{-{a}}}$ to $2^{{-{b}}}$" for a, b in zip(levels, levels[1:])]
    lines = ["| problem | " + " | ".join(heads) + f" | Milstein's RMSE / its at $2^{{-{levels[-1]}}}$ |"]
    lines += ["| --- " * (len(heads) + 2) + "|"]
    for row in rows:
        milstein, learned = (OrderEstimate(**e) for e in row["finer"])
        cells = [f"{v:.2f} [{a:.2f}, {b:.2f}]"
                 for v, a, b in zip(learned.local, learned.local_low, learned.local_high)]  # fmt: skip
        gain = milstein.rmse[-1] / learned.rmse[-1]
        lines.append(f"| `{row['problem']}` | " + " | ".join(cells) + f" | {gain:.1f} |")
    return "\n".join(lines)


def _finest(e: OrderEstimate) -> str:
    """The finest local slope with its interval."""
    return f"{e.local[-1]:.2f} [{e.local_low[-1]:.2f}, {e.local_high[-1]:.2f}]"


def draw(record: Path, out: Path) -> Path:
    """A panel a problem, and one of the learned step's local slopes on all of them."""
    rows = Record.load(record).data["rows"]
    across = min(len(rows) + 1, 3)
    down = -(-(len(rows) + 1) // across)
    figure, axes = canvas(3.6 * across, 3.5 * down, nrows=down, ncols=across, squeeze=False)
    for panel in axes.flat[len(rows) + 1 :]:
        panel.set_axis_off()
    for panel, row in zip(axes.flat, rows, strict=False):
        euler, milstein, learned = row["estimates"]
        # the triangle of the expansion that it is fitted to; its card promises the parent's order
        draw_orders(panel, [euler, milstein, learned | {"declared": 1.5}], beside=False)
        panel.set_title(f"{_words(row)}\n{row['title']}", fontsize=8.5)
    for line in axes:
        line[0].set_ylabel(f"RMSE at t = 1 over {rows[0]['estimates'][0]['paths']:,} paths")
    _slopes(axes.flat[len(rows)], rows)
    figure.suptitle("Strong order of the learned step, torchsde's paths (slope [95 % interval])", fontsize=10)
    return write(figure, out)


def _slopes(panel: Any, rows: list[dict[str, Any]]) -> None:
    """Local slopes against the finer of the two steps: along torchsde's paths, then (dotted) of levels."""
    for k, row in enumerate(rows):
        curves, shade = (row["estimates"][-1], row["finer"][-1]), colour("SigStep")
        for data, style, name in zip(curves, ("-", ":"), (_words(row), None), strict=True):
            steps = [2.0**-n for n in data["levels"][1:]]
            panel.plot(steps, data["local"], style + "os^Dv"[k % 5], color=shade, alpha=1 - 0.16 * k, ms=3.5,
                       lw=1, label=name)  # fmt: skip
    for slope in (0.5, LEAST_SLOPE, 1.5):
        panel.axhline(slope, color="0.6", lw=0.7, ls="--" if slope == LEAST_SLOPE else "-")
    panel.set_xscale("log", base=2)
    panel.set_xlabel("step size h (the finer of two)")
    panel.set_ylabel("local slope")
    panel.set_title("local slopes of SigStep\ndotted: differences of levels", fontsize=8.5)
    panel.legend(fontsize=6.5, loc="lower right")
    panel.grid(True, alpha=0.3)


def _words(row: dict[str, Any]) -> str:
    return str(row["problem"]).replace("_", " ")
