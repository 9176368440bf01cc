"""Fitted tables with their default options: error on fresh states, best untrained sampler and CPU seconds, by seed.

The deterministic ones are judged by the fine ODE, the stochastic ones by a fine Euler-Maruyama on the same path.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

import fewstep as fs
from base import F64, Experiment, Job, Record, Row, progress, table
from fewstep.distances import sliced_w2
from fewstep.learned.table.starts import usual
from fewstep_analysis.diffusion_problems import Mixture
from fewstep_analysis.distillation import Task, task
from sigdeg_mixture import MIXTURE, SCHEDULE, quantiles

NAME = "fitted-tables"
# (problem, evaluations, levy) and the largest RMSE that we aim at; None: a fifth of the best untrained sampler's
TARGETS: dict[tuple[str, int, str], float | None] = {
    ("mixture", 5, "K"): 1.3 * 0.125, ("mixture", 5, "H"): 1.3 * 0.21, ("ring", 5, ""): 0.0030,
    ("smooth", 3, ""): 0.0080, ("smooth", 5, ""): 0.0010, ("spiral", 5, ""): None, ("correlated", 5, ""): None,
    ("ring", 5, "K"): 1.3 * 0.115, ("ring", 8, ""): 0.0008, ("smooth", 8, ""): 0.0004, ("digits", 5, ""): 0.034,
    ("kde", 5, ""): 0.15, ("digits", 5, "K"): 1.3 * 0.22, ("ring", 10, "K"): 1.3 * 0.046,
}  # fmt: skip
LAW = 1.3 * 0.015  # W1 of the mixture at 5 evaluations that we aim at
PATHS = 4096  # of a stochastic fit; a quarter for images
MANY, BLOCK = 1 << 17, 1 << 13  # samples of the mixture whose law is judged, so many at a time


@dataclass(frozen=True)
class Budget:
    """Fits by (problem, evaluations, levy); seeds; start states of plane and image problems; fresh ones; paths; and
    samples of the mixture whose law is judged."""

    cells: tuple[tuple[str, int, str], ...]
    seeds: tuple[int, ...]
    plane: int
    image: int
    fresh: int
    paths: int
    many: int


BUDGETS = {
    "smoke": Budget((("ring", 3, ""), ("mixture", 3, "K")), (0,), 32, 16, 64, 64, BLOCK),
    "paper": Budget(tuple(TARGETS), (0, 1, 2, 3, 4), 512, 256, 2048, PATHS, MANY),
}


def kde() -> Task:
    """The exact denoiser of a sum of 899 narrow Gaussians, one at each other digit of scikit-learn."""
    from sklearn.datasets import load_digits

    means, schedule = torch.tensor(load_digits().data)[::2] / 8 - 1, fs.EDM(0.02, 40.0)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        v = sigma.to(x) ** 2 + 0.01
        share = (-(torch.cdist(x, means.to(x)) ** 2) / (2 * v)).softmax(1)
        return 0.01 / v * x + (1 - 0.01 / v) * (share @ means.to(x))

    return Task("kde", fs.DiffusionModel(denoiser, schedule), schedule, (means.shape[1],))


def spiral() -> Task:
    """Forty narrow Gaussians along two turns of a spiral: a problem that served no other purpose before."""
    turn = torch.linspace(0.5, 2, 40, dtype=F64)
    angle = 2 * math.pi * turn
    means = turn[:, None] / 2 * torch.stack([angle.cos(), angle.sin()], 1)
    mixture, schedule = Mixture(means, 0.05 * torch.ones(40, dtype=F64), torch.ones(40, dtype=F64) / 40), fs.VPCosine()
    return Task("spiral", fs.DiffusionModel(mixture.denoiser, schedule), schedule, (2,))


def correlated() -> Task:
    """Five Gaussians in 8 dimensions, each with correlated coordinates: the other problem that served only this."""
    generator, schedule = torch.Generator().manual_seed(1), fs.EDM(0.01, 50.0)
    means = torch.randn(5, 8, generator=generator, dtype=F64)
    spread, axes = torch.linalg.eigh(_covariances(torch.randn(5, 8, 8, generator=generator, dtype=F64)))

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        own, turned = spread.to(x), axes.to(x)
        total = own + sigma.to(x) ** 2
        gap = torch.einsum("nkd,kde->nke", x[:, None] - means.to(x), turned)
        share = (-0.5 * (gap.square() / total + total.log()).sum(2)).softmax(1)
        return share @ means.to(x) + torch.einsum("nk,nke,kde->nd", share, own / total * gap, turned)

    return Task("correlated", fs.DiffusionModel(denoiser, schedule), schedule, (8,))


def _covariances(factors: Tensor) -> Tensor:
    """(k, d, d) of variances around 0.25."""
    return 0.25 * factors @ factors.mT / factors.shape[-1]


def named(name: str) -> Task:
    """A problem of this experiment."""
    if name in (own := {"spiral": spiral, "correlated": correlated}):
        return own[name]()
    if name == "kde":
        return kde()
    if name == "mixture":
        return Task(name, fs.DiffusionModel(MIXTURE.denoiser, SCHEDULE), SCHEDULE, (1,))
    return task(name)


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Each fit once per seed; finished ones are kept in the work folder."""
    cells = [(seed, *cell) for seed in budget.seeds for cell in budget.cells]
    rows = [_row(budget, job, *cell) for cell in progress(cells, "fit")]
    data = {"rows": rows, "seconds": "CPU seconds of a fit", "threads": torch.get_num_threads()}
    return {NAME: Record(NAME, data, job.seed)}


