"""D-ODE on the MNIST U-Net: distance to the exact ODE, a FID-type distance to real digits, and pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import datasets, images
from ..figures import canvas, colour, image_rows, write
from ..records import Record
from .dode_problems import PEER_SHADES, gains
from .dode_ring import STYLES
from .dode_tools import GREEDY, GRID, KINDS, TERMS, UNTRAINED, Bench, Task, mnist, table

COUNTS = (5, 8, 10)
CHEAP = (3, 20)  # counts without the descent
BASES = ("DDIM", "DPMSolverPP(2)")
# each family's configurations that were best on the handwritten digits (dode-digits)
PEERS = {
    "DPM-Solver++": (("DPMSolverPP(2)", "DPMSolverPP(3)"), ("logsnr",)),
    "UniPC": (("UniPC(2)", "UniPC(3)"), ("logsnr",)), "DEIS": (("DEIS(3)",), ("karras", "logsnr")),
    "iPNDM": (("IPNDM(3)",), ("karras", "logsnr")),
}  # fmt: skip
GUIDANCE, SHOWN = 3.0, 5


def ways(base: str, n: int, iterations: int) -> dict[str, dict[str, Any]]:
    """What is fitted to a base at this count."""
    quick: dict[str, Any] = {"teacher_substeps": 4}
    found = {GREEDY: quick, TERMS: quick | {"terms": 3}}
    if base == BASES[1] and n in COUNTS:
        found[GRID] = quick | {
            "terms": 3, "refine": "global", "learn_grid": True, "iterations": iterations, "rate": 0.06,
            "minibatch": 8,
        }  # fmt: skip
    return found


def study(
    task: Task, guided: Task | None, fit: int, test: int, iterations: int, steps: int, seed: int = 0,
    data: Path | None = None, counts: tuple[int, ...] = (*COUNTS, *CHEAP),
) -> tuple[Record, dict[str, Tensor]]:  # fmt: skip
    """Fit and judge; the guided model at one count alone.

    Args:
        fit, test: start states fitted to and judged on.
        iterations: of the descent for grid and weights.
        steps: of the reference, UniPC(3).
    """
    began = time.perf_counter()
    bench = Bench.of(task, fit, test, seed, steps)
    real = datasets.mnist(data)[2][:10000]
    pictures: dict[str, Tensor] = {}
    for n in sorted(counts):
        for family, (names, spacings) in PEERS.items():
            bench.peers(n, {family: names}, spacings)
        for base in BASES:
            ends = bench.learned(base, n, ways(base, n, iterations))
            for kind, images_ in ends.items():
                _row(bench, base, kind, n)["frechet"] = images.frechet_distance(images_, real)
            if n == SHOWN and base == BASES[1]:
                pictures = rows_of(bench, ends, n)
    body: dict[str, Any] = {
        "samples": fit, "held_out": test, "reference_steps": steps, "counts": sorted(counts),
        "rows": bench.rows, "gains": gains(bench.rows, [n for n in COUNTS if n in counts]),
        "frechet_exact": images.frechet_distance(bench.exact, real),
        "frechet_real": images.frechet_distance(datasets.mnist(data)[0][:test], real),
    }  # fmt: skip
    if guided is not None:
        body["guided"], more = _guided(guided, fit, test, steps, seed)
        pictures |= more
    body["seconds"] = round(time.perf_counter() - began)
    return Record("dode-mnist", body, seed), pictures


def _row(bench: Bench, base: str, kind: str, n: int) -> dict[str, Any]:
    return next(r for r in bench.rows if (r["base"], r["kind"], r["budget"]) == (base, kind, n))


def _guided(
    task: Task, fit: int, test: int, steps: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Ten classes with classifier-free guidance, one label a sample, by the closed form alone."""
    bench = Bench.of(task, fit, test // 4, seed, steps // 2)
    ends = bench.learned(BASES[1], SHOWN, {TERMS: {"terms": 3, "teacher_substeps": 4}})
    label = f"guided, {SHOWN} evaluations"
    return bench.rows, {
        f"{label}": ends[UNTRAINED][:14], "three numbers a step": ends[TERMS][:14],
        "the exact ODE, guided": bench.exact[:14],
    }  # fmt: skip


def rows_of(bench: Bench, ends: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """Rows of images of one noise."""
    rows = {
        f"{BASES[1]}, {n} evaluations": UNTRAINED,
        "three numbers a step": TERMS,
        "grid and weights": GRID,
    }
    shown = {label: ends[kind][:14] for label, kind in rows.items() if kind in ends}
    return shown | {"the exact ODE": bench.exact[:14]}


def draw(record: Record, path: str | Path) -> Path:
    """Distance to the exact ODE, and to the test digits, against evaluations."""
    figure, panels = canvas(9.4, 4.4, ncols=2)
    rows, counts = record.data["rows"], record.data["counts"]
    for axes, measure in zip(panels, ("rmse", "frechet")):
        for family, shade in PEER_SHADES.items():
            points = [(r["evaluations"], r[measure]) for r in rows if r["base"] == family and measure in r]
            if points:
                axes.loglog(*zip(*points), ":", color=colour(shade), marker="s", ms=3, lw=1,
                            label=f"{family}, untrained")  # fmt: skip
        for base, width in zip(BASES, (0.8, 1.8)):
            for kind, (shade, style) in STYLES.items():
                points = [(r["evaluations"], r[measure]) for r in rows
                          if (r["base"], r["kind"]) == (base, kind)]  # fmt: skip
                if points:
                    axes.loglog(*zip(*points), style, color=shade, marker="o", ms=3, lw=width,
                                label=f"{base}, {kind}")  # fmt: skip
        axes.set_xlabel("network evaluations")
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.set_xticks([], minor=True)
        axes.grid(True, which="major", alpha=0.3)
    panels[1].axhline(record.data["frechet_exact"], color="0.6", lw=0.8)
    panels[1].annotate("the exact ODE", (counts[0], record.data["frechet_exact"]), fontsize=7, va="bottom")
    panels[0].set_ylabel("RMSE to the exact ODE on held-out noise")
    panels[1].set_ylabel("Fréchet distance to test digits")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7.5, ncols=4, loc="outside lower center")
    return write(figure, path)


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record, the figure and the pictures; returns the tables. Needs MNIST (FEWSTEP_DATA)."""
    size = (16, 16, 2, 5) if budget == "smoke" else (64, 256, 150, 40)
    counts = (5,) if budget == "smoke" else (*COUNTS, *CHEAP)
    record, pictures = study(mnist(), mnist(guidance=GUIDANCE), *size, seed=seed, counts=counts)
    record.save(out / "records" / "dode-mnist.json")
    draw(record, out / "figures" / "dode-mnist.svg")
    image_rows(pictures, out / "figures" / "dode-mnist.png")
    data = record.data
    rows = [table(data["rows"], KINDS, data["counts"])]
    rows.append(table(data["rows"], ("best untrained",), data["counts"]))
    return [*rows, f"best untrained / best learned: {data['gains']}"]
