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
from fewstep_analysis.distillation import Task, task
from sigdeg_mixture import MIXTURE, SCHEDULE

NAME = "fitted-tables"
# (problem, evaluations, levy) and the largest RMSE that we aim at
TARGETS: dict[tuple[str, int, str], float] = {
    ("ring", 5, ""): 0.0030, ("ring", 8, ""): 0.0008, ("smooth", 3, ""): 0.0080, ("smooth", 5, ""): 0.0010,
    ("smooth", 8, ""): 0.0004, ("kde", 5, ""): 0.15, ("digits", 5, ""): 0.034, ("mixture", 5, "K"): 1.3 * 0.125,
    ("ring", 5, "K"): 1.3 * 0.115, ("ring", 10, "K"): 1.3 * 0.046, ("digits", 5, "K"): 1.3 * 0.22,
}  # fmt: skip
PATHS = 4096  # of a stochastic fit; a quarter for images


@dataclass(frozen=True)
class Budget:
    """Fits by (problem, evaluations, levy); seeds; start states of plane and image problems; fresh ones."""

    cells: tuple[tuple[str, int, str], ...]
    seeds: tuple[int, ...]
    plane: int
    image: int
    fresh: int
    paths: int


BUDGETS = {
    "smoke": Budget((("ring", 3, ""), ("mixture", 3, "K")), (0,), 32, 16, 64, 64),
    "paper": Budget(tuple(TARGETS), (0, 1, 2, 3, 4), 512, 256, 2048, PATHS),
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


def named(name: str) -> Task:
    """A problem of this experiment."""
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
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row))
    return row


@torch.no_grad()
def judged(model: Task, made: fs.Plan, base: str, count: int, seed: int) -> Row:
    """Distances to the fine ODE on fresh start states."""
    noise = model.noise(count, seed)
    fine = fs.sample(model.at(None), fs.UniPC(3), noise=noise, steps=300)
    each = _each(fs.sample(model.at(None), made, noise=noise), fine, model)
    return {
        "rmse": float(each.square().mean().sqrt()),
        "median": float(each.median()),
        "q90": float(each.quantile(0.9)),
    }


@torch.no_grad()
def judged_on_paths(model: Task, made: fs.Plan, levy: str, count: int, seed: int) -> Row:
    """Distances to a fine Euler-Maruyama on fresh paths, and of the laws of both."""
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
    alpha = float(model.schedule.alpha(made.sigmas[-1:]))
    own, em = (_each(ends[k], ends["fine"], model) / alpha for k in ("own", "em"))
    return {
        "rmse": float(own.square().mean().sqrt()), "median": float(own.median()), "q90": float(own.quantile(0.9)),
        "euler_maruyama": float(em.square().mean().sqrt()),
        "law": sliced_w2(ends["own"], ends["fine"], projections=128),
    }  # fmt: skip


def _between(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """Levels from the first on, even in log sigma, without the last."""
    return first * (last / first) ** (torch.arange(steps, dtype=F64) / steps)


def _each(a: Tensor, b: Tensor, model: Task) -> Tensor:
    """(n,) Euclidean distances, of images per pixel."""
    square = (a - b).double().square().flatten(1)
    return (square.sum(1) if math.prod(model.event) < 3 else square.mean(1)).sqrt()


def tables(records: dict[str, Record]) -> dict[str, str]:
    """Medians over seeds, and the targets."""
    rows, lines = records[NAME].data["rows"], []
    for name, nfe, levy in dict.fromkeys((r["problem"], r["evaluations"], r["levy"]) for r in rows):
        mine = [r for r in rows if (r["problem"], r["evaluations"], r["levy"]) == (name, nfe, levy)]
        middle = {k: statistics.median(r[k] for r in mine) for k in ("rmse", "median", "q90", "cpu_seconds")}
        span = f"{min(r['rmse'] for r in mine):.2g} to {max(r['rmse'] for r in mine):.2g}"
        target = TARGETS.get((name, nfe, levy))
        facts = [f"{middle['rmse']:.2g}", span, target and f"{target:.2g}", f"{middle['median']:.2g}"]
        lines.append([name, nfe, levy, *facts, f"{middle['q90']:.2g}", f"{middle['cpu_seconds']:.0f}", len(mine)])
    head = ["problem", "evaluations", "reads", "RMSE", "over seeds", "target", "median", "90 %", "CPU s", "seeds"]
    return {NAME: table(head, lines)}


EXPERIMENT = Experiment(NAME, __doc__ or "", 40, BUDGETS, measure, tables, records=(NAME,))

if __name__ == "__main__":
    EXPERIMENT.main()
