"""Error against work: samplers on the ring and the smooth mixture, SDE solvers on additive noise.

Samplers are compared with the exact ODE, next to diffusers' schedulers where it is installed; Euler-Maruyama,
SRA1 and ShARK along one path each, next to torchsde's methods and, where it is installed, diffrax's.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import fewstep as fs
from base import Experiment, Job, Record, Row, single_threaded, table
from fewstep_analysis import problems, sampler_work, work

SDE = "work-precision-sde"
PROBLEMS = ("ring", "smooth")


@dataclass(frozen=True)
class Budget:
    """Levels and paths of the SDE; problems and network evaluations of the samplers."""

    levels: range
    paths: int
    problems: tuple[str, ...]
    evaluations: tuple[int, ...]


BUDGETS = {
    "smoke": Budget(range(3, 5), 64, PROBLEMS[:1], (5, 10)),
    "paper": Budget(range(3, 9), 2048, PROBLEMS, sampler_work.EVALUATIONS),
}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """One record of the SDE solvers, on one thread, and one per diffusion problem."""
    single_threaded()
    solvers = [fs.EulerMaruyama(), fs.SRA1(), fs.ShARK()]
    options = {"levels": budget.levels, "paths": budget.paths, "seed": job.seed}
    peers = None
    if importlib.util.find_spec("diffrax"):
        from peers_diffrax import diffrax_series as peers
    made = {SDE: work.sde_work_precision(problems.additive_sine(), solvers, peers=peers, **options)}
    for name in budget.problems:
        made[f"work-precision-{name}"] = sampler_work.work_precision(name, budget.evaluations, seed=job.seed)
    return made


def tables(records: dict[str, Record]) -> dict[str, str]:
    """RMSE by evaluations on the grid even in log sigma; all grids at ten evaluations; the SDE solvers."""
    made = {}
    samplers = {name: records[f"work-precision-{name}"] for name in PROBLEMS if f"work-precision-{name}" in records}
    for name, record in samplers.items():
        cells = [line.split("|") for line in sampler_work.table(record, spacing="logsnr").splitlines()]
        made[f"work-{name}"] = "\n".join("|".join(c[:2] + c[3:]) for c in cells)  # all have one spacing
    if len(samplers) == len(PROBLEMS):
        made["work-spacings"] = spacings({name: r.data["series"] for name, r in samplers.items()})
    rows = [
        [s["package"], s["name"], f"{s['error'][-1]:.2e}", f"{s['seconds'][-1]:.3f}"]
        for s in records[SDE].data["series"]
    ]
    return made | {"work-sde": table(["package", "solver", "RMSE", "seconds"], rows)}


def spacings(series: dict[str, list[Row]], evaluations: int = 10) -> str:
    """RMSE of the solvers that can spend exactly so many evaluations, one column per problem and grid."""
    columns = [(problem, spacing) for problem in series for spacing in sampler_work.SPACINGS]
    found: dict[str, dict[tuple[str, str], str]] = {}
    for problem, rows in series.items():
        for s in rows:
            known = dict(zip(s["nfe"], s["rmse"]))
            if s["by"] == "fewstep" and evaluations in known:
                found.setdefault(s["name"], {})[problem, s["spacing"]] = f"{known[evaluations]:.2g}"
    full = {name: cells for name, cells in found.items() if len(cells) == len(columns)}
    head = ["solver", *(f"{problem}, {spacing}" for problem, spacing in columns)]
    return table(head, [[name, *(cells[c] for c in columns)] for name, cells in full.items()])


def draw(records: dict[str, Record], folder: Path) -> None:
    """One figure per record."""
    for name, record in ((n, r) for n, r in records.items() if n in FILES):
        (work.work_figure if name == SDE else sampler_work.figure)(record, folder / f"{name}.svg")


FILES = (SDE, *(f"work-precision-{name}" for name in PROBLEMS))
EXPERIMENT = Experiment(
    "work-precision", __doc__, 5, BUDGETS, measure, tables, draw, records=FILES,
    figures=tuple(f"{name}.svg" for name in FILES),
)  # fmt: skip

if __name__ == "__main__":
    EXPERIMENT.main()
