"""Sig-DEG on two Gaussians on the line: 5 steps against a teacher of 300, both compared with the exact law.

After the first experiment of arXiv 2508.16939, whose mixture, grid and network are not available to us.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fewstep as fs
from base import F64, Experiment, Job, Record, Row, canvas, progress, table, ticks, write
from fewstep.distances import mmd
from fewstep.grid import refined
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep.learned.training import seeded
from fewstep.learned.trajectories import Trajectories, make_trajectories
from fewstep_analysis.diffusion_problems import Mixture
from sigdeg_features import LEVEL, compare_features, features_table
from train_teachers import fit_denoiser

NAME = "sigdeg-mixture"
MIXTURE = Mixture(
    torch.tensor([[-1.2], [1.0]], dtype=F64), torch.tensor([0.25, 0.35], dtype=F64),
    torch.tensor([0.4, 0.6], dtype=F64),
)  # fmt: skip
SCHEDULE = fs.EDM(sigma_min=0.05, sigma_max=10.0)
STEPS, FINE = 5, 300
CHUNK = 8192  # samples at a time: what stays in a cache
LIMIT_W1, LIMIT_SIGNATURE = 1.5, 1.8  # expected: W1 over the teacher's at most, error of W over that of H
RANGE = (-2.4, 2.4)  # of the histograms
TEACHER, PARENT, SHARK, EXACT = "teacher", "Euler-Maruyama", "ShARK", "exact samples"
SHADES = {
    TEACHER: "0.35", PARENT: "#56B4E9", SHARK: "#009E73", "W": "#E69F00", "H": "#D55E00", "K": "#7A4FA3",
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """What a run computes.

    Attributes:
        data, iterations: of the teacher's network.
        trajectories, batch, distillation: of the students' training.
        samples, blocks: each sampler is measured on so many blocks of so many samples.
        paths: on which errors along the same noise are taken.
        seeds: trainings of a student.
        rounds: of timing.
    """

    data: int
    iterations: int
    trajectories: int
    batch: int
    distillation: int
    samples: int
    blocks: int
    paths: int
    seeds: int
    rounds: int


BUDGETS = {
    "smoke": Budget(
        data=4096, iterations=60, trajectories=256, batch=64, distillation=10, samples=512, blocks=2,
        paths=128, seeds=1, rounds=1,
    ),
    "paper": Budget(
        data=1 << 18, iterations=4000, trajectories=16_384, batch=512, distillation=2500, samples=1 << 17,
        blocks=4, paths=8192, seeds=2, rounds=5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sampler:
    """What is measured: a model with a plan or a student."""

    name: str
    denoiser: str
    problem: fs.DiffusionModel
    solver: Any
    student: Row  # settings and training of a student

    @property
    def plan(self) -> fs.Plan:
        plan: fs.Plan = getattr(self.solver, "plan", self.solver)
        return plan


def levels(steps: int, schedule: fs.EDM = SCHEDULE, shift: float = 0.5) -> Tensor:
    """(steps + 1,) noise levels even in (tau + shift)^(-1/5), tau = 1/sigma^2.

    Within one Gaussian of variance 1/c the end is linear in the integral of dB/(tau + c), of which a step's
    W and H leave open what a line does not fit; this spacing gives each step an equal part of that. The
    shift is c of the mixture taken for one Gaussian, 0.8, made smaller: there the modes are chosen.
    """
    first, last = ((s**-2.0 + shift) ** -0.2 for s in (schedule.sigma_max, schedule.sigma_min))
    u = first + (last - first) * torch.linspace(0, 1, steps + 1, dtype=F64)
    out: Tensor = (u**-5 - shift).rsqrt()
    out[0], out[-1] = schedule.sigma_max, schedule.sigma_min
    return out


def trained(data: int, iterations: int, seed: int = 0) -> fs.DiffusionModel:
    """A denoiser fitted to samples of the mixture."""
    x = MIXTURE.sample(data, seed).float()
    build: Any = lambda: DenoisingMLP((1,), 64, 2, data_std=float(x.std()))  # noqa: E731
    network = fit_denoiser(seeded(seed, build), x, SCHEDULE, iterations, seed, batch=512)
    return fs.DiffusionModel(network.requires_grad_(False), SCHEDULE)


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Train, sample, measure."""
    start, seed, rows, found = time.process_time(), job.seed, list[Row](), list[Sampler]()
    ends = Ends(budget.paths, seed + 5)
    for sampler in progress(samplers(budget, seed), "sampler"):
        blocks = [draw_samples(sampler, budget.samples, seed + 1 + k) for k in range(budget.blocks)]
        rows.append({
            "name": sampler.name, "denoiser": sampler.denoiser, "evaluations": sampler.plan.nfe,
            "rmse": ends.rmse(sampler), **distances(blocks, seed), "student": sampler.student,
        })  # fmt: skip
        found.append(sampler)
    for row, seconds in zip(rows, median_seconds(found, budget, seed)):
        row["seconds"] = seconds
    reals = [MIXTURE.sample(budget.samples, seed + 300 + k).flatten() for k in range(2 * budget.blocks)]
    one, other = (torch.cat(r).sort().values for r in (reals[: budget.blocks], reals[budget.blocks :]))
    main = next(s for s in found if s.name == "H" and s.denoiser == "trained")
    features = compare_features(main.problem, main.solver, budget.samples, seed)
    data = {
        "levels": levels(STEPS).tolist(), "rows": rows, "samples": budget.samples * budget.blocks,
        "floor": distances(reals[: budget.blocks], seed),
        "floor_two_samples": float((one - other).abs().mean()),
        "features": {"level": LEVEL, "rows": features}, "seconds": "CPU seconds, 8,192 samples",
        "cpu_seconds": round(time.process_time() - start),
    }  # fmt: skip
    return {NAME: Record(NAME, data, seed)}


