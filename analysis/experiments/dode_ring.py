"""D-ODE on the ring of eight Gaussians: every base and every way of fitting, by network evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from base import Experiment, Job, Record, canvas, curve, progress, ticks, write
from dode_bench import ANY, STYLES, TABLE, Bench, bases_table
from fewstep_analysis.distillation import task

NAME = "dode-ring"
BASES = (
    "DDIM", "PNDM(plms)", "IPNDM(4)", "DPMSolver(1)", "DPMSolver(2)", "DPMSolver(3)", "DPMSolver(2M)",
    "DPMSolverPP(2)", "DPMSolverPP(3)", "DEIS(2)", "EDMHeun", "UniPC(2)", "UniPC(3)",
)  # fmt: skip
HELD_OUT = 2048
MOST = 10  # evaluations of a fitted table


@dataclass(frozen=True)
class Budget:
    """Initial states of a fit, steps of the reference, evaluations, iterations of fitted tables."""

    samples: int
    reference_steps: int
    counts: tuple[int, ...]
    iterations: int
    bases: tuple[str, ...] = BASES


BUDGETS = {
    "smoke": Budget(
        samples=256, reference_steps=100, counts=(5, 10), iterations=3,
        bases=("DDIM", "DPMSolver(3)", "DPMSolverPP(2)", "UniPC(2)"),
    ),
    "paper": Budget(
        samples=8192, reference_steps=2000, counts=(3, 5, 8, 10, 20), iterations=100,
    ),
}  # fmt: skip


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Fit on one set of initial states, judge on 2,048 others."""
    bench = Bench.of(task("ring"), budget.samples, HELD_OUT, job.seed, steps=budget.reference_steps)
    for n in progress(budget.counts, "evaluations"):
        for base in budget.bases:
            bench.learned(base, n)
        if n <= MOST:
            bench.table(n, iterations=budget.iterations)
    data = {"samples": budget.samples, "held_out": HELD_OUT, "counts": list(budget.counts)}
    return {NAME: Record(NAME, data | {"rows": bench.rows, "seconds": "CPU seconds of a fit"}, job.seed)}


def tables(records: dict[str, Record]) -> dict[str, str]:
    """RMSE at 5, 8 and 10 evaluations, and what the longest fits cost."""
    rows = records[NAME].data["rows"]
    spent = [r["seconds"] for r in rows if r["kind"] == TABLE]
    note = f"\n\nFitted tables took {min(spent):.0f} to {max(spent):.0f} CPU seconds." if spent else ""
    return {NAME: bases_table(rows) + note}


def draw(records: dict[str, Record], folder: Path) -> None:
    """One panel per base, one line per way of fitting."""
    rows, counts = records[NAME].data["rows"], records[NAME].data["counts"]
    figure, panels = canvas(11.0, 8.6, nrows=4, ncols=4, sharex=True, sharey=True)
    cells = list(panels.flat)
    for axes, base in zip(cells, BASES):
        for kind, (shade, style) in STYLES.items():
            shown = (base, kind), (ANY, kind)
            points = [(r["evaluations"], r["rmse"]) for r in rows if (r["base"], r["kind"]) in shown]
            curve(axes, points, style, color=shade, marker="o", ms=3, lw=1.3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(base, fontsize=9)
        axes.set_ylim(1.5e-4, 2)
        ticks(axes, counts)
        axes.tick_params(labelbottom=True, labelsize=8)
    for axes in cells[len(BASES) :]:
        axes.set_axis_off()
    for kind, (shade, style) in STYLES.items():
        cells[-2].plot([], [], style, color=shade, marker="o", ms=3, lw=1.3, label=kind)
    cells[-2].legend(fontsize=9, loc="center", frameon=False)
    figure.supxlabel("network evaluations", fontsize=10)
    figure.supylabel("RMSE to the exact ODE on held-out noise", fontsize=10)
    write(figure, folder / f"{NAME}.svg")


EXPERIMENT = Experiment(NAME, __doc__, 15, BUDGETS, measure, tables, draw, figures=(f"{NAME}.svg",))

if __name__ == "__main__":
    EXPERIMENT.main()
