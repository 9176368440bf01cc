"""Every ratio to a peer that the pages publish: torchsde, diffusers, diffrax, k-diffusion, where installed.

Runs `speed_rows`, `brownian_speed`, `sampler_overhead` and `work_precision`, reads their records, and then times the
two drop-in interfaces next to what they replace. Ratios to torchsde's paths and `sdeint` are those of `speed_rows`, at
every size. A ratio is the peer's time (or error) over this library's, for
the same work in the same run: above 1 this library is faster (or closer to the exact solution).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torchsde
from torch import Tensor

import brownian_speed
import fewstep as fs
import peers_k_diffusion
import sampler_overhead
import speed_rows
import work_precision
from base import Experiment, Job, Record, Row, single_threaded, table
from fewstep.integrations import k_diffusion as ours_k
from fewstep.integrations.torchsde import sdeint
from sampler_overhead import keep_memory, medians

NAME = "benchmarks"
PARTS = (speed_rows, brownian_speed, sampler_overhead, work_precision)
PEERS = ("torchsde", "diffrax", "jax", "diffusers", "k-diffusion")
# what the noise of a step costs: ours, and the peer's series of the same work
NOISE = {
    "W of 256 steps, path": ("path W, walked", "torchsde W, queries, dt hint"),
    "W of 256 steps, path, no hint": ("path W, walked", "torchsde W, queries"),
    "W and H of 256 steps, path": ("path W,H, walked", "torchsde W,U, queries, dt hint"),
}
TREES = {
    "W of 256 steps, path": ("path W, walked", "diffrax W, queries in a scan"),
    "W and H of 256 steps, path": ("path W,H, walked", "diffrax W,H, queries in a scan"),
}
TWINS = {"euler": "EulerMaruyama", "srk": "SRA1", "Euler": "EulerMaruyama", "ShARK": "ShARK"}
SDE_METHODS = {"euler": "none", "milstein": "none", "srk": "space-time"}  # and the Lévy data of their path
K_SAMPLERS: dict[str, fs.DiffusionSolver] = {
    "euler": fs.EDMEuler(), "heun": fs.EDMHeun(), "dpm_2": fs.DPMSolver(2), "dpmpp_2m": fs.DPMSolverPP(2),
    "dpmpp_2m_sde": fs.DPMSolverSDE(2),
}  # fmt: skip
SAMPLERS = {"DPM++ 2M": "DPMSolverPP(2)", "DEIS 3": "DEIS(3)", "UniPC 2": "UniPC(2)", "UniPC 3": "UniPC(3)"}


@dataclass(frozen=True)
class Budget:
    """Which budget the parts have, and rounds of timing."""

    parts: str
    rounds: int


BUDGETS = {"smoke": Budget("smoke", 2), "paper": Budget("paper", 9)}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """The records of the parts, and the one of all ratios."""
    made: dict[str, Record] = {}
    for part in PARTS:
        made |= part.measure(part.BUDGETS[budget.parts], job)
    single_threaded()
    keep_memory()
    rows = [
        *noise(made["brownian-speed"]), *solves(made["work-precision-sde"]),
        *drop_in_sdeint(budget.rounds, job.seed), *overheads(made["sampler-overhead"]),
        *drop_in_k(budget.rounds, job.seed), *errors(made["work-precision-ring"]),
    ]  # fmt: skip
    return made | {NAME: Record(NAME, {"rows": rows, "peers": {n: version(n) for n in PEERS}}, job.seed)}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def row(group: str, what: str, peer: str, ours: float, theirs: float, unit: str) -> Row:
    """One line of the table."""
    return dict(group=group, what=what, peer=peer, ours=ours, theirs=theirs, unit=unit, ratio=theirs / ours)


def noise(record: Record) -> list[Row]:
    """Brownian increments; diffrax's relative to jax's bare loop, ours to torch's."""
    found = {r["series"]: r for r in record.data["rows"]}
    pairs = (("torchsde", "seconds", "ms", 1e3, NOISE), ("diffrax", "to_bare_loop", "bare loops", 1.0, TREES))
    return [
        row("noise", what, peer, scale * found[a][key], scale * found[b][key], unit)
        for peer, key, unit, scale, names in pairs
        for what, (a, b) in names.items()
        if b in found
    ]


def solves(record: Record) -> list[Row]:
    """Complete solves at the finest level, of equal errors."""
    own = {s["name"]: s for s in record.data["series"] if s["package"] == "fewstep"}
    steps, rows = 2 ** record.data["levels"][-1], []
    for s in record.data["series"]:
        if s["package"] != "fewstep":
            twin = own[TWINS[s["name"]]]
            what, ms = (
                f"{twin['name']}, {steps} steps, additive noise",
                [1e3 * x["seconds"][-1] for x in (twin, s)],
            )
            rows.append(row("solve", what, f"{s['package']} {s['name']}", *ms, "ms"))
    return rows


def overheads(record: Record) -> list[Row]:
    """Sampling loops of 50 steps around a network that costs nothing."""
    return [
        row("sampling loop", f"{r['solver']}, {r['steps']} steps, {r['shape']}, {name}", "diffusers", r[key],
            r["diffusers_ratio"], "bare loops")
        for r in record.data["rows"] if r["steps"] == 50 and "diffusers_ratio" in r
        for name, key in (("fs.sample", "fewstep_ratio"), ("FewStepScheduler", "scheduler_ratio"))
    ]  # fmt: skip


