"""The tutorial's model of two moons: samplers and fitted tables of a few evaluations against a fine solution.

The network, its training and the start states are the programs of docs/tutorials/two-moons.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fewstep as fs
from base import ROOT, Experiment, Job, Record, canvas, progress, single_threaded, table, write

sys.path.insert(0, str(ROOT / "docs"))
import run_blocks

SOLVERS = {"DDIM": fs.DDIM(), "DPM-Solver++(2)": fs.DPMSolverPP(2), "UniPC(2)": fs.UniPC(2)}
SHOWN = 8  # evaluations in the figure


@dataclass(frozen=True)
class Budget:
    """Steps of training, evaluations of the samplers, iterations of a fit, points kept for the figure."""

    training: int
    counts: tuple[int, ...]
    iterations: int
    kept: int


BUDGETS = {"smoke": Budget(20, (8,), 1, 20), "paper": Budget(3000, (4, 6, 8, 12), 30, 1000)}


def tutorial(training: int) -> dict[str, Any]:
    """What the tutorial's programs define, up to its first samples."""
    names: dict[str, Any] = {}
    for _, code, _ in list(run_blocks.blocks(ROOT / "docs" / "tutorials" / "two-moons.md"))[:3]:
        exec(code.replace("steps = Network(), 3000", f"steps = Network(), {training}"), names)
    return names


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Errors of each sampler, and its points at the number of evaluations of the figure."""
    single_threaded()
    made = tutorial(budget.training)
    model, noise, error = made["model"], made["noise"], made["error"]
    start = made["schedule"].sigma_max * torch.randn(512, 2, generator=torch.Generator().manual_seed(2 + job.seed))
    points = {"data": made["data"], "fine solution": made["fine"]}
    rows: list[dict[str, Any]] = []
    for n in progress(budget.counts, "evaluations"):
        samplers: dict[str, tuple[Any, dict[str, int]]] = {k: (s, {"steps": n}) for k, s in SOLVERS.items()}
        fitted, _ = fs.fit_table(model, nfe=n, noise=start, iterations=budget.iterations, seed=job.seed)
        samplers["fitted table"] = fitted, {}
        for name, (solver, options) in samplers.items():
            x = fs.sample(model, solver, noise=noise, **options)
            rows.append({"sampler": name, "evaluations": n, "rmse": error(x)})
            if n == SHOWN:
                points[name] = x
    shown = {name: x[: budget.kept].mul(1000).round().int().tolist() for name, x in points.items()}  # thousandths
    return {"two-moons": Record("two moons", {"errors": rows, "points": shown}, job.seed)}


def tables(records: dict[str, Record]) -> dict[str, str]:
    """The error by sampler and number of evaluations."""
    rows = records["two-moons"].data["errors"]
    counts = list(dict.fromkeys(r["evaluations"] for r in rows))
    found = {(r["sampler"], r["evaluations"]): f"{r['rmse']:.2g}" for r in rows}
    lines = [[name, *(found[name, n] for n in counts)] for name in dict.fromkeys(r["sampler"] for r in rows)]
    return {"two-moons": table(["sampler", *(f"{n} evaluations" for n in counts)], lines)}


def draw(records: dict[str, Record], folder: Path) -> None:
    """The points of the data, the fine solution and the samplers."""
    data = records["two-moons"].data
    rmse = {r["sampler"]: r["rmse"] for r in data["errors"] if r["evaluations"] == SHOWN}
    shown = {k: v for k, v in data["points"].items() if k != "DPM-Solver++(2)"}
    drawing, panels = canvas(2.6 * len(shown), 3.4, ncols=len(shown), squeeze=False)
    for axes, (name, points) in zip(panels[0], shown.items()):
        axes.plot(*([v / 1000 for v in column] for column in zip(*points)), ".", ms=1.6, color="#0072B2")
        title = f"{name}, {SHOWN} steps\nerror {rmse[name]:.2f}" if name in rmse else f"{name}\n"
        axes.set_title(title.replace("fine solution\n", "the model\n200 steps"), fontsize=11)
        axes.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal")
    write(drawing, folder / "two-moons.png")


EXPERIMENT = Experiment("two-moons", __doc__, 3, BUDGETS, measure, tables, draw, ("two-moons",), ("two-moons.png",))

if __name__ == "__main__":
    EXPERIMENT.main()
