"""Figures of Brownian paths with W, H, K and the Lévy area A, and the strong orders that areas allow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base import F64, Experiment, Job, Record, Row, canvas, single_threaded, table, write
from fewstep.brownian import AreaPath, BrownianPath, FreshIncrements, Increment, levy_area
from fewstep.brownian.levy_area import terms_for

NAME = "brownian-figures"
BLUE, GREEN, ORANGE, RED, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#777777"
FINE = 512
INKS = {
    "fourier": GREY,
    "milstein": BLUE,
    "legendre": GREEN,
    "wiktorsson": ORANGE,
    "mrongowius_roessler": RED,
}
AREAS = {
    "none": "none", "mean": "its mean given W, H", "davie": "drawn, `davie`", "foster": "drawn, `foster`",
    "true": "the path's own, `AreaPath`",
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Paths of the error of joined areas, and of the strong orders."""

    area_paths: int
    order_paths: int


BUDGETS = {"smoke": Budget(80, 30), "paper": Budget(4000, 1500)}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """All numbers of all figures, rounded to five digits so that the record can be read."""
    single_threaded()
    seed = job.seed
    data = {
        "path": one_path(seed), "plane": plane(seed), "fold": conditioned(seed),
        "areas": areas(seed, budget.area_paths), "orders": orders(seed, budget.order_paths),
    }  # fmt: skip
    return {NAME: Record(NAME, rounded(data), seed)}


