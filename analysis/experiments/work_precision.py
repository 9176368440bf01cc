"""Error against work: samplers on the ring and the smooth mixture, SDE solvers on additive noise.

Samplers against the exact ODE, beside diffusers' schedulers where it is installed; Euler-Maruyama, SRA1 and
ShARK along one path each, beside torchsde's methods and, where it is installed, diffrax's.
"""

from __future__ import annotations

from pathlib import Path

import torch

import fewstep as fs
from fewstep_analysis import problems, work
from fewstep_analysis import sampler_work as diffusion_work

TAKES = "5 min"
PROBLEMS = ("ring", "smooth")


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write a record and a figure for each problem; returns the tables."""
    paper = budget == "paper"
    lines = sde(out, paper, seed)
    for name in PROBLEMS if paper else PROBLEMS[:1]:
        record = diffusion_work.work_precision(name, **({} if paper else {"nfe": (5, 10)}), seed=seed)
        record.save(out / "records" / f"work-precision-{name}.json")
        diffusion_work.figure(record, out / "figures" / f"work-precision-{name}.svg")
        lines += [name, diffusion_work.table(record)]
    return lines


def sde(out: Path, paper: bool, seed: int) -> list[str]:
    """The SDE with additive noise, on one thread."""
    torch.set_num_threads(1)
    record = work.sde_work_precision(
        problems.additive_sine(), [fs.EulerMaruyama(), fs.SRA1(), fs.ShARK()],
        levels=range(3, 9 if paper else 5), paths=2048 if paper else 64, seed=seed,
    )  # fmt: skip
    record.save(out / "records" / "work-precision-sde.json")
    work.work_figure(record, out / "figures" / "work-precision-sde.svg")
    return [
        f"{s['package']} {s['name']}: RMSE {s['error'][-1]:.2e}, {s['seconds'][-1]:.3f} s"
        for s in record.data["series"]
    ]
