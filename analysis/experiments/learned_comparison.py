"""Learned samplers of papers against fitted tables: the same start states, evaluations and seconds.

The deterministic ones are judged by the fine ODE on fresh start states, the stochastic ones by a fine Euler-Maruyama on
the same fresh paths, each also by a distance of laws.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
import fitted_tables
from base import F64, Experiment, Job, Record, Row, canvas, progress, single_threaded, table, ticks, write
from fewstep.distances import sliced_w2
from fewstep.learned.labelled_model import Model
from fewstep.learned.table.coefficients import Coefficients
from fewstep.learned.table.deterministic import deterministic
from fewstep.learned.table.objective import Pairs
from fewstep.learned.trajectories import make_trajectories
from fewstep.untrained import plan_of
from fewstep_analysis.distillation import Task
from learned_methods import SPACINGS, distance, fitted

NAME, PATHS = "learned-comparison", "learned-comparison-paths"
OURS, BEST = "fit_table", "best untrained"
ADAM = ("LD3", "S4S-Alt", "BNS", "GS", "AMED", "EPD")
FIXED = ("DDIM", "IPNDM(3)", "DPMSolver(2)")
METHODS = (BEST, *FIXED, "D-ODE", "GITS", *ADAM, OURS)
# a method, what its paper claims it is better than, on the same evaluations
CLAIMS = (
    ("D-ODE", "DDIM"), ("GITS", "IPNDM(3)"), ("LD3", "GITS"), ("S4S-Alt", "LD3"), ("BNS", "IPNDM(3)"), ("GS", "LD3"),
    ("GS", "BNS"), ("AMED", "DPMSolver(2)"), ("EPD", "AMED"),
)  # fmt: skip
STOCHASTIC = {
    "EulerMaruyama": fs.EulerMaruyama(), "SEA": fs.SEA(), "ShARK": fs.ShARK(), "DPMSolverSDE(2)": fs.DPMSolverSDE(2),
    "SASolver": fs.SASolver(),
}  # fmt: skip
LETTERS = ("W", "H", "K")


@dataclass(frozen=True)
class Budget:
    """What a run computes.

    Attributes:
        problems, counts, seeds: the cells of deterministic samplers.
        plane, image: start states of a fit, of problems with two numbers and with more.
        fresh: those that a fit is judged on, a quarter of them for problems with more numbers.
        starts, iterations: of `fit_table`, whose CPU seconds are those that the other fits take, at most `seconds`.
        paths, cells: of stochastic samplers: (problem, evaluations).
        training: iterations of the trained network.
    """

    problems: tuple[str, ...]
    counts: tuple[int, ...]
    seeds: tuple[int, ...]
    plane: int
    image: int
    fresh: int
    starts: int
    iterations: int
    seconds: float
    paths: int
    cells: tuple[tuple[str, int], ...]
    training: int


BUDGETS = {
    "smoke": Budget(("smooth",), (4,), (0,), 64, 32, 64, 1, 3, 0.4, 64, (("mixture", 3),), 4),
    "paper": Budget(
        ("ring", "smooth", "anisotropic", "kde", "digits"), (4, 6, 8, 3, 5, 10), (0,), 256, 128, 1024, 2, 15, 10.0,
        2048, (("mixture", 5), ("ring", 5)), 600,
    ),
}  # fmt: skip


def problem(name: str) -> Task:
    """A problem of this experiment."""
    return anisotropic() if name == "anisotropic" else fitted_tables.named(name)


def anisotropic() -> Task:
    """Four Gaussians in 64 dimensions whose standard deviations fall from 1 to 0.1 along other axes each."""
    generator, schedule = torch.Generator().manual_seed(0), fs.EDM(0.02, 40.0)
    means = torch.randn(4, 64, generator=generator, dtype=F64)
    order = [torch.randperm(64, generator=generator) for _ in means]
    variances = torch.stack([torch.logspace(0, -2, 64, dtype=F64)[o] for o in order])

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        total, gap = variances.to(x) + sigma.to(x) ** 2, x[:, None] - means.to(x)
        share = (-0.5 * (gap.square() / total + total.log()).sum(2)).softmax(1)[..., None]
        return (share * (means.to(x) + variances.to(x) / total * gap)).sum(1)

    return Task("anisotropic", fs.DiffusionModel(denoiser, schedule), schedule, (64,))


def measure(budget: Budget, job: Job) -> Iterator[tuple[str, Record]]:
    """Each cell once per seed; finished ones are kept in the work folder."""
    single_threaded()
    cells = [(seed, n, p) for seed in budget.seeds for n in budget.counts for p in budget.problems]
    rows = [r for c in progress(cells, "cell") for r in _kept(job, "ode", c, lambda c=c: compared(budget, *c))]
    common: Row = {"threads": torch.get_num_threads(), "budget": {k: str(v) for k, v in vars(budget).items()}}
    yield NAME, Record(NAME, {"rows": rows} | common, job.seed)
    rows = [r for c in progress(budget.cells, "paths") for r in _kept(job, "sde", c, lambda c=c: along(budget, *c))]
    yield PATHS, Record(PATHS, {"rows": rows} | common, job.seed)


def _kept(job: Job, kind: str, cell: tuple[Any, ...], of: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a cell, from the work folder where they were made before."""
    file = job.work / f"{kind}-{'-'.join(map(str, cell))}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(of()))
    found: list[Row] = json.loads(file.read_text())
    return found


