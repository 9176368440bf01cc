"""Strong orders of Euler-Maruyama and Milstein on two SDEs, against torchsde's `srk` on the same paths.

The same as `fewstep convergence --solver euler_maruyama --solver milstein --problem NAME`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import fewstep as fs
from base import Experiment, Job, Record
from fewstep_analysis import problems
from fewstep_analysis.convergence import OrderEstimate, strong_orders
from fewstep_analysis.figures import order_figure
from fewstep_analysis.records import provenance

PROBLEMS = ("sine", "geometric_brownian_motion")
NAMES = {problem: f"strong-order-{problem.replace('_', '-')}" for problem in PROBLEMS}


@dataclass(frozen=True)
class Budget:
    """Paths, and levels: the step size is 2^-level of the time span."""

    paths: int
    levels: range


BUDGETS = {"smoke": Budget(64, range(4, 7)), "paper": Budget(4096, range(4, 10))}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """One record per problem."""
    made = {}
    for name, file in NAMES.items():
        found = strong_orders(
            [fs.EulerMaruyama(), fs.Milstein()], problems.by_name(name), levels=budget.levels,
            paths=budget.paths, reference="torchsde", seed=job.seed, device=job.device,
        )  # fmt: skip
        data = {"estimates": [e.record().data for e in found]}
        made[file] = Record("strong-orders", data, job.seed, provenance(job.device))
    return made


def draw(records: dict[str, Record], folder: Path) -> None:
    """Error against step size."""
    for name, record in records.items():
        order_figure([OrderEstimate(**e).record() for e in record.data["estimates"]], folder / f"{name}.svg")


EXPERIMENT = Experiment(
    "strong-order", __doc__, 1, BUDGETS, measure, draw=draw, records=tuple(NAMES.values()),
    figures=tuple(f"{name}.svg" for name in NAMES.values()),
)  # fmt: skip

if __name__ == "__main__":
    EXPERIMENT.main()
