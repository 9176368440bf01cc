"""Figures draw records and compute nothing. One colour for one solver, everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by the colour-blind; learned solvers are vermilion everywhere
COLOURS = {
    "EulerMaruyama": "#56B4E9", "Milstein": "#0072B2", "DerivativeFreeMilstein": "#CC79A7",
    "ShARK": "#009E73", "SigStep": "#D55E00", "SigSampler": "#D55E00",
    "DDIM": "#56B4E9", "DPMSolverPP": "#0072B2", "EDMHeun": "#E69F00", "UniPC": "#009E73",
}  # fmt: skip
OTHERS = ("#666666", "#B8860B", "#7A4FA3", "#8C564B", "#2F4F4F")


def colour(solver: str) -> str:
    """The solver's colour; strangers get one by their name, the same each time."""
    return COLOURS.get(solver) or OTHERS[sum(map(ord, solver)) % len(OTHERS)]


def canvas(width: float = 6.4, height: float = 4.4, **axes: Any) -> tuple[Figure, Any]:
    """A figure that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**axes)


def write(figure: Figure, path: str | Path) -> Path:
    """Save by the ending of the path; SVG text stays text and carries no date."""
    import matplotlib

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fewstep"}):
        meta = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=meta)
    return path


def strong_order_figure(records: Sequence[Record], path: str | Path) -> Path:
    """Error against step size for one or more strong-order records, with slope triangles."""
    figure, axes = canvas()
    for record in records:
        data = record.data
        steps = [data["t1"] / 2**level for level in data["levels"]]
        label = f"{data['solver']}  {data['order']:.2f} [{data['low']:.2f}, {data['high']:.2f}]"
        axes.loglog(steps, data["rmse"], "o-", color=colour(data["solver"]), label=label, ms=4)
    slopes = sorted({r.data["declared"] for r in records if r.data["declared"]})
    for slope in slopes:
        _triangle(axes, next(r.data for r in records if r.data["declared"] == slope), slope)
    first = records[0].data
    axes.set_xlabel("step size h")
    axes.set_ylabel(f"RMSE at t = {first['t1']:g} over {first['paths']} paths")
    axes.set_title(f"{_words(first['problem'])}, reference: {first['reference']}", fontsize=10)
    axes.legend(title="fitted order [95 % bootstrap]", fontsize=8, title_fontsize=8)
    axes.grid(True, which="major", alpha=0.3)
    return write(figure, path)


def _triangle(axes: Axes, data: dict[str, Any], slope: float) -> None:
    """A slope triangle below the two finest points of a curve."""
    h0, h1 = data["t1"] / 2 ** data["levels"][-1], data["t1"] / 2 ** data["levels"][-2]
    y0 = data["rmse"][-1] * 0.6
    y1 = y0 * (h1 / h0) ** slope
    axes.plot([h0, h1, h1, h0], [y0, y0, y1, y0], color="0.55", lw=0.8)
    axes.annotate(f"{slope:g}", (h1, (y0 * y1) ** 0.5), xytext=(4, 0), textcoords="offset points",
                  color="0.35", fontsize=8, va="center")  # fmt: skip


def _words(name: str) -> str:
    return name.replace("_", " ")


def image_rows(rows: dict[str, Tensor], path: str | Path, title: str = "") -> Path:
    """One row of grey images a label; images (n, 1, h, w) in [-1, 1]."""
    count = max(len(images) for images in rows.values())
    figure, axes = canvas(0.62 * count + 1.9, 0.72 * len(rows) + 0.5, nrows=len(rows), ncols=count,
                          squeeze=False)  # fmt: skip
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for k, cell in enumerate(line):
            cell.set_axis_off()
            if k < len(images):
                cell.imshow(images[k, 0].clamp(-1, 1).cpu(), cmap="gray_r", vmin=-1, vmax=1)
        line[0].text(-0.25, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return write(figure, path)
