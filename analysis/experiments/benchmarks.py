"""Every ratio to a peer that the pages publish: torchsde, diffusers, diffrax, k-diffusion, where installed.

Runs `brownian-speed`, `sampler-overhead` and `work-precision`, whose records it reads, then times the two
drop-in interfaces beside what they replace. A ratio is the peer's time (or error) over this library's, of the
same work in the same run: above 1 this library is faster (or nearer).
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
import work_precision
from fewstep.integrations import k_diffusion as ours_k
from fewstep.integrations.torchsde import sdeint
from fewstep_analysis.records import Record

TAKES = "15 min"
PARTS = (brownian_speed, sampler_overhead, work_precision)
# what a step's noise costs: ours, and who does the same
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
SDE_METHODS = {"euler": "none", "milstein": "none", "srk": "space-time"}  # and what their path must know
K_SAMPLERS: dict[str, fs.DiffusionSolver] = {
    "euler": fs.EDMEuler(), "heun": fs.EDMHeun(), "dpm_2": fs.DPMSolver(2), "dpmpp_2m": fs.DPMSolverPP(2),
    "dpmpp_2m_sde": fs.DPMSolverSDE(2),
}  # fmt: skip
SAMPLERS = {"DPM++ 2M": "DPMSolverPP(2)", "DEIS 3": "DEIS(3)", "UniPC 2": "UniPC(2)", "UniPC 3": "UniPC(3)"}


def row(group: str, what: str, peer: str, ours: float, theirs: float, unit: str) -> dict[str, Any]:
    """One line of the table."""
    return {"group": group, "what": what, "peer": peer, "ours": ours, "theirs": theirs,
            "unit": unit, "ratio": theirs / ours}  # fmt: skip


def noise(record: Record) -> list[dict[str, Any]]:
    """Brownian increments; diffrax's against jax's bare loop, ours against torch's."""
    found = {r["series"]: r for r in record.data["rows"]}
    pairs = [("torchsde", "seconds", "ms", 1e3, NOISE), ("diffrax", "to_bare_loop", "bare loops", 1.0, TREES)]
    return [
        row("noise", what, peer, scale * found[a][key], scale * found[b][key], unit)
        for peer, key, unit, scale, table in pairs
        for what, (a, b) in table.items() if b in found
    ]  # fmt: skip


def solves(record: Record) -> list[dict[str, Any]]:
    """Whole solves of the finest level: the same errors, other seconds."""
    own = {s["name"]: s for s in record.data["series"] if s["package"] == "fewstep"}
    steps = 2 ** record.data["levels"][-1]
    return [
        row("solve", f"{own[TWINS[s['name']]]['name']}, {steps} steps, additive noise",
            f"{s['package']} {s['name']}", 1e3 * own[TWINS[s["name"]]]["seconds"][-1],
            1e3 * s["seconds"][-1], "ms")
        for s in record.data["series"] if s["package"] != "fewstep"
    ]  # fmt: skip


def overheads(record: Record) -> list[dict[str, Any]]:
    """Sampling loops of 50 steps around a network that costs nothing."""
    return [
        row("sampling loop", f"{r['solver']}, {r['steps']} steps, {r['shape']}, {name}", "diffusers", r[key],
            r["diffusers_ratio"], "bare loops")
        for r in record.data["rows"] if r["steps"] == 50 and "diffusers_ratio" in r
        for name, key in (("fs.sample", "fewstep_ratio"), ("FewStepScheduler", "scheduler_ratio"))
    ]  # fmt: skip


def errors(record: Record, evaluations: int = 10) -> list[dict[str, Any]]:
    """RMSE to the exact ODE at ten evaluations, both on Karras' grid, which diffusers has too."""
    found = {
        (s["by"], s["name"]): dict(zip(s["nfe"], s["rmse"])).get(evaluations)
        for s in record.data["series"] if s["spacing"] == "karras"
    }  # fmt: skip
    return [
        row("error", f"{own}, {evaluations} evaluations, {record.data['problem']}, Karras grid", "diffusers",
            found["fewstep", own], found["diffusers", name], "RMSE")
        for name, own in SAMPLERS.items() if ("diffusers", name) in found
    ]  # fmt: skip


def drop_in_sdeint(rounds: int, seed: int) -> list[dict[str, Any]]:
    """`sdeint` on torchsde's own SDE object: our import, our path; theirs, with the step told to its path."""
    sde, y0, ts = Gbm(), torch.ones(4096, 16), torch.tensor([0.0, 1.0])
    h, rows = 2.0**-8, []
    for method, area in SDE_METHODS.items():

        def ours(method: str = method, area: str = area) -> Tensor:
            path = fs.BrownianPath((4096, 16), seed=seed, levy="W" if area == "none" else "H")
            return sdeint(sde, y0, ts, bm=path, method=method, dt=h)  # type: ignore[no-any-return]

        def theirs(method: str = method, area: str = area) -> Tensor:
            bm = torchsde.BrownianInterval(0.0, 1.0, size=(4096, 16), dtype=torch.float32, entropy=seed, dt=h,
                                           levy_area_approximation=area)  # fmt: skip
            return torchsde.sdeint(sde, y0, ts, bm=bm, method=method, dt=h)  # type: ignore[no-any-return]

        seconds = sampler_overhead.medians({"ours": ours, "theirs": theirs}, rounds)
        rows.append(row("drop-in", f"sdeint, {method}, 256 steps", "torchsde", 1e3 * seconds["ours"],
                        1e3 * seconds["theirs"], "ms"))  # fmt: skip
    return rows