def _row(budget: Budget, job: Job, seed: int, name: str, nfe: int, levy: str) -> Row:
    """One fit, from the work folder where it was made before."""
    file = job.work / f"{name}-{nfe}-{levy}-{seed}.json"
    if file.exists():
        found: Row = json.loads(file.read_text())
        return found
    model, key = named(name), job.seed + 1000 * seed
    plane = math.prod(model.event) < 3
    count = (budget.paths if plane else budget.paths // 4) if levy else (budget.plane if plane else budget.image)
    options = {"levy": levy} if levy else {}
    began = time.process_time()
    made, report = fs.fit_table(model.at(None), nfe=nfe, noise=model.noise(count, key), seed=key, **options)
    row: Row = {
        "problem": name, "evaluations": nfe, "levy": levy, "seed": seed, "states": count,
        "cpu_seconds": round(time.process_time() - began, 1), "start": report.start, "base": report.base,
        "fallback": report.fallback, "iterations": report.iterations, "network": report.evaluations,
    }  # fmt: skip
    fresh = budget.fresh if plane else budget.fresh // 4
    row |= (
        judged_on_paths(model, made, levy, fresh, key + 500)
        if levy
        else judged(model, made, report.base, fresh, key + 500)
    )
    if name == "mixture":
        row |= {"w1": law(model, made, budget.many, key + 700)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row))
    return row


@torch.no_grad()
def judged(model: Task, made: fs.Plan, base: str, count: int, seed: int) -> Row:
    """Distances to the fine ODE on fresh start states, and that of the untrained sampler named `base`."""
    noise = model.noise(count, seed)
    fine = fs.sample(model.at(None), fs.UniPC(3), noise=noise, steps=300)
    each = _each(fs.sample(model.at(None), made, noise=noise), fine, model)
    plan = next(s.plan for s in usual(model.schedule, made.nfe) if s.name == base)
    return {
        "untrained": float(_each(fs.sample(model.at(None), plan, noise=noise), fine, model).square().mean().sqrt()),
        "rmse": float(each.square().mean().sqrt()),
        "median": float(each.median()),
        "q90": float(each.quantile(0.9)),
    }


