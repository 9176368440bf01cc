"""Adaptive and fixed steps: error against evaluations where the drift is rough for a short time, and the step sizes.

Also the mean error of adaptive steps of single paths, by solver: those without the term in W^2 have another limit.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fewstep as fs
from base import F64, Experiment, Job, Record, canvas, colour, progress, rms, single_threaded, table, write

BIASED = {"EulerMaruyama": "ito", "Milstein": "ito", "SRID2": "ito", "Heun": "stratonovich"}


@dataclass(frozen=True)
class Budget:
    """Samples, fixed steps (powers of two), tolerances; single paths and tolerances for the mean errors."""

    samples: int
    levels: tuple[int, ...]
    tolerances: tuple[float, ...]
    paths: int
    coarse: tuple[float, ...]


BUDGETS = {
    "smoke": Budget(8, (5, 9), (1e-1,), 2, (0.3,)),
    "paper": Budget(512, tuple(range(5, 14)), (0.3, 0.1, 0.03, 1e-2, 3e-3, 1e-3, 3e-4), 400, (0.3, 0.1, 0.03)),
}


def bump(t: torch.Tensor) -> torch.Tensor:
    return 150 * torch.exp(-(((t - 0.5) / 0.02) ** 2))


def rough() -> fs.SDE:
    """A stable drift that is stiff and nonlinear for about 0.05 of 2 units of time, with additive noise."""
    return fs.SDE(lambda t, y: -y + bump(t) * (1 - y**2), lambda t, y: torch.full_like(y, 0.3), "additive")


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """The curves of ShARK, its step sizes at one tolerance, and the mean errors."""
    single_threaded()
    path = fs.BrownianPath((budget.samples, 1), 0.0, 2.0, seed=job.seed, levy="H", dtype=F64)
    y0, solver, sde = torch.zeros(budget.samples, 1, dtype=F64), fs.ShARK(), rough()

    def fixed(level: int) -> fs.Solution:
        n = 2**level
        return fs.solve(sde, solver, y0, torch.linspace(0, 2, n + 1, dtype=F64), path=path, save=[n // 4, n // 2, n])

    fine = fixed(max(budget.levels) + 3).ys
    assert fine is not None
    curves: dict[str, list[list[float]]] = {"fixed steps": [], "adaptive steps": []}
    sizes: list[list[float]] = []
    for level in progress(budget.levels, "level"):
        sol = fixed(level)
        curves["fixed steps"].append([sol.nfe, rms(sol.ys - fine)])
    for tol in progress(budget.tolerances, "tolerance"):
        sol = fs.solve(sde, solver, y0, [0.0, 2.0], ts=[0.5, 1.0, 2.0], path=path, steps=fs.Adaptive(tol, tol))
        curves["adaptive steps"].append([sol.nfe, rms(sol.ys - fine), sol.rejected or 0])
        if not sizes or tol >= 1e-2:
            sizes = [sol.grid[:-1].tolist(), sol.grid.diff().tolist()]
    data = {"curves": curves, "sizes": sizes, "means": means(budget, job.seed)}
    return {"adaptive-steps": Record("adaptive steps", data, job.seed)}


def means(budget: Budget, seed: int) -> list[dict[str, Any]]:
    """The mean of log y - log(exact) of dy = y dW over single paths, whose steps follow their own error."""
    rows: list[dict[str, Any]] = []
    for name in progress(BIASED, "solver"):
        kind, solver = BIASED[name], fs.solvers()[name]
        assert isinstance(solver, fs.StochasticSolver)
        sde = fs.SDE(lambda t, y: 0 * y, lambda t, y: y, "diagonal", kind)
        for tol in budget.coarse:
            errors, taken = [], 0
            for i in range(budget.paths):
                path = fs.BrownianPath((1, 1), seed=seed + i, levy="H", dtype=F64)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of this very bias
                    sol = fs.solve(
                        sde, solver, torch.ones(1, 1, dtype=F64), [0.0, 1.0], path=path, steps=fs.Adaptive(tol, 0.0)
                    )
                exact = path.increment(0.0, 1.0).W - (0.5 if kind == "ito" else 0.0)
                errors.append(float(sol.y.abs().log() - exact))
                taken += sol.accepted or 0
            found = torch.tensor(errors, dtype=F64)
            spread = float(found.std()) / len(found) ** 0.5
            row = {"solver": name, "tolerance": tol, "mean": float(found.mean()), "se": spread}
            rows.append(row | {"rmse": rms(found), "steps": taken / budget.paths})
    return rows


def tables(records: dict[str, Record]) -> dict[str, str]:
    """Errors by evaluations, and the mean errors of single paths."""
    data = records["adaptive-steps"].data
    lines = [
        [kind, *(f"{v:.2g}" if isinstance(v, float) else v for v in row[:2])]
        for kind, rows in data["curves"].items()
        for row in rows
    ]
    mean = [
        [
            f"`{r['solver']}`",
            r["tolerance"],
            f"{r['mean']:+.3f} ± {r['se']:.3f}",
            f"{r['rmse']:.3f}",
            f"{r['steps']:.0f}",
        ]
        for r in data["means"]
    ]
    return {
        "adaptive-steps": table(["steps", "drift evaluations", "RMSE"], lines),
        "adaptive-means": table(["solver", "rtol", "mean error of log y", "RMSE", "steps"], mean),
    }


def draw(records: dict[str, Record], folder: Path) -> None:
    """Error against evaluations; the steps along time below the size of the roughness."""
    data = records["adaptive-steps"].data
    drawing, (left, right) = canvas(9.6, 3.9, ncols=2)
    for (kind, rows), shade, mark in zip(data["curves"].items(), (colour("Milstein"), colour("SigStep")), "os"):
        shown = [row for row in rows if row[1] < 10]
        left.loglog(*zip(*(row[:2] for row in shown)), mark + "-", color=shade, label=kind, ms=4)
    left.set(xlabel="drift evaluations", ylabel="RMSE over three times", title="ShARK, 512 paths")
    left.legend(frameon=False)
    left.grid(True, which="major", alpha=0.3)
    times, sizes = data["sizes"]
    right.semilogy(times, sizes, ".-", color=colour("SigStep"), ms=4, lw=0.8, label="step size (left end of the step)")
    t = torch.linspace(0, 2, 400)
    right.fill_between(t, 1e-3, 1e-3 * 300 ** (bump(t) / 150), color="0.85", lw=0, label="strength of the rough drift")
    right.set(xlabel="time t", ylabel="step size", title="Steps at rtol = atol = 0.01", ylim=(1e-3, 1))
    right.legend(frameon=False, loc="upper right")
    write(drawing, folder / "adaptive-steps.svg")


EXPERIMENT = Experiment(
    "adaptive-steps", __doc__, 5, BUDGETS, measure, tables, draw, ("adaptive-steps",), ("adaptive-steps.svg",)
)

if __name__ == "__main__":
    EXPERIMENT.main()