def samplers(budget: Budget, seed: int) -> Iterator[Sampler]:
    """For a trained and the exact denoiser: the teacher, untrained samplers, and students."""
    coarse, even = levels(STEPS), fs.sigma_grid(SCHEDULE, STEPS, final="sigma_min")
    euler, shark = fs.EulerMaruyama(), fs.ShARK()
    models = {"trained": trained(budget.data, budget.iterations, seed)}
    models["exact"] = fs.DiffusionModel(MIXTURE.denoiser, SCHEDULE)
    seeds = {"trained": {"W": 1, "H": budget.seeds, "K": budget.seeds}, "exact": {"K": 1}}
    for denoiser, problem in models.items():
        for name, solver, grid in (
            (TEACHER, euler, refined(coarse, FINE // STEPS)), (PARENT, euler, coarse), (SHARK, shark, coarse),
            (f"{PARENT}, even", euler, even), (f"{SHARK}, even", shark, even),
        ):  # fmt: skip
            yield Sampler(name, denoiser, problem, solver.plan(grid), {})
        data = make_trajectories(
            problem, coarse, count=budget.trajectories, event_shape=(1,), substeps=FINE // STEPS, levy="K",
            seed=seed,
        )  # fmt: skip
        for levy, count in seeds[denoiser].items():
            for k in range(count):
                student, facts = distil(problem, data, levy, budget, seed + k)
                yield Sampler(levy, denoiser, problem, student, facts)


def distil(problem: fs.DiffusionModel, data: Trajectories, levy: str, budget: Budget, seed: int) -> tuple[Any, Row]:
    """One student, and what the record states of its training."""
    training = fs.TrainingOptions(budget.distillation, budget.batch, learning_rate=2e-3)
    student, report = fs.distill_sigdeg(problem, data=data, levy=levy, training=training, seed=seed)
    return student, {
        "levy": levy,
        "seed": seed,
        "seconds": report.seconds["training"],
        "losses": report.losses,
    }


def draw_samples(sampler: Sampler, count: int, seed: int) -> Tensor:
    """(count,) float64 samples on fresh noise, as in use."""
    parts = list[Tensor]()
    for i, start in enumerate(range(0, count, CHUNK)):
        shape, own = (min(CHUNK, count - start), 1), 10_000 * seed + i
        source = fs.FreshIncrements(shape, levy=sampler.plan.levy, seed=own)
        with torch.no_grad():
            parts.append(fs.sample(sampler.problem, sampler.solver, shape=shape, seed=own, path=source))
    return torch.cat(parts).flatten().double()


class Ends:
    """Final states of samplers along one Brownian path, and their distance to those of their teacher."""

    def __init__(self, paths: int, seed: int) -> None:
        self.taus: Tensor = refined(levels(STEPS), FINE // STEPS) ** -2.0
        self.shape: tuple[int, int] = (paths, 1)
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.noise: Tensor = torch.randn(paths, 1, generator=generator) * SCHEDULE.sigma_max
        self.teachers: dict[str, Tensor] = {}

    def of(self, sampler: Sampler) -> Tensor:
        """(paths,) the final states."""
        # a new path for each sampler stores nothing; with these knots it is the same each time
        path = fs.BrownianPath(
            self.shape, t0=float(self.taus[0]), t1=float(self.taus[-1]), seed=self.seed, levy="K",
            clock="log", knots=self.taus,
        )  # fmt: skip
        with torch.no_grad():
            return fs.sample(sampler.problem, sampler.solver, noise=self.noise, path=path).flatten()

    def rmse(self, sampler: Sampler) -> float:
        """Root mean square distance to the final states of the same denoiser's teacher, which comes first."""
        ends = self.of(sampler)
        teacher = self.teachers.setdefault(sampler.denoiser, ends)
        return float((ends - teacher).double().square().mean().sqrt())


@lru_cache(maxsize=8)
def quantiles(n: int) -> Tensor:
    """(n,) quantiles of the exact law at the middles of n equal shares."""
    x = torch.linspace(-6, 6, 60_001, dtype=F64)
    below = torch.special.ndtr((x.unsqueeze(1) - MIXTURE.means[:, 0]) / MIXTURE.stds) @ MIXTURE.weights
    return torch.from_numpy(np.interp((np.arange(n) + 0.5) / n, below.numpy(), x.numpy()))


def distances(blocks: list[Tensor], seed: int) -> Row:
    """Distances of blocks of samples to the exact law: of all together, and W1 of each block."""
    together = torch.cat(blocks)
    gap = together.sort().values - quantiles(len(together))
    q = quantiles(len(blocks[0]))
    few = together[:: max(1, len(together) // 8192)][:8192]
    real = MIXTURE.sample(len(few), seed + 77).float()
    edges = torch.linspace(*RANGE, 97)
    return {
        "w1": float(gap.abs().mean()), "w2": float(gap.square().mean().sqrt()),
        "w1_blocks": [float((b.sort().values - q).abs().mean()) for b in blocks],
        "mmd": mmd(few.unsqueeze(1), real, bandwidth=1.0),
        "std": float(together.std()), "mean": float(together.mean()),
        "variance_ratio": float(together.var() / quantiles(1 << 16).var()),
        "histogram": torch.histogram(together.float(), edges, density=True).hist.tolist(),
    }  # fmt: skip


def median_seconds(found: list[Sampler], budget: Budget, seed: int) -> list[float]:
    """Median CPU seconds of each for a chunk of samples, one after another in every round."""
    times: list[list[float]] = [[] for _ in found]
    for k in range(budget.rounds + 1):
        for sampler, mine in zip(found, times):
            start = time.process_time()
            draw_samples(sampler, min(CHUNK, budget.samples), seed + 900 + k)
            mine.append(time.process_time() - start)
    return [statistics.median(mine[1:]) for mine in times]


def ratios(record: Record) -> list[Row]:
    """For each student: its W1 and its time over the teacher's, and the error of depth W over its own."""
    rows, out = record.data["rows"], list[Row]()
    for row in rows:
        if row["student"]:
            same = [r for r in rows if r["denoiser"] == row["denoiser"]]
            teacher = next(r for r in same if r["name"] == TEACHER)
            first = next((r for r in same if r["name"] == "W"), None)
            out.append({
                "name": row["name"], "denoiser": row["denoiser"], "seed": row["student"]["seed"],
                "w1": row["w1"] / teacher["w1"], "time": row["seconds"] / teacher["seconds"],
                "depth": first["rmse"] / row["rmse"] if first else math.nan,
            })  # fmt: skip
    return out


def tables(records: dict[str, Record]) -> dict[str, str]:
    """The samplers; the students' ratios to the teacher; the features made in other ways."""

    def cells(r: Row) -> list[str]:
        return [f"{r[k]:.4f}" for k in ("w1", "w2", "mmd", "variance_ratio")]

    record, rows = records[NAME], []
    for r in record.data["rows"]:
        name = f"student {r['name']}, seed {r['student']['seed']}" if r["student"] else r["name"]
        rmse = None if r["name"] == TEACHER else f"{r['rmse']:.3f}"
        rows.append([r["denoiser"], name, r["evaluations"], *cells(r), rmse, f"{r['seconds']:.3f}"])
    rows.append([None, EXACT, None, *cells(record.data["floor"]), None, None])
    head = ["denoiser", "sampler", "evaluations", "W1", "W2", "MMD", "variance ratio",
            "RMSE to the teacher's ends", "seconds"]  # fmt: skip
    limits = ["denoiser", "student", "seed", f"W1 / teacher's (expected at most {LIMIT_W1:g})",
              "time / teacher's (1/50)", f"error of W / its own ({LIMIT_SIGNATURE:g} for H)"]  # fmt: skip
    found = [
        [r["denoiser"], r["name"], r["seed"], f"{r['w1']:.2f}", f"1/{1 / r['time']:.0f}", f"{r['depth']:.2f}"]
        for r in ratios(record)
    ]
    made = {NAME: table(head, rows), f"{NAME}-ratios": table(limits, found)}
    return made | {"sigdeg-features": features_table(record)}


def draw(records: dict[str, Record], folder: Path) -> None:
    """Densities of teacher, untrained and students; their distances to the exact law and to the teacher."""
    figure, (left, right) = canvas(10.6, 4.2, ncols=2, width_ratios=(1.25, 1))
    record = records[NAME]
    rows = [r for r in record.data["rows"] if r["denoiser"] == "trained"]
    draw_densities(left, rows)
    for row in rows:
        name, student = row["name"], row["student"]
        if name.startswith(TEACHER):
            continue
        shade = SHADES[name.split(",")[0]]
        right.loglog(row["rmse"], row["w1"], "o", color=shade, mfc="none" if "," in name else shade, ms=6)
        if student.get("seed", record.seed) == record.seed and "feedback" not in name:
            right.annotate(name, (row["rmse"], row["w1"]), xytext=(-6, 5), textcoords="offset points",
                           ha="right", color=shade, fontsize=8)  # fmt: skip
    teacher = next(r["w1"] for r in rows if r["name"] == TEACHER)
    for value, words in ((teacher, f"teacher, {FINE} steps"), (LIMIT_W1 * teacher, f"{LIMIT_W1:g} x teacher"),
                         (record.data["floor"]["w1"], "exact samples")):  # fmt: skip
        right.axhline(value, color="0.4", lw=0.8, ls="-" if value == teacher else ":")
        right.annotate(words, (0.98, value), xycoords=("axes fraction", "data"), xytext=(0, 2), ha="right",
                       textcoords="offset points", color="0.3", fontsize=8)  # fmt: skip
    right.margins(x=0.25, y=0.1)
    ticks(right, (0.1, 0.2, 0.4, 0.8))
    right.set_xlabel("RMSE to the teacher's ends along the same noise")
    right.set_ylabel("W1 to the exact law")
    write(figure, folder / f"{NAME}.svg")


def draw_densities(axes: Any, rows: list[Row]) -> None:
    """Histograms of the samplers over the exact density."""
    edges = torch.linspace(*RANGE, len(rows[0]["histogram"]) + 1, dtype=F64)
    x = (edges[1:] + edges[:-1]) / 2
    z = (x.unsqueeze(1) - MIXTURE.means[:, 0]) / MIXTURE.stds
    exact = (-0.5 * z.square()).exp() / MIXTURE.stds @ MIXTURE.weights / math.sqrt(2 * math.pi)
    axes.fill_between(x, exact, color="0.88", lw=0, label="exact law")
    for name, shade in SHADES.items():
        row = next(r for r in rows if r["name"] == name)
        steps = row["evaluations"] // (2 if name == SHARK else 1)
        label = f"student {name}, {steps} steps" if row["student"] else f"{name}, {steps} steps"
        axes.plot(x, row["histogram"], color=shade, lw=1.3, label=label)
    axes.set_xlabel("x")
    axes.set_ylabel("density")
    axes.set_ylim(0, 1.75 * float(exact.max()))
    axes.legend(fontsize=7.5, ncols=2, loc="upper left", frameon=False)


EXPERIMENT = Experiment(NAME, __doc__, 10, BUDGETS, measure, tables, draw, figures=(f"{NAME}.svg",))

if __name__ == "__main__":
    EXPERIMENT.main()
