"""`fewstep.compare` on ring, smooth and digits: the default solvers and spacings at a few numbers of evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import fewstep as fs
from base import Experiment, Job, Record, Row, canvas, progress, single_threaded, table, write
from fewstep.compare import draw as draw_comparison
from fewstep_analysis.distillation import task

KEPT = ("name", "spacing", "nfe", "tied", "rmse", "rmse_se", "median", "q90")


@dataclass(frozen=True)
class Budget:
    """Problems, evaluations, start states."""

    problems: tuple[str, ...]
    counts: tuple[int, ...]
    samples: int


BUDGETS = {"smoke": Budget(("smooth",), (4,), 4), "paper": Budget(("ring", "smooth", "digits"), (5, 8, 16), 128)}
SHOWN = 8  # evaluations in the figure, where they were measured


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """A comparison for each problem and number of evaluations."""
    single_threaded()
    found: list[Row] = []
    for name in progress(budget.problems, "problem"):
        model = task(name)
        for n in budget.counts:
            one = fs.compare(model.problem, n, noise=model.noise(budget.samples, job.seed)).document()
            rows = [{k: row[k] for k in KEPT} for row in one["rows"]]
            found.append({"problem": name} | {k: v for k, v in one.items() if k != "seconds"} | {"rows": rows})
    return {"compared": Record("compared", {"comparisons": found}, job.seed)}


def tables(records: dict[str, Record]) -> dict[str, str]:
    """The best sampler of each comparison, how many tie with it, and DDIM on its best spacing."""
    lines = []
    for one in records["compared"].data["comparisons"]:
        best, ties = one["rows"][0], sum(r["tied"] for r in one["rows"]) - 1
        ddim = next(r for r in one["rows"] if r["name"].startswith("DDIM"))
        error = f"{best['rmse']:.2g} ± {best['rmse_se']:.1g}"
        lines.append([
            one["problem"], one["nfe"], f"{best['name']}, {best['spacing']}", error,
            f"{best['median']:.2g}", f"{best['q90']:.2g}", ties, f"{ddim['rmse']:.2g}", f"{one['fine_rmse']:.1g}",
        ])  # fmt: skip
    head = ["problem", "evaluations", "best", "RMSE", "median", "90 %", "ties", "DDIM's RMSE", "fine solution"]
    return {"compared": table(head, lines)}


def draw(records: dict[str, Record], folder: Path) -> None:
    """A panel per problem: the error of each solver on each spacing."""
    every = records["compared"].data["comparisons"]
    shown = [one for one in every if one["nfe"] == SHOWN] or every
    drawing, panels = canvas(4.6 * len(shown), 4.4, ncols=len(shown), squeeze=False)
    for axes, one in zip(panels[0], shown):
        draw_comparison(axes, one)
        axes.set_title(one["problem"], fontsize=10)
    write(drawing, folder / "compared.svg")


EXPERIMENT = Experiment("compared", __doc__, 3, BUDGETS, measure, tables, draw, ("compared",), ("compared.svg",))

if __name__ == "__main__":
    EXPERIMENT.main()