def errors(record: Record, evaluations: int = 10) -> list[Row]:
    """RMSE to the exact ODE at ten evaluations, both on Karras' grid, which diffusers has too."""
    found = {
        (s["by"], s["name"]): dict(zip(s["nfe"], s["rmse"])).get(evaluations)
        for s in record.data["series"]
        if s["spacing"] == "karras"
    }
    return [
        row("error", f"{own}, {evaluations} evaluations, {record.data['problem']}, Karras grid", "diffusers",
            found["fewstep", own], found["diffusers", name], "RMSE")
        for name, own in SAMPLERS.items() if ("diffusers", name) in found
    ]  # fmt: skip


class GeometricBrownianMotion(torch.nn.Module):
    """An SDE object of torchsde."""

    noise_type: str = "diagonal"
    sde_type: str = "ito"

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.05 * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.2 * y


def drop_in_sdeint(rounds: int, seed: int) -> list[Row]:
    """`sdeint` on an SDE object of torchsde: this library's with its path, torchsde's with dt as a hint."""
    sde, y0, ts, h = GeometricBrownianMotion(), torch.ones(4096, 16), torch.tensor([0.0, 1.0]), 2.0**-8
    rows = []
    for method, area in SDE_METHODS.items():

        def ours(method: str = method, area: str = area) -> Tensor:
            path = fs.BrownianPath((4096, 16), seed=seed, levy="W" if area == "none" else "H")
            return sdeint(sde, y0, ts, bm=path, method=method, dt=h)  # type: ignore[no-any-return]

        def theirs(method: str = method, area: str = area) -> Tensor:
            bm = torchsde.BrownianInterval(0.0, 1.0, size=(4096, 16), dtype=torch.float32, entropy=seed, dt=h,
                                           levy_area_approximation=area)  # fmt: skip
            return torchsde.sdeint(sde, y0, ts, bm=bm, method=method, dt=h)  # type: ignore[no-any-return]

        ms = {k: 1e3 * v for k, v in medians({"ours": ours, "theirs": theirs}, rounds).items()}
        rows.append(row("drop-in", f"sdeint, {method}, 256 steps", "torchsde", **ms, unit="ms"))
    return rows


def drop_in_k(rounds: int, seed: int) -> list[Row]:
    """k-diffusion's sampler functions and this library's: one model, grid and noise; 50 steps."""
    if not peers_k_diffusion.installed():
        return []
    rows, shape = [], (2, 4, 8, 8)
    with peers_k_diffusion.modules() as (sampling, _):
        sigmas = sampling.get_sigmas_karras(50, 0.03, 15.0)
        x = 15.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for name, solver in K_SAMPLERS.items():
            args: tuple[Any, ...] = (lambda x, sigma, **_: 0.1 * x, x, sigmas)
            options: dict[str, Any] = {"disable": True}
            if name.endswith("sde"):
                options["noise_sampler"] = lambda *_, x=x: 0.1 * x  # no noise is drawn: the loop alone
            ready = ours_k.sampler(solver)  # made once, and called for each batch, as a program does
            series: dict[str, Callable[[], Tensor]] = {
                "ours": lambda f=ready, a=args, k=options: f(*a, **k),
                "theirs": lambda n=name, a=args, k=options: getattr(sampling, f"sample_{n}")(*a, **k),
            }
            assert torch.allclose(series["ours"](), series["theirs"](), rtol=1e-4, atol=1e-4)
            ms = {k: 1e3 * v for k, v in medians(series, 7 * rounds).items()}
            rows.append(row("drop-in", f"sample_{name}, 50 steps, {shape}", "k-diffusion", **ms, unit="ms"))
    return rows


def tables(records: dict[str, Record]) -> dict[str, str]:
    """The geometric means, and then every row."""
    record = records[NAME]
    head = ["what", "peer", "fewstep", "peer's", "unit", "ratio"]
    rows = [
        [r["what"], r["peer"], f"{r['ours']:.3g}", f"{r['theirs']:.3g}", r["unit"], f"{r['ratio']:.2f}"]
        for r in published(record)
    ]
    versions = ", ".join(f"{k} {v or 'not installed'}" for k, v in record.data["peers"].items())
    made = record.made
    note = f"*{versions}; torch {made['versions']['torch']}, Python {made['versions']['python']}; "
    note += f"{made['device']}, one thread; seed {record.seed}.*"
    return {NAME: f"{summary(record)}\n\n{table(head, rows)}\n\n{note}"}


def published(record: Record) -> list[Row]:
    """The rows without those of one size whose ratio depends on it, which `speed_rows` measures at every size."""
    return [r for r in record.data["rows"] if r["group"] not in ("noise", "drop-in") or r["peer"] == "diffrax"]


def summary(record: Record) -> str:
    """The geometric mean of the ratios, by group and peer."""
    groups: dict[tuple[str, str], list[float]] = {}
    for r in published(record):
        groups.setdefault((r["group"], r["peer"].split()[0]), []).append(r["ratio"])
    rows = []
    for (group, peer), ratios in groups.items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        rows.append([group, peer, f"{min(ratios):.2f} to {max(ratios):.2f}", f"{mean:.2f}"])
    return table(["what", "peer", "ratios", "geometric mean"], rows)


def draw(records: dict[str, Record], folder: Path) -> None:
    """The figures of the parts."""
    for part in PARTS:
        part.EXPERIMENT.draw(records, folder)


NEEDS = "the peers for their rows (diffusers; diffrax; k-diffusion with torchdiffeq)"
EXPERIMENT = Experiment(NAME, __doc__, 25, BUDGETS, measure, tables, draw, needs=NEEDS)

if __name__ == "__main__":
    EXPERIMENT.main()
