"""Grids that `fit_grid` fits to a model and a solver, next to the usual spacings, on ring, smooth and digits.

Errors are distances to the exact ODE on start states that the grids were not fitted to.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import fewstep as fs
from base import Experiment, Job, Record, Row, canvas, colour, curve, progress, single_threaded, table, ticks, write
from dode_bench import Bench
from fewstep_analysis.distillation import task

SOLVERS: dict[str, fs.DiffusionSolver] = {
    "DDIM": fs.DDIM(),
    "DPMSolverPP(2)": fs.DPMSolverPP(2),
    "UniPC(2)": fs.UniPC(2),
}
SPACINGS = ("logsnr", "karras", "uniform", "trailing", "kl_optimal", "beta")
FITTED, INTERPOLATED = "fitted", "fitted at 8"
STYLES = {"DDIM": "DDIM", "DPMSolverPP(2)": "DPMSolverPP", "UniPC(2)": "UniPC"}


@dataclass(frozen=True)
class Budget:
    """Problems, evaluations, start states to fit to and to judge on, nodes, steps of the reference."""

    problems: tuple[str, ...]
    counts: tuple[int, ...]
    fit: int
    test: int
    nodes: int
    reference_steps: int


BUDGETS = {
    "smoke": Budget(("smooth",), (4, 8), 16, 32, 16, 50),
    "paper": Budget(("ring", "smooth", "digits"), (4, 5, 6, 8, 10), 64, 512, 64, 400),
}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """RMSE of each solver on each grid."""
    single_threaded()
    rows: list[Row] = []
    for name in budget.problems:
        bench = Bench.of(task(name), budget.fit, budget.test, job.seed, steps=budget.reference_steps)
        for solver in progress(SOLVERS, f"solver, {name}"):
            rows += measure_solver(bench, name, solver, budget)
    body: Row = {"counts": list(budget.counts), "fit": budget.fit, "test": budget.test, "nodes": budget.nodes}
    return {"fitted-grids": Record("fitted-grids", body | {"rows": rows}, job.seed)}


def measure_solver(bench: Bench, name: str, solver: str, budget: Budget) -> list[Row]:
    """The rows of one solver on one problem."""
    used, schedule, rows, grids = SOLVERS[solver], bench.task.schedule, [], {}
    for n in budget.counts:
        start = time.process_time()
        grids[n] = fs.fit_grid(bench.task.problem, n, noise=bench.fitted, solver=used, nodes=budget.nodes)
        seconds = round(time.process_time() - start, 1)
        made = {spacing: fs.sigma_grid(schedule, n, spacing) for spacing in SPACINGS} | {FITTED: grids[n]}
        for grid, sigmas in made.items():
            row: Row = {"problem": name, "solver": solver, "grid": grid, "evaluations": n}
            row["rmse"] = bench.rmse(bench.sample(used, sigmas=sigmas))
            rows.append(row | ({"seconds": seconds, "sigmas": sigmas.tolist()} if grid == FITTED else {}))
    for n in budget.counts:
        ends = bench.sample(used, sigmas=fs.sigma_grid(schedule, n, grids[8]))
        row = {"problem": name, "solver": solver, "grid": INTERPOLATED, "evaluations": n, "rmse": bench.rmse(ends)}
        rows.append(row)
    return rows


def tables(records: dict[str, Record]) -> dict[str, str]:
    """For each problem and solver the best usual spacing, and the fitted grid, at each number of evaluations."""
    record = records["fitted-grids"]
    counts, lines = record.data["counts"], []
    found = {(r["problem"], r["solver"], r["grid"], r["evaluations"]): r for r in record.data["rows"]}
    for problem, solver in dict.fromkeys(key[:2] for key in found):
        best = [min((found[problem, solver, s, n]["rmse"], s) for s in SPACINGS) for n in counts]
        lines.append([problem, solver, "best usual spacing", *(f"{e:.2g} ({s})" for e, s in best)])
        for grid in (FITTED, INTERPOLATED):
            errors = (found[problem, solver, grid, n]["rmse"] for n in counts)
            lines.append([problem, solver, grid, *(f"{e:.2g}" for e in errors)])
    return {"fitted-grids": table(["problem", "solver", "grid", *map(str, counts)], lines)}


def draw(records: dict[str, Record], folder: Path) -> None:
    """A panel per problem: fitted grids with solid lines, the best usual spacing of each count with dotted ones."""
    record = records["fitted-grids"]
    rows, counts = record.data["rows"], record.data["counts"]
    names = list(dict.fromkeys(r["problem"] for r in rows))
    drawing, panels = canvas(4.4 * len(names), 4.2, ncols=len(names), squeeze=False)
    for axes, name in zip(panels[0], names):
        for solver, shade in STYLES.items():
            mine = [r for r in rows if (r["problem"], r["solver"]) == (name, solver)]
            fitted = [(r["evaluations"], r["rmse"]) for r in mine if r["grid"] == FITTED]
            usual = [(n, min(r["rmse"] for r in mine if r["grid"] in SPACINGS and r["evaluations"] == n))
                     for n in counts]  # fmt: skip
            curve(axes, fitted, "-", color=colour(shade), marker="o", ms=4, label=f"{solver}, fitted")
            curve(axes, usual, ":", color=colour(shade), marker="s", ms=3, label=f"{solver}, best usual")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("network evaluations")
        ticks(axes, counts)
    panels[0][0].set_ylabel("RMSE to the exact ODE")
    panels[0][0].legend(fontsize=7)
    write(drawing, folder / "fitted-grids.svg")


EXPERIMENT = Experiment(
    "fitted-grids", __doc__, 20, BUDGETS, measure, tables, draw, ("fitted-grids",), ("fitted-grids.svg",)
)

if __name__ == "__main__":
    EXPERIMENT.main()