class Gbm(torch.nn.Module):
    """Geometric Brownian motion as torchsde has SDEs."""

    noise_type: str = "diagonal"
    sde_type: str = "ito"

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.05 * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.2 * y


def drop_in_k(rounds: int, seed: int) -> list[dict[str, Any]]:
    """k-diffusion's sampler functions and ours in their place: one model, grid and noise; 50 steps."""
    if not peers_k_diffusion.installed():
        return []
    rows, shape = [], (2, 4, 8, 8)
    with peers_k_diffusion.modules() as (sampling, _):
        sigmas = sampling.get_sigmas_karras(50, 0.03, 15.0)
        x = 15.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for name, solver in K_SAMPLERS.items():
            args: tuple[Any, ...] = (lambda x, sigma, **_: 0.1 * x, x, sigmas)
            kind: dict[str, Any] = {"disable": True}
            if name.endswith("sde"):
                kind["noise_sampler"] = lambda *_, x=x: 0.1 * x  # no noise is drawn: the loop alone
            ready = ours_k.sampler(solver)  # once, and called for each batch, as a program does
            series: dict[str, Callable[[], Tensor]] = {
                "ours": lambda f=ready, a=args, k=kind: f(*a, **k),
                "theirs": lambda n=name, a=args, k=kind: getattr(sampling, f"sample_{n}")(*a, **k),
            }
            assert torch.allclose(series["ours"](), series["theirs"](), rtol=1e-4, atol=1e-4)
            seconds = sampler_overhead.medians(series, 7 * rounds)
            rows.append(row("drop-in", f"sample_{name}, 50 steps, {shape}", "k-diffusion",
                            1e3 * seconds["ours"], 1e3 * seconds["theirs"], "ms"))  # fmt: skip
    return rows


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the records of the parts and the table of ratios; returns the table."""
    for part in PARTS:
        part.run(out, budget=budget, seed=seed, device=device)
    torch.set_num_threads(1)
    sampler_overhead.keep_memory()
    read = {k: Record.load(out / "records" / f"{k}.json") for k in (
        "brownian-speed", "sampler-overhead", "work-precision-sde", "work-precision-ring")}  # fmt: skip
    rounds = 9 if budget == "paper" else 2
    rows = [
        *noise(read["brownian-speed"]), *solves(read["work-precision-sde"]), *drop_in_sdeint(rounds, seed),
        *overheads(read["sampler-overhead"]), *drop_in_k(rounds, seed),
        *errors(read["work-precision-ring"]),
    ]  # fmt: skip
    record = Record("benchmarks", {"rows": rows, "peers": peers()}, seed)
    record.save(out / "records" / "benchmarks.json")
    return markdown(record).splitlines()


def peers() -> dict[str, str | None]:
    """The peers' versions, None for those that are not installed."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in ("torchsde", "diffrax", "jax", "diffusers", "k-diffusion")}


def summary(record: Record) -> str:
    """The geometric mean of the ratios, by group and peer."""
    rows, lines = record.data["rows"], ["| what | peer | ratios | geometric mean |", "| --- " * 4 + "|"]
    for group, peer in dict.fromkeys((r["group"], r["peer"].split()[0]) for r in rows):
        some = [r["ratio"] for r in rows if r["group"] == group and r["peer"].split()[0] == peer]
        mean = math.exp(sum(map(math.log, some)) / len(some))
        lines.append(f"| {group} | {peer} | {min(some):.2f} to {max(some):.2f} | {mean:.2f} |")
    return "\n".join(lines)


def markdown(record: Record) -> str:
    """The summary, then every row."""
    rows, lines = record.data["rows"], [summary(record)]
    lines += ["", "| what | peer | fewstep | peer's | unit | ratio |", "| --- " * 6 + "|"]
    lines += [
        f"| {r['what']} | {r['peer']} | {r['ours']:.3g} | {r['theirs']:.3g} | {r['unit']} "
        f"| {r['ratio']:.2f} |" for r in rows
    ]  # fmt: skip
    said = ", ".join(f"{k} {v or 'not installed'}" for k, v in record.data["peers"].items())
    made = record.made
    said += f"; torch {made['versions']['torch']}, Python {made['versions']['python']}"
    return "\n".join([*lines, "", f"*{said}; {made['device']}, one thread; seed {record.seed}.*"])
