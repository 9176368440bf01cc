"""Brownian paths and their letters W, H, K and A, drawn; and the orders that areas buy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fewstep.brownian import AreaPath, BrownianPath, FreshIncrements, Increment, levy_area
from fewstep.brownian.levy_area import terms_for
from fewstep_analysis.figures import canvas, write
from fewstep_analysis.records import Record

TAKES = "1 min"
BLUE, GREEN, ORANGE, RED, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#777777"
FINE = 512


def compute(seed: int, share: float = 1.0) -> dict[str, Any]:
    """All numbers of all figures; `share` of the paths."""
    return {
        "path": one_path(seed), "plane": plane(seed), "fold": fold(seed),
        "areas": areas(seed, int(4000 * share)), "orders": orders(seed, int(1500 * share)),
    }  # fmt: skip


def one_path(seed: int) -> dict[str, Any]:
    """A path on [0, 1] with its W, H, K; and its four quarters' (W, H)."""
    path = BrownianPath((1,), seed=seed, levy="K", dtype=torch.float64)
    values = [0.0]
    for inc in path.increments(torch.linspace(0, 1, FINE + 1)):
        values.append(values[-1] + float(inc.W))
    whole = path.increment(0.0, 1.0)
    quarters = [{"W": float(i.W), "H": float(i.H)} for i in path.increments([0.0, 0.25, 0.5, 0.75, 1.0])]
    assert whole.H is not None
    assert whole.K is not None
    return {
        "values": values, "W": float(whole.W), "H": float(whole.H), "K": float(whole.K),
        "quarters": quarters,
    }  # fmt: skip


def plane(seed: int) -> dict[str, Any]:
    """A path in the plane with its Lévy area."""
    path = BrownianPath((2,), seed=seed, levy="H", dtype=torch.float64)
    points = [[0.0, 0.0]]
    for inc in path.increments(torch.linspace(0, 1, FINE + 1)):
        points.append([points[-1][0] + float(inc.W[0]), points[-1][1] + float(inc.W[1])])
    A = AreaPath(path, FINE).increment(0.0, 1.0).A
    assert A is not None
    return {"points": points, "A": float(A[0, 1])}


def fold(seed: int) -> dict[str, Any]:
    """Many paths with one and the same W, H, K: what the numbers do not say."""
    out = {}
    for levy, known in (("W", 1), ("H", 2), ("K", 3)):
        path = BrownianPath((200,), seed=seed, levy="K", dtype=torch.float64)
        kept = path._root

        def root(draw: Any, remember: bool, known: int = known, kept: Any = kept) -> Any:
            cell = kept(draw, remember)
            fixed = (0.9, 0.28, -0.035)
            for v, c in zip(cell.values[:known], fixed, strict=False):
                v.fill_(c)
            return cell

        path._root = root  # type: ignore[method-assign]
        total, rows = torch.zeros(200, dtype=torch.float64), [[0.0] * 200]
        for inc in path.increments(torch.linspace(0, 1, 65)):
            total = total + inc.W
            rows.append(total.tolist())
        values = torch.tensor(rows)
        out[levy] = {
            "mean": values.mean(1).tolist(), "std": values.std(1).tolist(),
            "some": values[:, :12].T.tolist(),
        }  # fmt: skip
    return out


