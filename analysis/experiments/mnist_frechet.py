"""Images of the MNIST U-Net: Fréchet distances with errors, also at the best contrast, and paired distances.

A Fréchet distance of features sees the contrast of images more than their shapes: a sampler whose images are a little
pale gains by a larger contrast alone. So each set of images is also judged at the scale of one number that suits it
best, and image by image next to the fine solution of the same noise. Noise levels above 0.1 are computed in bfloat16.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
import images
from base import Experiment, Job, Record, Row, progress, single_threaded, table
from dode_mnist import MAIN, SPACING
from fewstep_analysis.distillation import Task
from learned_comparison import digits_by_class
from mnist_judge import Judge

NAME = "mnist-frechet"
FINE, REAL, OURS = "fine ODE", "test digits", "fit_table"
SCALES = [0.9 + 0.02 * k for k in range(16)]
PART = 250  # images at a time, kept when made


@dataclass(frozen=True)
class Budget:
    """What a run computes.

    Attributes:
        fit, iterations: start states of fits, and iterations of a fitted table.
        counts: network evaluations.
        images, groups: of each distance, and the groups that are left out in turn for its error.
        steps: of UniPC(3) in the place of the exact ODE.
        real: training images that Fréchet distances are taken to; None for all.
    """

    fit: int
    iterations: int
    counts: tuple[int, ...]
    images: int
    groups: int
    steps: int
    real: int | None = None


BUDGETS = {
    "smoke": Budget(16, 1, (3,), 40, 4, 4, real=200),
    "paper": Budget(64, 8, (5, 8), 2000, 20, 30),
}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Fit, sample and judge; fits and images are kept in the work folder."""
    single_threaded()
    task, judge = digits_by_class(), Judge.of(budget.real)
    labels = torch.arange(budget.images) % 10
    noise, seconds = task.noise(budget.images, job.seed + 500), dict[str, float]()
    made: dict[tuple[str, int], Tensor] = {(REAL, 0): judge.digits(labels, job.seed)}
    exact = fs.UniPC(3).plan(fs.sigma_grid(task.schedule, budget.steps), task.schedule)
    made[FINE, 0] = sampled(task, exact, noise, labels, job, FINE)
    for n in budget.counts:
        for name, of in samplers(task, budget, n, job.seed).items():
            file = job.work / f"{name}-{n}.json"
            if not file.exists():
                start = time.process_time()
                plan = of()
                file.parent.mkdir(parents=True, exist_ok=True)
                replace(plan, name=f"{time.process_time() - start:.0f}").save(file)
            plan = fs.load(file)
            seconds[f"{name}, {n}"] = float(plan.name)
            made[name, n] = sampled(task, plan, noise, labels, job, f"{name}-{n}")
    fine = judge.net(made[FINE, 0])
    rows = []
    for (name, n), x in progress(made.items(), "sampler"):
        other = None if name == REAL else made[FINE, 0]
        rows.append({"sampler": name, "evaluations": n} | judged(judge, x, other, fine, budget.groups))
    local = [{"evaluations": n, "factor": last_row(x, made[FINE, 0])} for (m, n), x in made.items() if m == OURS]
    data: Row = {"rows": rows, "samples": budget.images, "groups": budget.groups, "fine steps": budget.steps,
                 "start states": budget.fit, "seconds": seconds, "local": local}  # fmt: skip
    return {NAME: Record(NAME, data, job.seed)}


def samplers(task: Task, budget: Budget, n: int, seed: int) -> dict[str, Any]:
    """What makes each plan of n evaluations: untrained, one number per step, a fitted table."""
    noise, labels = task.noise(budget.fit, seed), task.labels(budget.fit, seed)
    grid = fs.sigma_grid(task.schedule, n, SPACING)
    given: Row = {"noise": noise, "labels": labels}
    return {
        "UniPC(2), trailing": lambda: fs.UniPC(2).plan(grid, task.schedule),
        f"D-ODE, from {MAIN}": lambda: fs.distill_dode(
            task.problem, fs.IPNDM(2), sigmas=grid, teacher=fs.IPNDM(4), teacher_substeps=4, terms=3, **given
        )[0],
        OURS: lambda: fs.fit_table(
            task.problem, nfe=n, starts=1, iterations=budget.iterations, batch=16, teacher_steps=40, seed=seed, **given
        )[0],
    }  # fmt: skip


