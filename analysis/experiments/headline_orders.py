"""The project's headline: declared strong orders, measured along torchsde's paths.

Euler-Maruyama 0.5, Milstein 1.0 and the learned step (diagonal noise), SRA1 and ShARK 1.5 (additive noise)
against torchsde's `srk` on the same BrownianInterval; LogODE 1.0 on general noise by differences of levels,
since torchsde's paths do not know their area. The learned step is fitted to other paths beforehand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fewstep as fs
import sigdeg_order
from fewstep_analysis import problems
from fewstep_analysis.convergence import OrderEstimate, strong_orders
from fewstep_analysis.figures import canvas, draw_orders, write
from fewstep_analysis.parallel import is_first
from fewstep_analysis.records import Record, provenance

TAKES = "4 min"
BUDGETS = {"smoke": (256, range(3, 7)), "paper": (1 << 14, range(4, 10))}
GPU = "no GPU was at hand for this record; `--device cuda --paths 1048576` is the same code on one"


def run(
    out: Path, budget: str = "paper", seed: int = 0, device: str = "cpu", paths: int | None = None
) -> list[str]:
    """Measure, save the record and draw it into out/records and out/figures; returns lines to print."""
    count, levels = BUDGETS[budget]
    options: dict[str, Any] = {"paths": paths or count, "levels": levels, "seed": seed, "device": device}
    learned, _ = sigdeg_order.learned(sigdeg_order.sine(), sigdeg_order.BUDGETS[budget], seed + 1)
    found = [
        *strong_orders([fs.EulerMaruyama(), fs.Milstein(), learned], problems.sine(), **options),
        *strong_orders([fs.SRA1(), fs.ShARK()], problems.additive_sine(), **options),
        *strong_orders([fs.LogODE()], problems.noncommutative_pair(), reference="levels", **options),
    ]
    lines = [
        f"{e.solver} ({e.noise_type}): {e.order:.3f} [{e.low:.3f}, {e.high:.3f}], {e.verdict}" for e in found
    ]
    if not is_first():
        return lines
    made = provenance(device) | {"note": GPU if not device.startswith("cuda") else ""}
    data = {"estimates": [e.record().data for e in found]}
    record = Record("headline-orders", data, seed, made).save(out / "records" / "headline-orders.json")
    return [*lines, f"wrote {record} and {draw(record, out / 'figures' / 'headline-orders.svg')}"]


PANELS = (
    ("diagonal", "dy = -2 sin y dt + (0.8 + 0.6 cos y) dW\nreference: torchsde srk, same path"),
    ("additive", "dy = sin y dt + dW\nreference: torchsde srk, same path"),
    ("general", "two channels that do not commute\ndifferences of levels, path with areas"),
)


def draw(record: Path, out: Path) -> Path:
    """Three panels of one record."""
    curves = Record.load(record).data["estimates"]
    figure, axes = canvas(10.5, 4.0, ncols=3)
    for panel, (noise, title) in zip(axes, PANELS, strict=True):
        draw_orders(panel, [c for c in curves if c["noise_type"] == noise], beside=False)
        panel.set_title(title, fontsize=8.5)
    axes[0].set_ylabel(f"RMSE at t = 1 over {curves[0]['paths']:,} paths")
    figure.suptitle("Strong orders, measured (slope [95 % interval])", fontsize=10)
    return write(figure, out)


def estimates(record: Path) -> list[OrderEstimate]:
    """The record's estimates, as `strong_orders` returned them."""
    return [OrderEstimate(**d) for d in Record.load(record).data["estimates"]]
