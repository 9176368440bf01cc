"""Figures of records. Each solver has one colour in all figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewstep import _validation
from fewstep._figures import canvas as canvas
from fewstep._figures import write as write

from .records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette first, which is safe for colour-blind readers; learned solvers are vermilion
COLOURS = {
    "EulerMaruyama": "#56B4E9", "Milstein": "#0072B2", "DerivativeFreeMilstein": "#CC79A7",
    "ShARK": "#009E73", "SigStep": "#D55E00", "SigSampler": "#D55E00", "LogODE": "#E69F00",
    "DDIM": "#56B4E9", "DPMSolverPP": "#0072B2", "EDMHeun": "#E69F00", "UniPC": "#009E73",
    "EulerHeun": "#9AD0EC", "Heun": "#4477AA", "Midpoint": "#332288", "ReversibleHeun": "#88CCEE",
    "RK4": "#222222", "SRA1": "#999933", "SOSRA": "#DDCC77", "SEA": "#44AA99", "SPaRK": "#117733",
    "GeneralShARK": "#66C2A5", "SlowRK": "#661100", "SRID2": "#882255", "KloedenPlaten15": "#AA4499",
    "Taylor15": "#7A4FA3", "GeneralMilstein": "#1F4E79", "ShiftedODE": "#B8860B",
}  # fmt: skip
OTHERS = ("#666666", "#8C564B", "#2F4F4F", "#A0522D", "#708090")


def colour(solver: str) -> str:
    """The colour of a solver; unknown solvers get a grey or brown that depends on the name only."""
    return COLOURS.get(solver) or OTHERS[sum(map(ord, solver)) % len(OTHERS)]


def order_figure(records: Sequence[Any], path: str | Path) -> Path:
    """Error against step size for order estimates or their records: bands, slope triangles, labels.

    Lines join all levels; the fitted ones have markers. The area below the error of the reference is grey.
    """
    figure, axes = canvas(7.4, 4.6)
    expected = "order estimates or their records"
    records = [
        r.record() if hasattr(r, "record") else r for r in _validation.check_sequence("records", records, expected)
    ]
    for r in records:
        _validation.check_instance("records", r, Record, expected)
    curves = [r.data for r in records]
    draw_orders(axes, curves)
    first = curves[0]
    what = "RMSE" if first["kind"] == "strong" else f"bias of E[{first['test']}]"
    axes.set_ylabel(f"{what} at t = {first['t1']:g} over {first['paths']:,} paths")
    axes.set_title(f"{first['problem'].replace('_', ' ')}, reference: {first['reference']}", fontsize=10)
    return write(figure, path)


def draw_orders(axes: Axes, curves: Sequence[dict[str, Any]], labels_inside: bool = False) -> None:
    """Draw the curves of order records, with labels to the right of the axes or inside them."""
    labels = []
    for data in curves:
        shade, steps = colour(data["solver"]), [data["t1"] / 2**level for level in data["levels"]]
        axes.loglog(steps, data["error"], "-", color=shade, lw=1.2)
        axes.fill_between(steps, data["error_low"], data["error_high"], color=shade, alpha=0.2, lw=0)
        fitted = [(h, e) for h, e, n in zip(steps, data["error"], data["levels"]) if n in data["used"]]
        axes.loglog(*zip(*fitted), "o", color=shade, ms=4)
        text = f"{data['solver']}  {data['order']:.2f} [{data['low']:.2f}, {data['high']:.2f}]"
        labels.append((data["error"][0], steps[0], text, shade))
    _triangles(axes, curves)
    _floor(axes, curves)
    axes.set_xscale("log", base=2)  # steps are powers of two (of the span)
    axes.set_xlabel("step size h")
    axes.grid(True, which="major", alpha=0.3)
    (_inside_labels if labels_inside else _direct_labels)(axes, labels)


def _inside_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Names in the upper left corner, in the order of the curves; the y axis is extended for them."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** (0.09 * len(labels)))
    for k, (_, _, text, shade) in enumerate(sorted(labels, reverse=True)):
        axes.annotate(text, (0.03, 0.95 - 0.065 * k), xycoords="axes fraction", color=shade, fontsize=8)


def _direct_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Name, order and interval to the right of the axes, moved apart where they would overlap."""
    low, high = (math.log10(v) for v in axes.get_ylim())
    gap = 0.055 * (high - low)
    at = high + gap
    for y, x, text, shade in sorted(labels, reverse=True):
        at = min(math.log10(y), at - gap)
        axes.annotate(
            text, (x, y), xytext=(1.02, (at - low) / (high - low)), textcoords="axes fraction", color=shade,
            fontsize=8, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": shade, "lw": 0.5, "alpha": 0.6},
        )  # fmt: skip


def _triangles(axes: Axes, curves: Sequence[dict[str, Any]]) -> None:
    """One slope triangle per declared order, below the finest points of a curve that has it."""
    for slope in sorted({c["declared"] for c in curves if c["declared"]}):
        able = [c for c in curves if c["declared"] == slope]
        data = min(able, key=lambda c: (round(abs(c["order"] - slope), 1), c["error"][-1]))
        h0, h1 = (data["t1"] / 2 ** data["levels"][k] for k in (-1, -2))
        y0 = data["error"][-1] * 0.55
        y1 = y0 * (h1 / h0) ** slope
        axes.plot([h0, h1, h1, h0], [y0, y0, y1, y0], color="0.45", lw=0.8)
        axes.annotate(f"{slope:g}", (h1, (y0 * y1) ** 0.5), xytext=(4, 0), textcoords="offset points",
                      color="0.3", fontsize=8, va="center")  # fmt: skip


def _floor(axes: Axes, curves: Sequence[dict[str, Any]]) -> None:
    """The error of the reference as a grey area, if it is within reach of the curves."""
    floor = max(c["reference_error"] for c in curves)
    if curves and floor > 0.02 * min(c["error"][-1] for c in curves):
        axes.axhspan(floor / 1e3, floor, color="0.9", lw=0)
        axes.set_ylim(bottom=0.5 * floor)


def image_rows(rows: dict[str, Tensor], path: str | Path, title: str = "") -> Path:
    """One row of grey images (n, 1, h, w) in [-1, 1] per label."""
    count = max(len(images) for images in rows.values())
    size = 0.62 * count + 1.9, 0.72 * len(rows) + 0.5
    figure, axes = canvas(*size, nrows=len(rows), ncols=count, squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for k, cell in enumerate(line):
            cell.set_axis_off()
            if k < len(images):
                cell.imshow(images[k, 0].clamp(-1, 1).cpu().numpy(), cmap="gray_r", vmin=-1, vmax=1)
        line[0].text(-0.25, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return write(figure, path)
