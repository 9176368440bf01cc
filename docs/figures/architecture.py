"""Draw architecture.svg: the packages, their modules, and the way from a problem to a figure.

python docs/figures/architecture.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from fewstep_analysis.figures import canvas, write

INK, LINE = "#1a1a1a", "#8a8f98"
BLUE, GREEN, ORANGE, GREY = "#e3eef8", "#e2f3ea", "#fdf0dc", "#f2f3f5"
# (left, bottom, width, height, colour, title, text); a unit is an inch
PACKAGES = [
    (0.1, 2.55, 10.8, 4.55, "white", "fewstep: solving", ""),
    (0.1, 1.02, 10.8, 1.33, "white", "fewstep_analysis: measuring", ""),
    (0.1, 0.08, 10.8, 0.72, "white", "", ""),
]
BOXES = {
    "problem": (0.35, 5.05, 2.3, 1.55, BLUE, "problem",
        "SDE, ODE, DiffusionModel\nschedule, denoiser: every\n"
        "network becomes\n(x, sigma) -> x0"),
    "solver": (3.05, 5.05, 4.9, 1.55, ORANGE, "solver", ""),
    "sde": (3.2, 5.15, 2.25, 1.05, "white", "sde/", "one step of an SDE:\nStep(y, carry, error)"),
    "samplers": (5.55, 5.15, 2.25, 1.05, "white", "samplers/", "one plan per grid:\na table of coefficients"),
    "learned": (8.35, 5.05, 2.3, 1.55, GREEN, "learned/",
        "dode, sigdeg, sfddm\nlearn a plan, or a network\n"
        "for its evaluations, from a\nfiner solver on the same path"),
    "loop": (3.05, 3.2, 4.9, 1.55, GREY, "loop", ""),
    "brownian": (0.35, 3.2, 2.3, 1.55, BLUE, "brownian/",
        "an interval of a path becomes\nIncrement(h, W, H, K, A)"),
    "solve": (3.2, 3.3, 2.25, 1.05, "white", "solve", "the loop over the steps\nof an SDE or ODE"),
    "executor": (5.55, 3.3, 2.25, 1.05, "white",
        "plan + executor, sample", "stage(row, state): where to\nevaluate; update: next state"),
    "integrations": (8.35, 3.2, 2.3, 1.55, GREEN, "integrations/",
        "diffusers, k-diffusion,\ntorchsde, DPM-Solver:\n"
        "the same plans and steps"),
    "measure": (0.35, 1.1, 3.2, 0.78, GREY, "orders, work-precision, distances",
        "problems with known solutions, teachers"),
    "record": (4.1, 1.1, 3.2, 0.78, GREY, "Record", "numbers, seed, versions, commit: JSON"),
    "figure": (7.85, 1.1, 2.8, 0.78, GREY, "figures, tables, command line",
        "they draw records, compute nothing"),
}  # fmt: skip
NOTES = {
    2.9: "solver.py, plan.py, grid.py, testing.py (conformance suite), distances.py; "
    "_validation, _serialization, _distributed, _progress",
    0.45: "analysis/experiments: one script per experiment on one base, from a Budget to Records in\n"
    "analysis/records and figures in docs/figures; run from a checkout, not in the wheel",
}
ARROWS = [
    ("problem", "right", "solver", "left"), ("solver", "right", "learned", "left"),
    ("sde", "bottom", "solve", "top"), ("samplers", "bottom", "executor", "top"),
    ("brownian", "right", "loop", "left"), ("loop", "right", "integrations", "left"),
    ("measure", "right", "record", "left"), ("record", "right", "figure", "left"),
]  # fmt: skip


def box(axes: Any, left: float, bottom: float, width: float, height: float, fill: str, title: str, text: str) -> None:
    """A rounded box with a title and lines of text below it."""
    style, middle, top = "round,pad=0,rounding_size=0.08", left + width / 2, bottom + height
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, style, fc=fill, ec=LINE, lw=1))
    words = {"ha": "center", "va": "center", "color": INK}
    axes.text(middle, top - 0.2, title, weight="bold", size=10, **words)
    axes.text(middle, (bottom + top - 0.28) / 2, text, size=8, linespacing=1.35, **words)


def anchor(name: str, side: str) -> tuple[float, float]:
    """The middle of a side of a box."""
    left, bottom, width, height = BOXES[name][:4]
    return {
        "left": (left, bottom + height / 2), "right": (left + width, bottom + height / 2),
        "top": (left + width / 2, bottom + height), "bottom": (left + width / 2, bottom),
    }[side]  # fmt: skip


def main() -> None:
    figure, axes = canvas(11, 7.2)
    axes.set_xlim(0, 11)
    axes.set_ylim(0, 7.2)
    axes.set_aspect("equal")
    axes.set_axis_off()
    for package in PACKAGES:
        box(axes, *package)
    for module in BOXES.values():
        box(axes, *module)
    for bottom, text in NOTES.items():
        axes.text(5.5, bottom, text, ha="center", va="center", size=8.5, color=INK, linespacing=1.4)
    links = [(anchor(a, s), anchor(b, t)) for a, s, b, t in ARROWS]
    for bottom in (2.35, 0.82):
        links.append(((5.5, bottom), (5.5, bottom + 0.2)))
        axes.text(5.62, bottom + 0.1, "imports", va="center", size=8, style="italic", color=INK)
    for start, end in links:
        arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, lw=1.1,
                                shrinkA=1, shrinkB=1)  # fmt: skip
        axes.add_patch(arrow)
    write(figure, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
