"""Declared strong orders, measured along torchsde's paths: the figure at the top of the README.

Euler-Maruyama (0.5), Milstein (1.0) and a learned step on diagonal noise, SRA1 and ShARK (1.5) on additive
noise, each against torchsde's `srk` on the same BrownianInterval. LogODE (1.0) on general noise is measured
by differences of consecutive levels, since torchsde's paths have no areas. The learned step is fitted to
other paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fewstep as fs
import sigdeg_order
from base import Experiment, Job, Record, canvas, table, write
from fewstep_analysis import problems
from fewstep_analysis.convergence import strong_orders
from fewstep_analysis.figures import draw_orders
from fewstep_analysis.records import provenance

NAME = "headline-orders"
PANELS = (
    ("diagonal", "dy = -2 sin y dt + (0.8 + 0.6 cos y) dW\nreference: torchsde srk, same path"),
    ("additive", "dy = sin y dt + dW\nreference: torchsde srk, same path"),
    ("general", "two channels that do not commute\ndifferences of levels, path with areas"),
)


@dataclass(frozen=True)
class Budget:
    """Paths and levels (step size 2^-level) of the measurement; the fit of the learned step."""

    paths: int
    levels: range
    fit: sigdeg_order.Budget


BUDGETS = {
    "smoke": Budget(256, range(3, 7), sigdeg_order.BUDGETS["smoke"]),
    "paper": Budget(1 << 14, range(4, 10), sigdeg_order.BUDGETS["paper"]),
}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Strong orders on three kinds of noise."""
    options: dict[str, Any] = dict(paths=budget.paths, levels=budget.levels, seed=job.seed, device=job.device)
    learned, _ = sigdeg_order.learned(sigdeg_order.sine(), budget.fit, job.seed + 1)
    found = [
        *strong_orders([fs.EulerMaruyama(), fs.Milstein(), learned], problems.sine(), **options),
        *strong_orders([fs.SRA1(), fs.ShARK()], problems.additive_sine(), **options),
        *strong_orders([fs.LogODE()], problems.noncommutative_pair(), reference="levels", **options),
    ]
    data = {"estimates": [e.record().data for e in found]}
    return {NAME: Record(NAME, data, job.seed, provenance(job.device))}


def tables(records: dict[str, Record]) -> dict[str, str]:
    """Each estimate: the fitted slope, its levels, the local slopes."""
    head = ["solver", "noise", "declared", "fitted slope", "levels fitted", "local slopes, coarse to fine"]
    rows = []
    for e in records[NAME].data["estimates"]:
        slope = f"{e['order']:.2f} [{e['low']:.2f}, {e['high']:.2f}]"
        levels, local = f"{min(e['used'])} to {max(e['used'])}", " ".join(f"{v:.2f}" for v in e["local"])
        rows.append([f"`{e['solver']}`", e["noise_type"], f"{e['declared']:.1f}", slope, levels, local])
    return {NAME: table(head, rows)}


def draw(records: dict[str, Record], folder: Path) -> None:
    """One panel per kind of noise."""
    curves = records[NAME].data["estimates"]
    figure, axes = canvas(10.5, 4.0, ncols=3)
    for panel, (noise, title) in zip(axes, PANELS, strict=True):
        draw_orders(panel, [c for c in curves if c["noise_type"] == noise], labels_inside=True)
        panel.set_title(title, fontsize=8.5)
    axes[0].set_ylabel(f"RMSE at t = 1 over {curves[0]['paths']:,} paths")
    figure.suptitle("Strong orders, measured (slope [95 % interval])", fontsize=10)
    write(figure, folder / f"{NAME}.svg")


EXPERIMENT = Experiment(NAME, __doc__, 4, BUDGETS, measure, tables, draw, figures=(f"{NAME}.svg",))

if __name__ == "__main__":
    EXPERIMENT.main()
