"""Figures without a display; matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _validation
from ._serialization import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")


def canvas(width: float = 6.4, height: float = 4.4, **axes: Any) -> tuple[Figure, Any]:
    """A figure and its axes, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**axes)


def check_figure(path: str | Path) -> Path:
    """The file of a figure, checked for its suffix."""
    place = _validation.check_file(path)
    _validation.check_choice("path: the suffix", place.suffix.lower(), SUFFIXES)
    return place


def write(figure: Figure, path: str | Path) -> Path:
    """Save a figure in the format of the suffix; SVG files keep text as text and carry no date."""
    import matplotlib

    path = check_figure(path)
    rc = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fewstep"})
    with rc, atomic_write(path, parents=True) as file:
        meta = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(file, dpi=150, metadata=meta, format=path.suffix[1:].lower())
    return path
