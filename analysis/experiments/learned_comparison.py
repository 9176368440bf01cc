"""Learned samplers of papers against fitted tables: the same start states, evaluations and seconds.

The deterministic ones are judged by the fine ODE on fresh start states, the stochastic ones by a fine Euler-Maruyama on
the same fresh paths, each also by a distance of laws.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
import fitted_tables
from base import F64, Experiment, Job, Record, Row, canvas, progress, single_threaded, table, ticks, write
from fewstep.distances import sliced_w2
from fewstep.grid import refined
from fewstep.learned.labelled_model import Model
from fewstep.learned.table.coefficients import Coefficients
from fewstep.learned.table.deterministic import deterministic
from fewstep.learned.table.objective import Pairs
from fewstep.learned.trajectories import make_trajectories
from fewstep.untrained import plan_of
from fewstep_analysis import teachers
from fewstep_analysis.distillation import Task, mnist
from learned_methods import SPACINGS, distance, fitted
from sigdeg_mnist import teacher

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
NETWORK, TEACHER = "SigSampler, K", "fine Euler-Maruyama"


@dataclass(frozen=True)
class Budget:
    """What a run computes.

    Attributes:
        problems, counts, seeds: the cells of deterministic samplers.
        more: further ones: (seed, evaluations, problem).
        plane, image: start states of a fit, of problems with two numbers and with more.
        fresh: those that a fit is judged on, a quarter of them for problems with more numbers.
        starts, iterations: of `fit_table`, whose CPU seconds are those that the other fits take, at most `seconds`.
        unet, slow, unet_seconds: start states, numbers of evaluations and seconds of MNIST, on the first seed.
        paths, judged: of stochastic samplers, to fit to and to judge on, a quarter and a 16th with more numbers.
        cells: of stochastic samplers: (seed, problem, evaluations).
        training: iterations of the trained network.
    """

    problems: tuple[str, ...]
    counts: tuple[int, ...]
    seeds: tuple[int, ...]
    more: tuple[tuple[int, int, str], ...]
    plane: int
    image: int
    fresh: int
    starts: int
    iterations: int
    seconds: float
    unet: int
    slow: tuple[int, ...]
    unet_seconds: float
    paths: int
    judged: int
    cells: tuple[tuple[int, str, int], ...]
    training: int


MORE = tuple((1, n, p) for n in (3, 5, 8) for p in ("smooth", "ring", "anisotropic"))
CELLS = (*((0, p, n) for n in (5, 3, 10) for p in ("mixture", "ring")), (0, "digits", 5),
         (1, "mixture", 5), (1, "ring", 5))  # fmt: skip
BUDGETS = {
    "smoke": Budget(
        ("smooth",), (4,), (0,), (), 64, 32, 64, 1, 3, 0.4, 16, (), 0.4, 64, 128, ((0, "mixture", 3),), 4
    ),
    "paper": Budget(
        ("ring", "smooth", "anisotropic", "kde", "digits"), (3, 4, 5, 6, 8, 10), (0,), MORE, 256, 128, 1024, 2, 15,
        10.0, 40, (5,), 60.0, 2048, 8192, CELLS, 600,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a fit of a problem takes.

    Attributes:
        states, fresh: start states to fit to, and to be judged on.
        fine, judge: steps of the fine solution of each.
        batch: samples per network call.
        starts, iterations, seconds: as in `Budget`.
    """

    states: int
    fresh: int
    fine: int
    judge: int
    batch: int
    starts: int
    iterations: int
    seconds: float

    @classmethod
    def of(cls, budget: Budget, model: Task) -> Size:
        if model.classes:
            return cls(budget.unet, budget.unet, 40, 80, 16, 1, 8, budget.unet_seconds)
        plane = math.prod(model.event) < 3
        states, fresh = (budget.plane, budget.fresh) if plane else (budget.image, budget.fresh // 4)
        return cls(states, fresh, 100, 300, 128, budget.starts, budget.iterations, budget.seconds)


def problem(name: str) -> Task:
    """A problem of this experiment."""
    if name == "mnist":
        return digits_by_class()
    return anisotropic() if name == "anisotropic" else fitted_tables.named(name)


def digits_by_class() -> Task:
    """The MNIST U-Net with one class per sample, at levels above 0.1 in bfloat16, which takes half the time."""
    net = teachers.mnist_network()
    return replace(mnist(), problem=lambda labels: teacher(labels, net))


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
    cells += [(budget.seeds[0], n, "mnist") for n in budget.slow] + list(budget.more)
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
    size = Size.of(budget, model)
    noise, labels = model.noise(size.states, key), model.labels(size.states, key)
    fresh, others = model.noise(size.fresh, key + 500), model.labels(size.fresh, key + 500)
    pairs, judges = (
        deterministic(Model.of(model.problem, y, x), x, nfe, None, None, steps, size.batch).pairs
        for x, y, steps in ((noise, labels, size.fine), (fresh, others, size.judge))
    )
    began = time.process_time()
    options: Row = {"starts": size.starts, "iterations": size.iterations, "seed": key}
    options |= {"teacher_steps": size.fine, "batch": size.batch} if model.classes else {}
    ours, report = fs.fit_table(model.problem, nfe=nfe, noise=noise, labels=labels, **options)
    spent = time.process_time() - began
    seconds = min(size.seconds, spent)
    rows = [_judged(judges, Coefficients.of(ours), OURS, spent, which=report.start, fallback=report.fallback)]
    bests = [(s.name, s.table) for s in deterministic(pairs.model, noise, nfe, None, None, 2, size.batch).pool]
    scores = {n: distance(pairs, c, pairs.kept) for n, c in bests}
    which = min((n for n in scores if math.isfinite(scores[n])), key=scores.__getitem__)
    rows.append(_judged(judges, dict(bests)[which], BEST, 0.0, which=which))
    for solver, instance in zip(FIXED, (fs.DDIM(), fs.IPNDM(3), fs.DPMSolver(2))):
        plans = [p for s in SPACINGS if (p := plan_of(instance, nfe, s, model.schedule)) is not None and p.nfe == nfe]
        if plans:
            plan = min(plans, key=lambda p: distance(pairs, Coefficients.of(p), pairs.kept))
            rows.append(_judged(judges, Coefficients.of(plan), solver, 0.0))
    began, few = time.process_time(), None if labels is None else labels[:64]
    grid = fs.fit_grid(model.problem, nfe, noise=noise[:64], labels=few, solver=fs.IPNDM(3), sweeps=0)
    plan = fs.IPNDM(3).plan(grid, model.schedule)
    rows.append(_judged(judges, Coefficients.of(plan), "GITS", time.process_time() - began))
    began = time.process_time()
    fits = [fs.distill_dode(model.problem, b, noise=noise, labels=labels, steps=nfe)
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
    return float(squares.std() / len(squares) ** 0.5 / (2 * squares.mean().sqrt()).clamp(min=1e-300))


def along(budget: Budget, seed: int, name: str, nfe: int) -> list[Row]:
    """Stochastic samplers on fresh paths."""
    model, schedule, key = problem(name), problem(name).schedule, 1000 * seed
    share = 1 if math.prod(model.event) < 3 else 4
    noise, made, rows = model.noise(budget.paths // share, key), dict[str, Any](), []
    for levy in LETTERS:
        began = time.process_time()
        options = {"starts": budget.starts, "iterations": budget.iterations, "seed": key}
        made[f"table, {levy}"], report = fs.fit_table(model.problem, nfe=nfe, noise=noise, levy=levy, **options)
        rows.append({"seconds": round(time.process_time() - began, 1), "fallback": report.fallback})
    sigmas = made["table, K"].sigmas
    began = time.process_time()
    data = make_trajectories(model.problem, sigmas, count=len(noise), event_shape=model.event,
                             substeps=round(300 / nfe), levy="K", seed=key + 1)  # fmt: skip
    # of images few paths are enough to overfit: the best weights on held-out paths
    best: Row = {"checkpoint_every": 25, "early_stopping_patience": 4} if share > 1 else {}
    training = fs.TrainingOptions(iterations=budget.training, batch_size=min(256, len(noise) // 4), **best)
    student, _ = fs.distill_sigdeg(model.problem, data=data, training=training, seed=key)
    student.network.to(model.dtype)
    made[NETWORK] = student
    rows.append({"seconds": round(time.process_time() - began, 1)})
    judge = Paths(model, sigmas, budget.judged // share**2, key + 500)
    for which, solver in STOCHASTIC.items():
        steps = nfe // solver.card.evaluations
        grids = [sigmas] if steps == nfe else []
        grids += [fs.sigma_grid(schedule, steps, s, "sigma_min") for s in SPACINGS[:2]] if steps else []
        ends = [judge.ends(solver, sigmas=g) for g in grids]
        if ends:  # on its best grid, in its favour
            made[which] = min(ends, key=lambda e: float((e - judge.fine).square().mean()))
            rows.append({"seconds": 0.0})
    made[TEACHER] = judge.fine
    rows.append({"seconds": 0.0})
    out = []
    for (which, solver), row in zip(made.items(), rows):
        ends = solver if torch.is_tensor(solver) else judge.ends(solver)
        cell = {"problem": name, "evaluations": nfe, "seed": seed, "method": which}
        out.append(cell | judge.row(ends) | row)
    return out


class Paths:
    """Fresh paths, with the ends of a fine Euler-Maruyama on them."""

    def __init__(self, model: Task, sigmas: Tensor, count: int, seed: int, substeps: int = 60) -> None:
        self.model, self.noise = model, model.noise(count, seed)
        fine = refined(sigmas, substeps)
        taus = fine**-2.0
        self.path = fs.BrownianPath(
            (count, *model.event), t0=float(taus[0]), t1=float(taus[-1]), levy="K", seed=seed, clock="log",
            knots=taus, dtype=model.dtype,
        )  # fmt: skip
        self.fine = self.ends(fs.EulerMaruyama(), sigmas=fine)
        self.unit = 1.0 if math.prod(model.event) < 3 else float(self.fine.double().var(0).mean().sqrt())

    @torch.no_grad()
    def ends(self, solver: Any, **grid: Any) -> Tensor:
        return fs.sample(self.model.at(None), solver, noise=self.noise, path=self.path, **grid)

    def row(self, ends: Tensor) -> Row:
        """Distances, of images in standard deviations; the law of one half of the paths next to that of the other."""
        square = (ends - self.fine).double().square().flatten(1) / self.unit**2
        each = (square.sum(1) if square.shape[1] < 3 else square.mean(1)).sqrt()
        half = len(ends) // 2
        law = sliced_w2(ends[:half], self.fine[half:], projections=128)
        ratio = ends.double().var(0).sum() / self.fine.double().var(0).sum()
        return {"rmse": float(each.square().mean().sqrt()), "rmse_se": _error(each.square()),
                "median": float(each.median()), "law": law, "variance_ratio": float(ratio)}  # fmt: skip


def tables(records: dict[str, Record]) -> dict[str, str]:
    """RMSE and median of every method by problem and evaluations, the claims, and the stochastic samplers."""
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
                    lines.append([name, one, *(r and _both(r) for r in found), _seconds(found)])
        seeds = {c: len({r["seed"] for r in rows if (r["problem"], r["evaluations"]) == c}) for c in cells}
        note = f"{_first(cells, OURS)} {_spread(seeds)}"
        out[NAME] = table(["problem", "method", *map(str, counts), "CPU s"], lines) + f"\n\n{note}"
        held = []
        for one, other in CLAIMS:
            both = [c for c in cells.values() if one in c and other in c]
            wins = sum(c[one]["rmse"] < c[other]["rmse"] for c in both)
            held += [[one, other, f"{wins} of {len(both)}"]] if both else []
        out["learned-claims"] = table(["method", "nearer than", "in cells"], held)
    if PATHS in records:
        rows = records[PATHS].data["rows"]
        cells, lines = _cells([r for r in rows if r["method"] != TEACHER]), []
        for cell in sorted(cells):
            mine = [r for r in rows if (r["problem"], r["evaluations"]) == cell]
            pooled = {
                m: _pooled([r for r in mine if r["method"] == m]) for m in dict.fromkeys(r["method"] for r in mine)
            }
            for one in sorted(pooled, key=lambda m: -pooled[m]["rmse"]):
                own, p = [r for r in mine if r["method"] == one], pooled[one]
                guarded = sum(bool(r.get("fallback")) for r in own)
                word = one + (f" (guard: untrained, {guarded} of {len(own)})" if guarded else "")
                ratio = statistics.median(r["variance_ratio"] for r in own)
                far = [f"{p['rmse']:.3g}", f"{p['median']:.2g}"] if p["rmse"] else [None, None]
                spent = f"{p['seconds']:.0f}" if p["seconds"] else None
                lines.append([*cell, word, *far, f"{p['law']:.2g}", f"{ratio:.2f}", spent, len(own)])
        head = ["problem", "evaluations", "sampler", "RMSE", "median", "sliced W2", "variance ratio", "CPU s", "seeds"]
        out[PATHS] = f"{table(head, lines)}\n\n{_first(cells, 'table, K')}"
    return out


def _both(row: Row) -> str:
    return f"{row['rmse']:.2g} / {row['median']:.2g}"


def _spread(seeds: dict[tuple[str, int], int]) -> str:
    """How many seeds each problem has."""
    by = {p: sorted({k for (q, _), k in seeds.items() if q == p}) for p, _ in seeds}
    words = [f"{p} {k[0]}" + (f" to {k[-1]}" if len(k) > 1 else "") for p, k in by.items()]
    return f"Seeds: {', '.join(words)}."


def _first(cells: dict[tuple[str, int], dict[str, Row]], ours: str) -> str:
    """In how many cells ours is first, and which are the others."""
    others = {c: min(by, key=lambda m: by[m]["rmse"]) for c, by in cells.items()}
    others = {c: m for c, m in others.items() if m != ours}
    near = [c for c in others if _is_first(cells[c], ours)]
    text = f"`{ours}` has the smallest RMSE in {len(cells) - len(others)} of {len(cells)} cells"
    median = sum(min(by, key=lambda m: by[m]["median"]) == ours for by in cells.values())
    text += f" and the smallest median error in {median}."
    if near:
        text += f" Within two standard errors of a smaller one: {_listed(near, others)}."
    if far := [c for c in others if c not in near]:
        text += f" Behind: {_listed(far, others)}."
    return text


def _listed(found: list[tuple[str, int]], others: dict[tuple[str, int], str]) -> str:
    return ", ".join(f"{p} at {n} ({others[p, n]})" for p, n in sorted(found))


def _cells(rows: list[Row]) -> dict[tuple[str, int], dict[str, Row]]:
    """Rows by (problem, evaluations) and method; RMSE over the samples of all seeds, medians of the rest."""
    found: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault((row["problem"], row["evaluations"]), {}).setdefault(row["method"], []).append(row)
    return {cell: {m: _pooled(r) for m, r in by.items()} for cell, by in found.items()}


def _pooled(rows: list[Row]) -> Row:
    """One row for several seeds."""
    rmse = math.sqrt(statistics.mean(r["rmse"] ** 2 for r in rows))
    error = math.hypot(*(r["rmse"] * r["rmse_se"] for r in rows)) / len(rows) / max(rmse, 1e-300)
    return {"rmse": rmse, "rmse_se": error} | {
        k: statistics.median(r[k] for r in rows) for k in ("median", "law", "seconds")
    }


def _seconds(found: list[Row | None]) -> str | None:
    spent = [r["seconds"] for r in found if r]
    return f"{min(spent):.0f} to {max(spent):.0f}" if max(spent) else None


def _is_first(cell: dict[str, Row], ours: str) -> bool:
    """Whether no method is nearer than ours by more than two standard errors of both."""
    own = cell[ours]
    return all(own["rmse"] - r["rmse"] < 2 * math.hypot(own["rmse_se"], r["rmse_se"]) for r in cell.values())


def draw(records: dict[str, Record], folder: Path) -> None:
    """RMSE against evaluations, one panel per problem."""
    if NAME in records and records[NAME].data["rows"]:
        shown = (BEST, "D-ODE", "GITS", *ADAM, OURS)
        draw_cells(_cells(records[NAME].data["rows"]), shown, "RMSE to the exact ODE", folder / f"{NAME}.svg")
    if PATHS in records and records[PATHS].data["rows"]:
        shown = (*STOCHASTIC, NETWORK, *(f"table, {w}" for w in LETTERS))
        draw_cells(_cells(records[PATHS].data["rows"]), shown, "RMSE along the same path", folder / f"{PATHS}.svg")


def draw_cells(cells: dict[tuple[str, int], dict[str, Row]], shown: Sequence[str], words: str, file: Path) -> None:
    """A panel for each problem, a line for each sampler."""
    every = [p for p, _ in cells]
    names = [p for p in dict.fromkeys(every) if every.count(p) > 1] or every[:1]  # a line has two points
    counts = sorted({n for p, n in cells if p in names})
    figure, panels = canvas(max(6.4, 2.7 * len(names)), 4.2, ncols=len(names), squeeze=False)
    shades = ["0.5", "#56B4E9", "#999933", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#7A4FA3", "#882255"]
    for axes, name in zip(panels[0], names):
        for one, shade in zip(shown, [*shades[: len(shown) - 1], "#D55E00"]):
            points = [(n, cells[name, n][one]["rmse"]) for n in counts if one in cells.get((name, n), {})]
            width, style = 2.2 if one == shown[-1] else 1.0, ":" if one == BEST else "-"
            axes.loglog(*(zip(*points) if points else ((), ())), style, color=shade, marker="o", ms=3, lw=width,
                        label=one)  # fmt: skip
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("network evaluations")
        axes.set_xlim(counts[0] * 0.9, counts[-1] * 1.1)
        ticks(axes, counts)
    panels[0][0].set_ylabel(words)
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, ncols=5, loc="outside lower center")
    write(figure, file)


EXPERIMENT = Experiment(
    NAME, __doc__ or "", 100, BUDGETS, measure, tables, draw, records=(NAME, PATHS),
    figures=(f"{NAME}.svg", f"{PATHS}.svg"), needs="scikit-learn, and diffusers for MNIST",
)  # fmt: skip

if __name__ == "__main__":
    EXPERIMENT.main()