def areas(seed: int, paths: int) -> dict[str, Any]:
    """Root mean square error of joined areas by cells; normals a step needs by method and h."""
    fine, path = 1024, BrownianPath((paths, 2), seed=seed, levy="H", dtype=torch.float64)
    best = AreaPath(path, fine).increment(0.0, 1.0)
    flat = BrownianOnly(path)
    cells = [2**k for k in range(8)]
    with_H, without = [], []
    assert best.A is not None
    for n in cells:
        for out, source in ((with_H, path), (without, flat)):
            A = join_areas(source, n)
            out.append(float((A - best.A[:, 0, 1]).square().mean().sqrt()))
    hs = [2.0**-k for k in range(2, 13)]
    counts = {
        "fourier": lambda n: 4 * n, "milstein": lambda n: 4 * n + 2, "legendre": lambda n: 2 * n,
        "wiktorsson": lambda n: 4 * n + 1, "mrongowius_roessler": lambda n: 4 * n + 3,
    }  # fmt: skip
    cost = {m: [count(terms_for(m, h, 2)) for h in hs] for m, count in counts.items()}
    inc = FreshIncrements((20000, 2), "H", seed=seed, dtype=torch.float64).increment(0.0, 1.0)
    hist = levy_area(inc, "foster", seed)[:, 0, 1].square().mean()
    return {
        "cells": cells, "with_H": with_H, "without_H": without, "h": hs, "normals": cost,
        "foster_variance": float(hist),
    }  # fmt: skip


def orders(seed: int, paths: int) -> dict[str, Any]:
    """Strong errors of the log-ODE method on dy = B_1 y o dW^1 + B_2 y o dW^2, by where A comes from.

    B_1, B_2 are rotations of space about two axes, so a step is a matrix exponential and all that is
    wrong is the area. The reference takes 2048 steps of the same path.
    """
    path = BrownianPath((paths, 2), seed=seed, levy="H", dtype=torch.float64)
    true = AreaPath(path, 2048)
    reference = rotate(true, 2048, "true")
    steps = [4, 8, 16, 32, 64]
    errors: dict[str, list[float]] = {}
    for kind in ("none", "mean", "davie", "foster", "true"):
        source = true if kind == "true" else path
        found = [(rotate(source, n, kind) - reference).square().sum(-1) for n in steps]
        errors[kind] = [float(e.mean().sqrt()) for e in found]
    slopes = {}
    x = torch.tensor(steps).double().log()
    for kind, e in errors.items():
        y = torch.tensor(e).double().log()
        slopes[kind] = -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return {"steps": steps, "errors": errors, "slopes": slopes}


def rotate(source: Any, n: int, kind: str) -> torch.Tensor:
    """The final point of the log-ODE method with n steps; `kind` says what area it is given."""
    B = torch.zeros(2, 3, 3, dtype=torch.float64)
    B[0, 1, 2], B[0, 2, 1], B[1, 2, 0], B[1, 0, 2] = -1.0, 1.0, -1.0, 1.0
    bracket = B[1] @ B[0] - B[0] @ B[1]  # [f_1, f_2] = Df_2 f_1 - Df_1 f_2
    y = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(source.shape[0], 1)
    generator = torch.Generator().manual_seed(n)
    for inc in source.increments(torch.linspace(0, 1, n + 1, dtype=torch.float64)):
        if kind == "mean":
            inc = Increment(inc.h, inc.W, inc.H, A=levy_area(inc, "legendre", terms=1))
        elif kind in ("davie", "foster"):
            inc = Increment(inc.h, inc.W, inc.H, A=levy_area(inc, kind, generator))
        M = torch.einsum("bi,ijk->bjk", inc.W, B)
        if inc.A is not None:
            M = M + inc.A[:, 0, 1, None, None] * bracket
        y = (torch.linalg.matrix_exp(M) @ y.unsqueeze(-1)).squeeze(-1)
    return y


class BrownianOnly:
    """A path that has forgotten its H."""

    def __init__(self, path: BrownianPath) -> None:
        self.path = path

    def increments(self, grid: torch.Tensor) -> Any:
        zero = torch.zeros(self.path.shape, dtype=self.path.dtype)
        return (Increment(i.h, i.W, zero) for i in self.path.increments(grid))


def join_areas(source: Any, n: int) -> torch.Tensor:
    """The (0, 1) entry of the area over [0, 1] from n cells' conditional means."""
    joined: Increment | None = None
    for inc in source.increments(torch.linspace(0, 1, n + 1)):
        whole = Increment(inc.h, inc.W, inc.H, A=levy_area(inc, "legendre", terms=1))
        joined = whole if joined is None else joined.join(whole)
    assert joined is not None
    assert joined.A is not None
    return joined.A[:, 0, 1]