@torch.no_grad()
def sampled(task: Task, plan: fs.Plan, noise: Tensor, labels: Tensor, job: Job, name: str) -> Tensor:
    """Images of a plan, part by part."""
    parts = []
    for i, (x, y) in enumerate(zip(noise.split(PART), labels.split(PART))):
        file = job.work / f"{name}-{i}.pt"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(fs.sample(task.at(y), plan, noise=x), file)
        parts.append(torch.load(file, weights_only=True))
    return torch.cat(parts)


@torch.no_grad()
def judged(judge: Judge, x: Tensor, fine: Tensor | None, features: Tensor, groups: int) -> Row:
    """Fréchet distance as it is and at the best scale, with jackknife errors; distances to the fine solution."""
    plain = judge.net(x)
    scaled = {s: judge.net(x * s) for s in SCALES}
    scale = min(SCALES, key=lambda s: images.frechet_distance(scaled[s], judge.real))
    row: Row = {"scale": scale}
    for key, found in (("frechet", plain), ("matched", scaled[scale])):
        row |= {key: images.frechet_distance(found, judge.real), f"{key}_se": jackknife(found, judge.real, groups)}
    if fine is not None:
        far = (plain - features).double().square().mean(1)
        row |= {"paired_features": float(far.mean().sqrt()), "paired_features_se": _error(far)}
        far = (x - fine).double().square().flatten(1).mean(1)
        row |= {"rmse": float(far.mean().sqrt()), "rmse_se": _error(far), "median": float(far.median().sqrt())}
    return row


def last_row(x: Tensor, fine: Tensor) -> float:
    """The factor by which a 5x5 convolution of the ends, fitted to a quarter of them, changes the others' RMSE."""
    few = len(x) // 4
    patches = torch.nn.functional.unfold(x, 5, padding=2).mT.double()  # (n, pixels, 25)
    columns = torch.cat([patches, torch.ones_like(patches[..., :1])], 2)
    flat, wanted = columns[:few].flatten(0, 1), fine.double().flatten(1)
    weights = torch.linalg.solve(flat.mT @ flat, flat.mT @ wanted[:few].flatten())
    after, before = (columns[few:] @ weights - wanted[few:]), (x.double().flatten(1) - wanted)[few:]
    return float((after.square().mean() / before.square().mean()).sqrt())


def jackknife(features: Tensor, real: Tensor, groups: int) -> float:
    """Standard error of a Fréchet distance, by leaving out one of so many groups of images in turn."""
    group = torch.arange(len(features)) * groups // len(features)
    found = torch.tensor([images.frechet_distance(features[group != g], real) for g in range(groups)])
    return float(((groups - 1) / groups * (found - found.mean()).square().sum()).sqrt())


def _error(squares: Tensor) -> float:
    """Standard error of the root of the mean."""
    return float(squares.std() / len(squares) ** 0.5 / (2 * squares.mean().sqrt()).clamp(min=1e-300))


def tables(records: dict[str, Record]) -> dict[str, str]:
    """Every distance with its standard error."""
    data, lines = records[NAME].data, []
    for r in data["rows"]:
        cells = [f"{r[k]:.3f} ± {r[f'{k}_se']:.3f}" if r.get(k) else None
                 for k in ("frechet", "matched", "paired_features", "rmse")]  # fmt: skip
        lines.append([r["sampler"], r["evaluations"], *cells[:2], f"{r['scale']:.2f}", *cells[2:]])
    head = ["images", "evaluations", "Fréchet distance", "at the best scale", "that scale", "paired features, RMSE",
            "paired pixels, RMSE"]  # fmt: skip
    notes = [f"{r['factor']:.2f} at {r['evaluations']}" for r in data["local"]]
    note = (
        "A 5x5 convolution of the fitted table's ends, fitted to a quarter of these images, changes the paired RMSE of "
        f"the others by a factor of {', '.join(notes)} evaluations."
    )
    return {NAME: f"{table(head, lines)}\n\n{note}"}


EXPERIMENT = Experiment(
    NAME, __doc__, 30, BUDGETS, measure, tables, needs="diffusers, and MNIST in the folder that FEWSTEP_DATA names"
)

if __name__ == "__main__":
    EXPERIMENT.main()
