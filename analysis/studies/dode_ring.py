"""D-ODE on the ring of 8 Gaussians: distance to the exact ODE against network evaluations.

python -m fewstep.analysis.studies.dode_ring --out docs/records/dode-ring.json
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import fewstep as fs
import torch
from torch import Tensor

from ..figures import canvas, write
from ..records import Record

COUNTS = (5, 8, 10)
BASES = {"DDIM": fs.DDIM(), "DPM-Solver++(2M)": fs.DPMSolverPP(2), "UniPC(2)": fs.UniPC(2)}
LEARNED = {"greedy, 1 term": {}, "greedy, 3 terms": {"terms": 3}}
GLOBAL = {"refine": "global", "learn_grid": True, "iterations": 3000, "rate": 0.03}
STYLES = {"untrained": ":", "greedy, 1 term": "--", "greedy, 3 terms": "-.", "grid and weights": "-"}


def ring() -> fs.Denoising:
    """Radius 1, standard deviation 0.15; sigma from 157 to 0.01, as DDPM's linear schedule has it."""
    angles = torch.arange(8) * math.pi / 4
    means, variance = torch.stack([angles.cos(), angles.sin()], 1).double(), 0.15**2

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        gap, total = x[:, None, :] - means.to(x), variance + sigma * sigma
        share = torch.softmax(-gap.square().sum(-1) / (2 * total), 1)[..., None]
        return (share * (means.to(x) + variance / total * gap)).sum(1)

    return fs.Denoising(denoiser, fs.EDM(0.01, 157.41))


def study(seed: int = 0, samples: int = 8192, quick: bool = False) -> Record:
    """Fit on one set of start states, measure on 2,048 others."""
    problem = ring()
    fitted, test = (
        torch.randn(n, 2, generator=torch.Generator().manual_seed(s), dtype=torch.float64) * 157.41
        for n, s in ((samples, seed), (2048, seed + 99))
    )
    exact = fs.sample(problem, fs.UniPC(3), noise=test, steps=2000)

    def distance(solver: Any, **grid: Any) -> float:
        with torch.no_grad():
            x = fs.sample(problem, solver, noise=test, **grid)
        return float((x - exact).square().sum(1).mean().sqrt())

    rows: list[dict[str, Any]] = []

    def note(base: str, kind: str, n: int, solver: Any, seconds: float, **grid: Any) -> None:
        found = {"base": base, "kind": kind, "evaluations": n, "rmse": distance(solver, **grid)}
        rows.append(found | {"seconds": round(seconds, 2)})

    for n in COUNTS:
        for name, base in BASES.items():
            note(name, "untrained", n, base, 0.0, steps=n)
            for kind, options in LEARNED.items():
                student, report = fs.distill_dode(problem, base, noise=fitted, steps=n, **options)
                note(name, kind, n, student, report.seconds)
        options = GLOBAL | ({"iterations": 50} if quick else {})
        student, report = fs.distill_dode(problem, fs.DPMSolverPP(2), noise=fitted, steps=n, **options)
        note("DPM-Solver++(2M)", "grid and weights", n, student, report.seconds)
    return Record("dode-ring", {"samples": samples, "held_out": 2048, "rows": rows}, seed)


def draw(record: Record, path: str | Path) -> Path:
    """Distance against evaluations; a line style for a way of fitting, a colour for a base."""
    figure, axes = canvas()
    colours = dict(zip(BASES, ("#56B4E9", "#0072B2", "#009E73"), strict=True))
    for kind, style in STYLES.items():
        for base in BASES:
            points = [
                (r["evaluations"], r["rmse"])
                for r in record.data["rows"]
                if (r["base"], r["kind"]) == (base, kind)
            ]
            if points:
                colour = "#D55E00" if kind == "grid and weights" else colours[base]
                axes.semilogy(*zip(*points, strict=True), style, marker="o", ms=4, color=colour,
                              label=f"{base}, {kind}")  # fmt: skip
    axes.set_xlabel("network evaluations")
    axes.set_ylabel("RMSE to the exact ODE on held-out noise")
    axes.set_xticks(COUNTS)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    return write(figure, path)


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record and the figure; returns a line a row."""
    smoke = budget == "smoke"
    record = study(seed, 512 if smoke else 8192, quick=smoke)
    record.save(out / "records" / "dode-ring.json")
    draw(record, out / "figures" / "dode-ring.svg")
    rows = record.data["rows"]
    return [f"{r['base']:<18} {r['kind']:<18} {r['evaluations']:>3} {r['rmse']:.4f}" for r in rows]