def times(n: int) -> list[float]:
    return [i / n for i in range(n + 1)]


def draw_W_H_K(data: dict[str, Any], out: Path) -> None:
    """One path three times: its end, the area over its chord, the area's first moment."""
    p, t = data["path"], times(FINE)
    chord = [u * p["W"] for u in t]
    bridge = [v - c for v, c in zip(p["values"], chord, strict=True)]
    for name in "WHK":
        figure, ax = canvas(6.4, 3.2)
        ax.set_xlabel("time $u$")
        ax.set_xlim(0, 1.12 if name == "W" else 1)
        ax.spines[["top", "right"]].set_visible(False)
        if name == "W":
            ax.plot(t, p["values"], color=BLUE, lw=1.2)
            ax.plot([0, 1], [0, p["W"]], "--", color=GREY, lw=1, label="what a step that knows $W$ sees")
            ax.annotate("", (1.03, p["W"]), (1.03, 0), arrowprops={"arrowstyle": "<->", "color": RED})
            ax.text(1.045, p["W"] / 2, "$W$", color=RED, va="center")
            ax.set_ylabel("$W_u$")
        elif name == "H":
            ax.plot(t, p["values"], color=BLUE, lw=1.2)
            ax.plot([0, 1], [0, p["W"]], "--", color=GREY, lw=1)
            up = [v >= c for v, c in zip(p["values"], chord, strict=True)]
            down = [not u for u in up]
            ax.fill_between(t, p["values"], chord, where=up, color=GREEN, alpha=0.35, lw=0, label="counts +")
            ax.fill_between(t, p["values"], chord, where=down, color=RED, alpha=0.35, lw=0, label="counts -")
            ax.set_ylabel("$W_u$")
        else:
            weighted = [b * (0.5 - u) for b, u in zip(bridge, t, strict=True)]
            ax.plot(t, bridge, color=GREY, lw=0.9, label="path minus chord")
            ax.plot(t, [0.5 - u for u in t], ":", color=ORANGE, lw=1.2, label="weight $1/2 - u$")
            up = [w >= 0 for w in weighted]
            ax.fill_between(t, weighted, where=up, color=GREEN, alpha=0.5, lw=0, label="product, +")
            down = [not u for u in up]
            ax.fill_between(t, weighted, where=down, color=RED, alpha=0.5, lw=0, label="product, -")
            ax.axhline(0, color="black", lw=0.6)
        ax.set_title(f"${name} = {p[name]:+.3f}$", loc="left")
        if name != "K":
            ax.legend(frameon=False, loc="best")
        else:
            ax.legend(frameon=False, loc="upper right")
        write(figure, out / f"brownian-{name}.svg")


def draw_fold(data: dict[str, Any], out: Path) -> None:
    """Mean and spread of the path given W, given W and H, given W, H and K."""
    figure, axes = canvas(8.4, 2.9, ncols=3, sharey=True)
    t = times(64)
    for ax, (levy, title) in zip(axes, (("W", "W"), ("H", "W, H"), ("K", "W, H, K")), strict=True):
        d = data["fold"][levy]
        for line in d["some"]:
            ax.plot(t, line, color=BLUE, lw=0.5, alpha=0.5)
        low = [m - 2 * s for m, s in zip(d["mean"], d["std"], strict=True)]
        high = [m + 2 * s for m, s in zip(d["mean"], d["std"], strict=True)]
        ax.fill_between(t, low, high, color=ORANGE, alpha=0.3, lw=0)
        ax.plot(t, d["mean"], color=RED, lw=1.5)
        ax.set_title(f"given ${title}$", loc="left")
        ax.set_xlabel("time $u$")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("$W_u$")
    write(figure, out / "brownian-given.svg")