@torch.no_grad()
def judged_on_paths(model: Task, made: fs.Plan, levy: str, count: int, seed: int) -> Row:
    """Distances to a fine Euler-Maruyama on fresh paths, of images in standard deviations, and of the laws of both."""
    sigma, shape = made.ends, (count, *model.event)
    noise = model.noise(count, seed)
    path = fs.BrownianPath(
        shape, t0=sigma[0] ** -2, t1=sigma[1] ** -2, levy=levy, seed=seed, clock="log", dtype=model.dtype
    )
    steps = 60
    grid = torch.cat([_between(a, b, steps) for a, b in zip(made.sigmas, made.sigmas[1:])] + [made.sigmas[-1:]])
    ends = {}
    for name, solver, levels in (
        ("fine", fs.EulerMaruyama(), grid),
        ("em", fs.EulerMaruyama(), made.sigmas),
        ("own", made, None),
    ):
        ends[name] = fs.sample(model.at(None), solver, noise=noise, sigmas=levels, path=path)
    unit = float(model.schedule.alpha(made.sigmas[-1:]))
    if math.prod(model.event) > 3:
        unit = float(ends["fine"].double().var(0).mean().sqrt())
    own, em = (_each(ends[k], ends["fine"], model) / unit for k in ("own", "em"))
    return {
        "rmse": float(own.square().mean().sqrt()), "median": float(own.median()), "q90": float(own.quantile(0.9)),
        "euler_maruyama": float(em.square().mean().sqrt()),
        "law": sliced_w2(ends["own"], ends["fine"], projections=128),
    }  # fmt: skip


@torch.no_grad()
def law(model: Task, made: fs.Plan, count: int, seed: int) -> float:
    """W1 of so many samples of the mixture on the line to the exact law."""
    parts = []
    for i in range(0, count, BLOCK):
        source = fs.FreshIncrements((BLOCK, 1), levy=made.levy, seed=seed + i, dtype=model.dtype)
        parts.append(fs.sample(model.at(None), made, noise=model.noise(BLOCK, seed + i), path=source))
    found = torch.cat(parts).flatten().sort().values
    return float((found - quantiles(len(found))).abs().mean())


def _between(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """Levels from the first on, even in log sigma, without the last."""
    return first * (last / first) ** (torch.arange(steps, dtype=F64) / steps)


def _each(a: Tensor, b: Tensor, model: Task) -> Tensor:
    """(n,) Euclidean distances, of images per pixel."""
    square = (a - b).double().square().flatten(1)
    return (square.mean(1) if math.prod(model.event) > 8 else square.sum(1)).sqrt()


def tables(records: dict[str, Record]) -> dict[str, str]:
    """Medians over seeds, and the targets."""
    rows, lines, laws = records[NAME].data["rows"], [], []
    for cell in sorted({_cell(r) for r in rows}, key=lambda c: (c[2], *c)):
        name, nfe, levy = cell
        mine = [r for r in rows if _cell(r) == cell]
        middle = {k: statistics.median(r[k] for r in mine) for k in ("rmse", "median", "q90", "cpu_seconds")}
        others = [r["euler_maruyama" if levy else "untrained"] for r in mine if levy or "untrained" in r]
        other = statistics.median(others) if others else None  # in earlier records
        span = f"{min(r['rmse'] for r in mine):.2g} to {max(r['rmse'] for r in mine):.2g}"
        target = TARGETS.get(cell) or (other / 5 if other and cell in TARGETS else None)
        facts = [
            other and f"{other:.2g}",
            f"{middle['rmse']:.2g}",
            span,
            target and f"{target:.2g}",
            f"{middle['median']:.2g}",
        ]
        lines.append([name, nfe, levy, *facts, f"{middle['q90']:.2g}", f"{middle['cpu_seconds']:.0f}", len(mine)])
        if "w1" in mine[0]:
            found = sorted(r["w1"] for r in mine)
            laws.append(f"{levy} {statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})")
    head = ["problem", "evaluations", "reads", "untrained", "RMSE", "over seeds", "target", "median", "90 %", "CPU s",
            "seeds"]  # fmt: skip
    note = f"W1 of samples of the mixture to the exact law, target {LAW:.2g}: {', '.join(laws)}." if laws else ""
    return {NAME: f"{table(head, lines)}\n\n{note}".rstrip()}


def _cell(row: Row) -> tuple[str, int, str]:
    """What was fitted."""
    return row["problem"], row["evaluations"], row["levy"]


EXPERIMENT = Experiment(NAME, __doc__ or "", 40, BUDGETS, measure, tables, records=(NAME,))

if __name__ == "__main__":
    EXPERIMENT.main()
