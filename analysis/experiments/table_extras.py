"""What a fitted table might have in addition: noise before an evaluation, and a table for each class.

Noise (after AdaSDE): before one evaluation the state receives noise of gamma times its level, and the network is given
the level of the sum; the last row is then fitted again by least squares, with and without the noise. A table for each
class is fitted to the start states of that class, next to one table for all classes with all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from base import F64, Experiment, Job, Record, Row, progress, single_threaded, table
from fewstep.distances import sliced_w2
from fewstep.learned.labelled_model import Model
from fewstep.learned.table.coefficients import Coefficients
from fewstep.learned.table.deterministic import deterministic
from fewstep.learned.table.objective import Pairs
from fewstep_analysis import diffusion_problems
from fewstep_analysis.distillation import Task
from learned_comparison import problem

NAME = "table-extras"
GAMMAS = (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Budget:
    """Problems, seeds, evaluations; start states to fit to and to judge on; options of `fit_table`."""

    noise: tuple[str, ...]
    classes: tuple[str, ...]
    seeds: tuple[int, ...]
    nfe: int
    states: int
    fresh: int
    starts: int
    iterations: int


BUDGETS = {
    "smoke": Budget(("smooth",), ("ring of classes",), (0,), 3, 64, 64, 1, 3),
    "paper": Budget(
        ("ring", "smooth", "anisotropic", "digits"), ("ring of classes", "kde of classes"), (0, 1, 2), 5, 256, 1024,
        2, 15,
    ),
}  # fmt: skip


def of_classes(means: Tensor, deviation: float, groups: Tensor, schedule: fs.Schedule, name: str) -> Task:
    """Equal Gaussians in classes: the model of a label knows the Gaussians of its class."""

    def labelled(labels: Tensor) -> fs.DiffusionModel:
        allowed = groups == labels[:, None]

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            variance = sigma.to(x).reshape(-1, 1) ** 2 + deviation**2
            logits = -(torch.cdist(x, means.to(x)) ** 2) / (2 * variance)
            share = logits.masked_fill(~allowed, -torch.inf).softmax(1)
            pull = deviation**2 / variance
            return pull * x + (1 - pull) * (share @ means.to(x))

        return fs.DiffusionModel(denoiser, schedule)

    return Task(name, labelled, schedule, (means.shape[1],), classes=int(groups.max()) + 1)


def classes(name: str) -> Task:
    """The ring in four classes of two Gaussians, or scikit-learn's digits by class."""
    if name == "ring of classes":
        found = diffusion_problems.ring()
        means = found.mixture.means
        return of_classes(means, float(found.mixture.stds[0]), torch.arange(len(means)) // 2, found.schedule, name)
    from sklearn.datasets import load_digits

    digits = load_digits()
    means, groups = torch.tensor(digits.data)[::2] / 8 - 1, torch.tensor(digits.target)[::2]
    return of_classes(means, 0.1, groups, fs.EDM(0.02, 40.0), name)


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Each part once per seed; finished ones are kept in the work folder."""
    single_threaded()
    parts: list[tuple[str, Callable[..., Row], str]] = [("noise", with_noise, n) for n in budget.noise]
    parts += [("classes", by_class, n) for n in budget.classes]
    rows = []
    for seed in progress(budget.seeds, "seed"):
        for kind, of, name in parts:
            file = job.work / f"{kind}-{name}-{seed}.json"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps({"kind": kind, "problem": name, "seed": seed} | of(budget, name, seed)))
            rows.append(json.loads(file.read_text()))
    return {NAME: Record(NAME, {"rows": rows, "evaluations": budget.nfe}, job.seed)}


def paired(model: Task, count: int, seed: int, steps: int) -> Pairs:
    """Start states with the ends of the fine ODE; a quarter of them in many dimensions to judge on."""
    count //= 4 if steps > 100 and len(model.noise(1, 0).flatten()) > 8 else 1
    noise, labels = model.noise(count, seed), model.labels(count, seed)
    return deterministic(Model.of(model.problem, labels, noise), noise, 3, None, None, steps, 256).pairs


def with_noise(budget: Budget, name: str, seed: int) -> Row:
    """The best noise before one evaluation, chosen on the fitted states and judged on fresh ones."""
    model, key = problem(name), 1000 * seed
    fit, fresh = paired(model, budget.states, key, 100), paired(model, budget.fresh, key + 500, 300)
    made, _ = fs.fit_table(
        model.problem, nfe=budget.nfe, noise=model.noise(budget.states, key), starts=budget.starts,
        iterations=budget.iterations, seed=key,
    )  # fmt: skip
    c, tried = Coefficients.of(made), dict[tuple[int, float], tuple[float, Tensor]]()
    for at, gamma in [(0, 0.0)] + [(i, g) for i in range(budget.nfe) for g in GAMMAS]:
        columns = noisy(c, fit, at, gamma, key + 1)
        row = torch.linalg.lstsq(columns.T, fit.ends.double().flatten()[:, None]).solution
        tried[at, gamma] = float((columns.T @ row - fit.ends.double().flatten()[:, None]).square().mean()), row
    best = min((k for k in tried if k[1] > 0), key=lambda k: tried[k][0])
    out: Row = {"before evaluation": best[0], "gamma": best[1]}
    for word, (at, gamma) in (("without", (0, 0.0)), ("with", best)):
        ends = (noisy(c, fresh, at, gamma, key + 2).T @ tried[at, gamma][1]).reshape(fresh.ends.shape)
        out |= {word: _rmse(ends, fresh.ends), f"law {word}": _law(ends, fresh.ends)}
    return out


@torch.no_grad()
def noisy(c: Coefficients, pairs: Pairs, at: int, gamma: float, seed: int) -> Tensor:
    """(columns, numbers) what the last row combines: the start, the evaluations, and the noise where there is any."""
    generator, denoiser = torch.Generator().manual_seed(seed), pairs.model.at(torch.arange(len(pairs.x))).denoiser
    columns, added = [pairs.x.double()], torch.randn(pairs.x.shape, generator=generator, dtype=F64)
    for i in range(c.rows):
        z = sum(w * v for w, v in zip(c.weights[i].tolist(), columns))
        level = float(c.levels[i].exp())
        if i == at and gamma > 0:
            z, level = z + gamma * level * added, level * (1 + gamma**2) ** 0.5
        columns.append(denoiser(z.to(pairs.x), torch.tensor(level).to(pairs.x)).double())
    return torch.stack(columns + ([added] if gamma > 0 else [])).flatten(1)


def by_class(budget: Budget, name: str, seed: int) -> Row:
    """One table for all classes and a table for each, from the same start states."""
    model, key = classes(name), 1000 * seed
    noise, labels = model.noise(budget.states, key), model.labels(budget.states, key)
    fresh = paired(model, budget.fresh, key + 500, 300)
    assert labels is not None
    assert fresh.model.labels is not None
    options: Row = {"starts": budget.starts, "iterations": budget.iterations, "seed": key}
    began = time.process_time()
    made, report = fs.fit_table(model.problem, nfe=budget.nfe, noise=noise, labels=labels, **options)
    spent = [time.process_time() - began]
    out: Row = {"without": _rmse(fresh.finals(Coefficients.of(made)), fresh.ends), "fallback": report.fallback}
    began, ends = time.process_time(), torch.zeros_like(fresh.ends)
    for k in range(model.classes):
        mine, theirs = labels == k, fresh.model.labels == k
        own, _ = fs.fit_table(model.problem, nfe=budget.nfe, noise=noise[mine], labels=labels[mine], **options)
        ends[theirs] = fresh.finals(Coefficients.of(own))[theirs]
    spent.append(time.process_time() - began)
    return out | {"with": _rmse(ends, fresh.ends), "classes": model.classes, "seconds": [round(s, 1) for s in spent]}


def _rmse(a: Tensor, b: Tensor) -> float:
    """Euclidean, of images per pixel."""
    square = (a - b).double().square().flatten(1)
    return float((square.mean(1) if square.shape[1] > 8 else square.sum(1)).mean().sqrt())


def _law(a: Tensor, b: Tensor) -> float:
    """Of one half of the samples next to the other half of the fine ones."""
    half = len(a) // 2
    return sliced_w2(a[:half].to(b), b[half:], projections=128)


def tables(records: dict[str, Record]) -> dict[str, str]:
    """Each addition on each problem: the factors by which it changes the error."""
    data, lines = records[NAME].data, []
    words = {"noise": "noise before an evaluation", "classes": "a table for each class"}
    for kind, name in dict.fromkeys((r["kind"], r["problem"]) for r in data["rows"]):
        mine = [r for r in data["rows"] if (r["kind"], r["problem"]) == (kind, name)]
        lines.append([words[kind], name, _span(mine, "without"), _span(mine, "with"),
                      _factors(mine, "with", "without"), _factors(mine, "law with", "law without")])  # fmt: skip
    head = ["addition", "problem", "RMSE without it", "with it", "factor, by seed", "factor of sliced W2"]
    return {NAME: table(head, lines)}


def _span(rows: list[Row], key: str) -> str:
    found = [r[key] for r in rows]
    return f"{min(found):.2g} to {max(found):.2g}"


def _factors(rows: list[Row], over: str, under: str) -> Any:
    return ", ".join(f"{r[over] / r[under]:.2f}" for r in rows) if over in rows[0] else None


EXPERIMENT = Experiment(NAME, __doc__, 6, BUDGETS, measure, tables, needs="scikit-learn")

if __name__ == "__main__":
    EXPERIMENT.main()