def draw_area(data: dict[str, Any], out: Path) -> None:
    """The plane path closed by its chord."""
    figure, ax = canvas(4.6, 4.2)
    x, y = zip(*data["plane"]["points"], strict=True)
    ax.fill(x, y, color=GREEN, alpha=0.25, lw=0)
    ax.plot(x, y, color=BLUE, lw=1)
    ax.plot([x[0], x[-1]], [y[0], y[-1]], "--", color=GREY, lw=1)
    ax.plot(x[0], y[0], "o", color="black", ms=4)
    ax.plot(x[-1], y[-1], "s", color=RED, ms=4)
    ax.annotate("start", (x[0], y[0]), textcoords="offset points", xytext=(6, 4))
    ax.annotate("end", (x[-1], y[-1]), textcoords="offset points", xytext=(6, 4), color=RED)
    ax.set_aspect("equal")
    ax.set_xlabel("$W^1$")
    ax.set_ylabel("$W^2$")
    ax.set_title(f"$A_{{12}} = {data['plane']['A']:+.3f}$", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    write(figure, out / "brownian-A.svg")


def draw_errors(data: dict[str, Any], out: Path) -> None:
    """Error of a joined area by cells, and normals a step by method."""
    figure, (left, right) = canvas(8.4, 3.4, ncols=2)
    d = data["areas"]
    left.loglog(d["cells"], d["without_H"], "o", color=BLUE, label="cells know $W$")
    left.loglog(d["cells"], d["with_H"], "s", color=GREEN, label="cells know $W, H$")
    left.loglog(d["cells"], [1 / math.sqrt(4 * n) for n in d["cells"]], color=BLUE, lw=0.8)
    left.loglog(d["cells"], [1 / math.sqrt(12 * n) for n in d["cells"]], color=GREEN, lw=0.8)
    left.set_xlabel("fine cells $n$")
    left.set_title("RMSE of $A$; lines: $h/\\sqrt{4n}$, $h/\\sqrt{12n}$", loc="left", fontsize=10)
    styles = {
        "fourier": GREY, "milstein": BLUE, "legendre": GREEN, "wiktorsson": ORANGE,
        "mrongowius_roessler": RED,
    }  # fmt: skip
    for name, ink in styles.items():
        right.loglog(d["h"], d["normals"][name], ".-", color=ink, label=name, lw=1)
    right.set_xlabel("step $h$")
    right.set_title("normals a step, error $h^{3/2}$, $m = 2$", loc="left", fontsize=10)
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    write(figure, out / "brownian-area-error.svg")


AREAS = {
    "none": "none",
    "mean": "its mean given W, H",
    "davie": "drawn, `davie`",
    "foster": "drawn, `foster`",
    "true": "the path's own, `AreaPath`",
}


def orders_table(record: Record) -> str:
    """Errors and order of the log-ODE method, by the area it is given."""
    d = record.data["orders"]
    head = "| area given to a step | RMSE, 4 steps | RMSE, 64 steps | measured order |"
    rows = [
        f"| {name} | {d['errors'][k][0]:.4f} | {d['errors'][k][-1]:.4f} | {d['slopes'][k]:.2f} |"
        for k, name in AREAS.items()
    ]
    return "\n".join([head, "| --- | --- | --- | --- |", *rows])


def draw(data: dict[str, Any], out: Path) -> None:
    draw_W_H_K(data, out)
    draw_fold(data, out)
    draw_area(data, out)
    draw_errors(data, out)


def rounded(value: Any) -> Any:
    """Five digits: enough for a figure, and a record that can be read."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record and the figures; returns the table of orders. The shown path is that of seed 11."""
    torch.set_num_threads(1)
    data = rounded(compute(seed, 1.0 if budget == "paper" else 0.02))
    record = Record("brownian-figures", data, seed)
    record.save(out / "records" / "brownian-figures.json")
    draw(data, out / "figures")
    return orders_table(record).splitlines()
