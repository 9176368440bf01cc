"""D-ODE on the ring of eight Gaussians: every base, every way of fitting, against evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dode_tools import COUNTS, GLOBAL, GREEDY, GRID, KINDS, TERMS, UNTRAINED, Bench, table, task
from fewstep_analysis.figures import canvas, write
from fewstep_analysis.parallel import progress
from fewstep_analysis.records import Record

TAKES = "15 min"
BASES = (
    "DDIM", "PNDM(plms)", "IPNDM(4)", "DPMSolver(1)", "DPMSolver(2)", "DPMSolver(3)", "DPMSolver(2M)",
    "DPMSolverPP(2)", "DPMSolverPP(3)", "DEIS(2)", "EDMHeun", "UniPC(2)", "UniPC(3)",
)  # fmt: skip
TRAINED = ("IPNDM(4)", "DPMSolverPP(2)")  # grid and weights forget their base but for its prediction
STYLES = {
    UNTRAINED: ("0.5", ":"), GREEDY: ("#56B4E9", "--"), TERMS: ("#0072B2", "-."),
    GLOBAL: ("#009E73", "-"), GRID: ("#D55E00", "-"),
}  # fmt: skip


def kinds(
    base: str, trained: tuple[str, ...], iterations: int, descents: int, start: int = 1, **more: Any
) -> dict[str, dict[str, Any]]:
    """The ways of fitting a base, by name; grid and weights set out from a fit of `start` terms."""
    refine: dict[str, Any] = {"terms": 3, "refine": "global", "iterations": descents} | more
    ways: dict[str, dict[str, Any]] = {GREEDY: {}, TERMS: {"terms": 3}, GLOBAL: refine}
    if base in trained:
        ways[GRID] = {**refine, "terms": start, "learn_grid": True, "iterations": iterations, "rate": 0.03}
    return ways


def study(seed: int = 0, samples: int = 8192, quick: bool = False) -> Record:
    """Fit on one set of start states, measure on 2,048 others."""
    bench = Bench.of(task("ring"), samples, 2048, seed, steps=200 if quick else 2000)
    counts = (5, 10) if quick else COUNTS
    for n in progress(counts, "budget"):
        for base in BASES:
            bench.learned(base, n, kinds(base, TRAINED, 50 if quick else 3000, 20 if quick else 400))
    data = {"samples": samples, "held_out": 2048, "counts": list(counts), "rows": bench.rows}
    data["seconds"] = "CPU seconds of a fit"
    return Record("dode-ring", data, seed)


def draw(record: Record, path: str | Path) -> Path:
    """A panel a base, a line a way of fitting: distance against evaluations."""
    rows = record.data["rows"]
    figure, panels = canvas(11.0, 8.6, nrows=4, ncols=4, sharex=True, sharey=True)
    cells = list(panels.flat)
    for axes, base in zip(cells, BASES):
        for kind, (shade, style) in STYLES.items():
            points = [(r["evaluations"], r["rmse"]) for r in rows if (r["base"], r["kind"]) == (base, kind)]
            if points:
                axes.loglog(*zip(*points), style, color=shade, marker="o", ms=3, lw=1.3)
        axes.set_title(base, fontsize=9)
        axes.grid(True, which="major", alpha=0.3)
        axes.set_ylim(1.5e-4, 2)
        axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
        axes.set_xticks([], minor=True)
        axes.tick_params(labelbottom=True, labelsize=8)
    for axes in cells[len(BASES) :]:
        axes.set_axis_off()
    for kind, (shade, style) in STYLES.items():
        cells[-2].plot([], [], style, color=shade, marker="o", ms=3, lw=1.3, label=kind)
    cells[-2].legend(fontsize=9, loc="center", frameon=False)
    figure.supxlabel("network evaluations", fontsize=10)
    figure.supylabel("RMSE to the exact ODE on held-out noise", fontsize=10)
    return write(figure, path)


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record and the figure; returns the table."""
    smoke = budget == "smoke"
    record = study(seed, 512 if smoke else 8192, quick=smoke)
    record.save(out / "records" / "dode-ring.json")
    draw(record, out / "figures" / "dode-ring.svg")
    return [table(record.data["rows"], KINDS, record.data["counts"])]