def compared(budget: Budget, seed: int, nfe: int, name: str) -> list[Row]:
    """Every method on one problem, at one number of evaluations."""
    model, key = problem(name), 1000 * seed
    plane = math.prod(model.event) < 3
    noise = model.noise(budget.plane if plane else budget.image, key)
    fresh = model.noise(budget.fresh if plane else budget.fresh // 4, key + 500)
    pairs, judges = (
        deterministic(Model.of(model.problem, None, x), x, nfe, None, None, steps, 128).pairs
        for x, steps in ((noise, 100), (fresh, 300))
    )
    began = time.process_time()
    options = {"starts": budget.starts, "iterations": budget.iterations, "seed": key}
    ours, report = fs.fit_table(model.problem, nfe=nfe, noise=noise, **options)
    spent = time.process_time() - began
    seconds = min(budget.seconds, spent)
    rows = [_judged(judges, Coefficients.of(ours), OURS, spent, which=report.start, fallback=report.fallback)]
    bests = [(s.name, s.table) for s in deterministic(pairs.model, noise, nfe, None, None, 2, 128).pool]
    scores = {n: distance(pairs, c, pairs.kept) for n, c in bests}
    which = min((n for n in scores if math.isfinite(scores[n])), key=scores.__getitem__)
    rows.append(_judged(judges, dict(bests)[which], BEST, 0.0, which=which))
    for solver, instance in zip(FIXED, (fs.DDIM(), fs.IPNDM(3), fs.DPMSolver(2))):
        plans = [p for s in SPACINGS if (p := plan_of(instance, nfe, s, model.schedule)) is not None and p.nfe == nfe]
        if plans:
            plan = min(plans, key=lambda p: distance(pairs, Coefficients.of(p), pairs.kept))
            rows.append(_judged(judges, Coefficients.of(plan), solver, 0.0))
    began = time.process_time()
    grid = fs.fit_grid(model.problem, nfe, noise=noise[:64], solver=fs.IPNDM(3), sweeps=0)
    plan = fs.IPNDM(3).plan(grid, model.schedule)
    rows.append(_judged(judges, Coefficients.of(plan), "GITS", time.process_time() - began))
    began = time.process_time()
    fits = [fs.distill_dode(model.problem, b, noise=noise, steps=nfe)
            for b in (fs.DDIM(), fs.IPNDM(3), fs.DPMSolverPP(2))]  # fmt: skip
    plan, _ = min(fits, key=lambda f: f[1].student_rmse)
    rows.append(_judged(judges, Coefficients.of(plan), "D-ODE", time.process_time() - began, which=plan.name))
    for one in ADAM:
        began = time.process_time()
        c, iterations = fitted(one, pairs, nfe, seconds, key)
        if c is not None:
            rows.append(_judged(judges, c, one, time.process_time() - began, iterations=iterations))
    return [{"problem": name, "evaluations": nfe, "seed": seed} | row for row in rows]


def _judged(pairs: Pairs, c: Coefficients, method: str, seconds: float, **more: Any) -> Row:
    """Distances on fresh start states: Euclidean, of images per pixel; and of laws."""
    ends = pairs.finals(c)
    square = (ends - pairs.ends).double().square().flatten(1)
    each = (square.sum(1) if square.shape[1] < 3 else square.mean(1)).sqrt()
    half = len(ends) // 2
    return {
        "method": method, "rmse": float(each.square().mean().sqrt()), "median": float(each.median()),
        "rmse_se": _error(each.square()), "law": sliced_w2(ends[:half], pairs.ends[half:], projections=128),
        "seconds": round(seconds, 1), "network": c.rows, **more,
    }  # fmt: skip


def _error(squares: Tensor) -> float:
    """Standard error of the root of the mean."""
    return float(squares.std() / len(squares) ** 0.5 / (2 * squares.mean().sqrt()))


def along(budget: Budget, name: str, nfe: int) -> list[Row]:
    """Stochastic samplers on fresh paths."""
    model, schedule = problem(name), problem(name).schedule
    noise, made, rows = model.noise(budget.paths, 0), dict[str, Any](), []
    for levy in LETTERS:
        began = time.process_time()
        made[f"table, {levy}"], report = fs.fit_table(
            model.problem, nfe=nfe, noise=noise, levy=levy, starts=budget.starts, iterations=budget.iterations
        )
        rows.append({"seconds": round(time.process_time() - began, 1), "fallback": report.fallback})
    sigmas = made["table, K"].sigmas
    began = time.process_time()
    data = make_trajectories(model.problem, sigmas, count=budget.paths, event_shape=model.event,
                             substeps=round(300 / nfe), levy="K", seed=1)  # fmt: skip
    training = fs.TrainingOptions(iterations=budget.training, batch_size=min(256, budget.paths // 4))
    student, _ = fs.distill_sigdeg(model.problem, data=data, training=training)
    student.network.to(model.dtype)
    made["SigSampler, K"] = student
    rows.append({"seconds": round(time.process_time() - began, 1)})
    judge = Paths(model, sigmas, budget.fresh)
    for which, solver in STOCHASTIC.items():
        steps = nfe // solver.card.evaluations
        grids = [sigmas] if steps == nfe else []
        grids += [fs.sigma_grid(schedule, steps, s, "sigma_min") for s in SPACINGS[:2]] if steps else []
        ends = [judge.ends(solver, sigmas=g) for g in grids]
        if ends:  # on its best grid, in its favour
            made[which] = min(ends, key=lambda e: float((e - judge.fine).square().mean()))
            rows.append({"seconds": 0.0})
    out = []
    for (which, solver), row in zip(made.items(), rows):
        ends = solver if torch.is_tensor(solver) else judge.ends(solver)
        out.append({"problem": name, "evaluations": nfe, "method": which} | judge.row(ends) | row)
    return out


class Paths:
    """Fresh paths, with the ends of a fine Euler-Maruyama on them."""

    def __init__(self, model: Task, sigmas: Tensor, count: int, substeps: int = 60) -> None:
        self.model, self.noise = model, model.noise(count, 500)
        span = {"t0": float(sigmas[0]) ** -2, "t1": float(sigmas[-1]) ** -2}
        self.path = fs.BrownianPath((count, *model.event), **span, levy="K", seed=500, clock="log", dtype=model.dtype)
        shares = torch.arange(substeps, dtype=F64) / substeps
        inner = [a * (b / a) ** shares for a, b in zip(sigmas, sigmas[1:])]
        self.fine = self.ends(fs.EulerMaruyama(), sigmas=torch.cat([*inner, sigmas[-1:]]))

    @torch.no_grad()
    def ends(self, solver: Any, **grid: Any) -> Tensor:
        return fs.sample(self.model.at(None), solver, noise=self.noise, path=self.path, **grid)

    def row(self, ends: Tensor) -> Row:
        square = (ends - self.fine).double().square().flatten(1)
        each = (square.sum(1) if square.shape[1] < 3 else square.mean(1)).sqrt()
        half = len(ends) // 2
        law = sliced_w2(ends[:half], self.fine[half:], projections=128)
        ratio = ends.double().var(0).sum() / self.fine.double().var(0).sum()
        return {"rmse": float(each.square().mean().sqrt()), "rmse_se": _error(each.square()),
                "median": float(each.median()), "law": law, "variance_ratio": float(ratio)}  # fmt: skip


def tables(records: dict[str, Record]) -> dict[str, str]:
    """RMSE of every method by problem and evaluations, the claims, and the stochastic samplers."""
    out = {}
    if NAME in records:
        rows = records[NAME].data["rows"]
        cells = _cells(rows)
        counts = sorted({n for _, n in cells})
        lines = []
        for name in dict.fromkeys(p for p, _ in cells):
            for one in METHODS:
                found = [cells.get((name, n), {}).get(one) for n in counts]
                if any(found):
                    lines.append([name, one, *(r and f"{r['rmse']:.2g}" for r in found), _seconds(found)])
        first = sum(_is_first(cell) for cell in cells.values())
        note = f"`fit_table` is first, or within two standard errors of the first, in {first} of {len(cells)} cells."
        out[NAME] = table(["problem", "method", *map(str, counts), "CPU s"], lines) + f"\n\n{note}"
        held = []
        for one, other in CLAIMS:
            both = [c for c in cells.values() if one in c and other in c]
            wins = sum(c[one]["rmse"] < c[other]["rmse"] for c in both)
            held += [[one, other, f"{wins} of {len(both)}"]] if both else []
        out["learned-claims"] = table(["method", "nearer than", "in cells"], held)
    if PATHS in records:
        lines = [
            [r["problem"], r["evaluations"], r["method"] + (" (guard: untrained)" if r.get("fallback") else ""),
             f"{r['rmse']:.3g}", f"{r['median']:.2g}",
             f"{r['law']:.2g}", f"{r['variance_ratio']:.2f}", f"{r['seconds']:.0f}" if r["seconds"] else None]
            for r in sorted(records[PATHS].data["rows"], key=lambda r: (r["problem"], r["evaluations"], -r["rmse"]))
        ]  # fmt: skip
        head = ["problem", "evaluations", "sampler", "RMSE", "median", "sliced W2", "variance ratio", "CPU s"]
        out[PATHS] = table(head, lines)
    return out


def _cells(rows: list[Row]) -> dict[tuple[str, int], dict[str, Row]]:
    """Rows by (problem, evaluations) and method; the median over seeds."""
    found: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda r: r["rmse"]):
        found.setdefault((row["problem"], row["evaluations"]), {}).setdefault(row["method"], []).append(row)
    return {cell: {m: r[len(r) // 2] for m, r in by.items()} for cell, by in found.items()}


def _seconds(found: list[Row | None]) -> str | None:
    spent = [r["seconds"] for r in found if r]
    return f"{min(spent):.0f} to {max(spent):.0f}" if max(spent) else None


def _is_first(cell: dict[str, Row]) -> bool:
    """Whether no method is nearer than ours by more than two standard errors of both."""
    ours = cell[OURS]
    return all(ours["rmse"] - r["rmse"] < 2 * math.hypot(ours["rmse_se"], r["rmse_se"]) for r in cell.values())


def draw(records: dict[str, Record], folder: Path) -> None:
    """RMSE against evaluations, one panel per problem."""
    if NAME not in records or not records[NAME].data["rows"]:
        return
    cells = _cells(records[NAME].data["rows"])
    names, counts = list(dict.fromkeys(p for p, _ in cells)), sorted({n for _, n in cells})
    figure, panels = canvas(3.2 * len(names), 4.2, ncols=len(names), squeeze=False)
    shown = (BEST, "D-ODE", "GITS", *ADAM, OURS)
    shades = ["0.5", "#56B4E9", "#999933", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#7A4FA3", "#882255", "#D55E00"]
    for axes, name in zip(panels[0], names):
        for one, shade in zip(shown, shades):
            points = [(n, cells[name, n][one]["rmse"]) for n in counts if one in cells.get((name, n), {})]
            width = 2.2 if one == OURS else 1.0
            axes.loglog(*zip(*points), ":" if one == BEST else "-", color=shade, marker="o", ms=3, lw=width, label=one)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("network evaluations")
        ticks(axes, counts)
    panels[0][0].set_ylabel("RMSE to the exact ODE")
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, ncols=5, loc="outside lower center")
    write(figure, folder / f"{NAME}.svg")


EXPERIMENT = Experiment(
    NAME, __doc__ or "", 60, BUDGETS, measure, tables, draw, records=(NAME, PATHS), figures=(f"{NAME}.svg",),
    needs="scikit-learn",
)  # fmt: skip

if __name__ == "__main__":
    EXPERIMENT.main()
