"""Diffusion solvers against the exact ODE on the ring and the smooth mixture, diffusers beside them."""

from __future__ import annotations

from pathlib import Path

import torch

from ..diffusion_work import figure, table, work_precision

PROBLEMS = ("ring", "smooth")


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write a record and a figure for each problem; returns the tables."""
    lines: list[str] = []
    for name in PROBLEMS if budget == "paper" else PROBLEMS[:1]:
        record = (
            work_precision(name, seed=seed) if budget == "paper" else work_precision(name, (5, 10), seed=seed)
        )
        record.save(out / "records" / f"work-precision-{name}.json")
        figure(record, out / "figures" / f"work-precision-{name}.svg")
        lines += [name, str(table(record))]
    return lines