def rounded(value: Any) -> Any:
    """Every float to five digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def one_path(seed: int) -> Row:
    """A path on [0, 1] with its W, H, K, and the (W, H) of its four quarters."""
    path = BrownianPath((1,), seed=seed, levy="K", dtype=F64)
    values = [0.0]
    for inc in path.increments(torch.linspace(0, 1, FINE + 1)):
        values.append(values[-1] + float(inc.W))
    total: Any = path.increment(0.0, 1.0)
    quarters = [{"W": float(i.W), "H": float(i.H)} for i in path.increments([0.0, 0.25, 0.5, 0.75, 1.0])]
    return {"values": values, **{k: float(getattr(total, k)) for k in "WHK"}, "quarters": quarters}


def plane(seed: int) -> Row:
    """A path in the plane with its Lévy area."""
    path = BrownianPath((2,), seed=seed, levy="H", dtype=F64)
    points = [[0.0, 0.0]]
    for inc in path.increments(torch.linspace(0, 1, FINE + 1)):
        points.append([points[-1][0] + float(inc.W[0]), points[-1][1] + float(inc.W[1])])
    A: Any = AreaPath(path, FINE).increment(0.0, 1.0).A
    return {"points": points, "A": float(A[0, 1])}


def conditioned(seed: int) -> Row:
    """Many paths with the same W, (W, H) or (W, H, K) over [0, 1]: what these numbers leave open."""
    out = {}
    for levy, known in (("W", 1), ("H", 2), ("K", 3)):
        path = BrownianPath((200,), seed=seed, levy="K", dtype=F64)
        draw_root = path._root

        def root(draw: Any, known: int = known, draw_root: Any = draw_root) -> Any:
            cell = draw_root(draw)
            for v, c in zip(cell.values[:known], (0.9, 0.28, -0.035)):
                v.fill_(c)
            return cell

        path._root = root  # type: ignore[method-assign]
        total, rows = torch.zeros(200, dtype=F64), [[0.0] * 200]
        for inc in path.increments(torch.linspace(0, 1, 65)):
            total = total + inc.W
            rows.append(total.tolist())
        values = torch.tensor(rows)
        out[levy] = {"mean": values.mean(1).tolist(), "std": values.std(1).tolist()}
        out[levy]["some"] = values[:, :12].T.tolist()
    return out


def areas(seed: int, paths: int) -> Row:
    """RMSE of joined areas by number of cells; normals that one step needs, by method and h."""
    path = BrownianPath((paths, 2), seed=seed, levy="H", dtype=F64)
    best: Any = AreaPath(path, 1024).increment(0.0, 1.0).A
    cells = [2**k for k in range(8)]
    errors = {
        name: [float((join_areas(path, n, know_H) - best[:, 0, 1]).square().mean().sqrt()) for n in cells]
        for name, know_H in (("with_H", True), ("without_H", False))
    }
    hs = [2.0**-k for k in range(2, 13)]
    counts = {
        "fourier": lambda n: 4 * n, "milstein": lambda n: 4 * n + 2, "legendre": lambda n: 2 * n,
        "wiktorsson": lambda n: 4 * n + 1, "mrongowius_roessler": lambda n: 4 * n + 3,
    }  # fmt: skip
    cost = {m: [count(terms_for(m, h, 2)) for h in hs] for m, count in counts.items()}
    inc = FreshIncrements((20000, 2), "H", seed=seed, dtype=F64).increment(0.0, 1.0)
    variance = float(levy_area(inc, "foster", seed)[:, 0, 1].square().mean())
    return {"cells": cells, **errors, "h": hs, "normals": cost, "foster_variance": variance}


def join_areas(path: BrownianPath, n: int, know_H: bool) -> Tensor:
    """The (0, 1) entry of the area over [0, 1], from the conditional means of n cells."""
    joined: Any = None
    for inc in path.increments(torch.linspace(0, 1, n + 1)):
        if not know_H:
            inc = Increment(inc.h, inc.W, torch.zeros_like(inc.W))
        cell = Increment(inc.h, inc.W, inc.H, A=levy_area(inc, "legendre", terms=1))
        joined = cell if joined is None else joined.join(cell)
    return joined.A[:, 0, 1]  # type: ignore[no-any-return]


def orders(seed: int, paths: int) -> Row:
    """Strong errors of the log-ODE method on dy = B_1 y o dW^1 + B_2 y o dW^2, by the source of A.

    B_1, B_2 are rotations of space about two axes. A step is a matrix exponential, so the area is the only
    error. The reference takes 2048 steps of the same path.
    """
    path = BrownianPath((paths, 2), seed=seed, levy="H", dtype=F64)
    exact = AreaPath(path, 2048)
    reference, steps = rotate(exact, 2048, "true"), [4, 8, 16, 32, 64]
    x, errors, slopes = torch.tensor(steps).double().log(), {}, {}
    for kind in AREAS:
        source = exact if kind == "true" else path
        found = [(rotate(source, n, kind) - reference).square().sum(-1) for n in steps]
        errors[kind] = [float(e.mean().sqrt()) for e in found]
        y = torch.tensor(errors[kind]).double().log()
        slopes[kind] = -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return {"steps": steps, "errors": errors, "slopes": slopes}


def rotate(source: Any, n: int, kind: str) -> Tensor:
    """The final point of the log-ODE method with n steps; `kind` is a key of AREAS."""
    B = torch.zeros(2, 3, 3, dtype=F64)
    B[0, 1, 2], B[0, 2, 1], B[1, 2, 0], B[1, 0, 2] = -1.0, 1.0, -1.0, 1.0
    bracket = B[1] @ B[0] - B[0] @ B[1]  # [f_1, f_2] = Df_2 f_1 - Df_1 f_2
    y = torch.tensor([1.0, 0.0, 0.0], dtype=F64).repeat(source.shape[0], 1)
    generator = torch.Generator().manual_seed(n)
    for inc in source.increments(torch.linspace(0, 1, n + 1, dtype=F64)):
        A = inc.A
        if kind == "mean":
            A = levy_area(inc, "legendre", terms=1)
        elif kind in ("davie", "foster"):
            A = levy_area(inc, kind, generator)
        M = torch.einsum("bi,ijk->bjk", inc.W, B)
        if A is not None:
            M = M + A[:, 0, 1, None, None] * bracket
        y = (torch.linalg.matrix_exp(M) @ y.unsqueeze(-1)).squeeze(-1)
    return y


def tables(records: dict[str, Record]) -> dict[str, str]:
    """Errors and order of the log-ODE method, by the area that a step receives."""
    d = records[NAME].data["orders"]
    rows = [
        [label, f"{d['errors'][k][0]:.4f}", f"{d['errors'][k][-1]:.4f}", f"{d['slopes'][k]:.2f}"]
        for k, label in AREAS.items()
    ]
    head = ["area given to a step", "RMSE, 4 steps", "RMSE, 64 steps", "measured order"]
    return {"brownian-orders": table(head, rows)}


def draw(records: dict[str, Record], folder: Path) -> None:
    """W, H and K of one path; paths given W, H, K; the area of a plane path; errors of areas."""
    data = records[NAME].data
    figures = {"W": draw_W, "H": draw_H, "K": draw_K}
    for name, draw_one in figures.items():
        figure, axes = canvas(6.4, 3.2)
        draw_one(axes, data["path"])
        axes.set_xlabel("time $u$")
        axes.set_title(f"${name} = {data['path'][name]:+.3f}$", loc="left")
        axes.legend(frameon=False, loc="upper right" if name == "K" else "best")
        finish(figure, [axes], folder / f"brownian-{name}.svg")
    draw_conditioned(data["fold"], folder / "brownian-given.svg")
    draw_plane(data["plane"], folder / "brownian-A.svg")
    draw_errors(data["areas"], folder / "brownian-area-error.svg")


def finish(figure: Any, panels: Any, path: Path) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    write(figure, path)


def times(n: int) -> list[float]:
    return [i / n for i in range(n + 1)]


def draw_W(axes: Any, path: Row) -> None:
    """The path and its end."""
    axes.plot(times(FINE), path["values"], color=BLUE, lw=1.2)
    axes.plot([0, 1], [0, path["W"]], "--", color=GREY, lw=1, label="what a step that knows $W$ sees")
    axes.annotate("", (1.03, path["W"]), (1.03, 0), arrowprops={"arrowstyle": "<->", "color": RED})
    axes.text(1.045, path["W"] / 2, "$W$", color=RED, va="center")
    axes.set_ylabel("$W_u$")
    axes.set_xlim(0, 1.12)


def shade(axes: Any, low: list[float], high: list[float], words: str, alpha: float) -> None:
    """Fill between two curves: green where `high` is above, red where it is below."""
    for above, ink, sign in ((True, GREEN, "+"), (False, RED, "-")):
        where = [(a >= b) == above for a, b in zip(high, low)]
        axes.fill_between(times(FINE), high, low, where=where, color=ink, alpha=alpha, lw=0,
                          label=f"{words}{sign}")  # fmt: skip


def draw_H(axes: Any, path: Row) -> None:
    """The area between the path and its chord."""
    axes.plot(times(FINE), path["values"], color=BLUE, lw=1.2)
    axes.plot([0, 1], [0, path["W"]], "--", color=GREY, lw=1)
    shade(axes, [u * path["W"] for u in times(FINE)], path["values"], "counts ", 0.35)
    axes.set_ylabel("$W_u$")
    axes.set_xlim(0, 1)


def draw_K(axes: Any, path: Row) -> None:
    """The first moment of that area."""
    bridge = [v - u * path["W"] for u, v in zip(times(FINE), path["values"])]
    axes.plot(times(FINE), bridge, color=GREY, lw=0.9, label="path minus chord")
    axes.plot(times(FINE), [0.5 - u for u in times(FINE)], ":", color=ORANGE, lw=1.2, label="weight $1/2 - u$")
    shade(axes, [0.0] * (FINE + 1), [b * (0.5 - u) for u, b in zip(times(FINE), bridge)], "product, ", 0.5)
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xlim(0, 1)


def draw_conditioned(data: Row, path: Path) -> None:
    """Mean and spread of the path given W, given W and H, given W, H and K."""
    figure, panels = canvas(8.4, 2.9, ncols=3, sharey=True)
    for axes, (levy, title) in zip(panels, (("W", "W"), ("H", "W, H"), ("K", "W, H, K"))):
        d = data[levy]
        for line in d["some"]:
            axes.plot(times(64), line, color=BLUE, lw=0.5, alpha=0.5)
        low, high = ([m + k * s for m, s in zip(d["mean"], d["std"])] for k in (-2, 2))
        axes.fill_between(times(64), low, high, color=ORANGE, alpha=0.3, lw=0)
        axes.plot(times(64), d["mean"], color=RED, lw=1.5)
        axes.set_title(f"given ${title}$", loc="left")
        axes.set_xlabel("time $u$")
    panels[0].set_ylabel("$W_u$")
    finish(figure, panels, path)


def draw_plane(data: Row, path: Path) -> None:
    """The plane path closed by its chord."""
    figure, axes = canvas(4.6, 4.2)
    x, y = zip(*data["points"], strict=True)
    axes.fill(x, y, color=GREEN, alpha=0.25, lw=0)
    axes.plot(x, y, color=BLUE, lw=1)
    axes.plot([x[0], x[-1]], [y[0], y[-1]], "--", color=GREY, lw=1)
    for k, word, mark, size, ink in ((0, "start", "o", 4, "black"), (-1, "end", "s", 4, RED)):
        axes.plot(x[k], y[k], mark, color=ink, ms=size)
        axes.annotate(word, (x[k], y[k]), textcoords="offset points", xytext=(6, 4), color=ink)
    axes.set_aspect("equal")
    axes.set_xlabel("$W^1$")
    axes.set_ylabel("$W^2$")
    axes.set_title(f"$A_{{12}} = {data['A']:+.3f}$", loc="left")
    finish(figure, [axes], path)


def draw_errors(d: Row, path: Path) -> None:
    """Error of a joined area by cells, and normals per step by method."""
    figure, panels = canvas(8.4, 3.4, ncols=2)
    left, right = panels
    for key, know, mark, ink, factor in (
        ("without_H", "W", "o", BLUE, 4),
        ("with_H", "W, H", "s", GREEN, 12),
    ):
        left.loglog(d["cells"], d[key], mark, color=ink, label=f"cells know ${know}$")
        left.loglog(d["cells"], [1 / math.sqrt(factor * n) for n in d["cells"]], color=ink, lw=0.8)
    left.set_xlabel("fine cells $n$")
    left.set_title("RMSE of $A$; lines: $h/\\sqrt{4n}$, $h/\\sqrt{12n}$", loc="left", fontsize=10)
    for name, ink in INKS.items():
        right.loglog(d["h"], d["normals"][name], ".-", color=ink, label=name, lw=1)
    right.set_xlabel("step $h$")
    right.set_title("normals per step, error $h^{3/2}$, $m = 2$", loc="left", fontsize=10)
    for axes in panels:
        axes.legend(frameon=False, fontsize=8)
    finish(figure, panels, path)


FILES = tuple(f"brownian-{name}.svg" for name in ("W", "H", "K", "given", "A", "area-error"))
EXPERIMENT = Experiment(NAME, __doc__, 1, BUDGETS, measure, tables, draw, figures=FILES, seed=11)

if __name__ == "__main__":
    EXPERIMENT.main()
