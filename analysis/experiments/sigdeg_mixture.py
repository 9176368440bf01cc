"""Sig-DEG on two Gaussians on the line: 5 steps against a teacher of 300, both held against the exact law.

The first experiment of arXiv 2508.16939, whose mixture, grid and network are not available to us.
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
from fewstep.distances import mmd
from fewstep.grid import refined
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep.learned.training import seeded
from fewstep.learned.trajectories import Trajectories, make_trajectories
from fewstep_analysis.diffusion_problems import Mixture
from fewstep_analysis.figures import canvas, write
from fewstep_analysis.parallel import progress
from fewstep_analysis.records import Record
from fewstep_analysis.teachers import fit_denoiser
from sigdeg_features import LEVEL, features, features_table

TAKES = "10 min"
F64 = torch.float64
MIXTURE = Mixture(
    torch.tensor([[-1.2], [1.0]], dtype=F64), torch.tensor([0.25, 0.35], dtype=F64),
    torch.tensor([0.4, 0.6], dtype=F64),
)  # fmt: skip
SCHEDULE = fs.EDM(sigma_min=0.05, sigma_max=10.0)
STEPS, FINE = 5, 300
CHUNK = 8192  # samples at a time: what stays in a cache
LIMIT_W1, LIMIT_SIGNATURE, LIMIT_TIME = 1.5, 1.8, 1 / 50
RANGE = (-2.4, 2.4)  # of the histograms
TEACHER, PARENT, SHARK, EXACT = "teacher", "Euler-Maruyama", "ShARK", "exact samples"
SHADES = {
    TEACHER: "0.35", PARENT: "#56B4E9", SHARK: "#009E73", "W": "#E69F00", "H": "#D55E00", "K": "#7A4FA3",
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """How much of everything.

    Attributes:
        data, iterations: of the teacher's network.
        trajectories, batch, distillation: of the students' training.
        samples, blocks: each sampler is measured on so many blocks of so many samples.
        paths: on which errors along the same noise are taken.
        seeds: trainings of a student.
        rounds: of the clock.
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


PAPER = Budget(1 << 18, 4000, 16_384, 512, 2500, 1 << 17, 4, 8192, 2, 5)
SMOKE = Budget(4096, 60, 256, 64, 10, 512, 2, 128, 1, 1)


def levels(steps: int, schedule: fs.EDM = SCHEDULE, shift: float = 0.5) -> Tensor:
    """(steps + 1,) levels even in (tau + shift)^(-1/5), tau = 1/sigma^2.

    Inside one Gaussian of variance 1/c the end is linear in the integral of dB/(tau + c), of which a step's
    W and H leave open what a line does not fit; this spacing gives each step an equal part of that. The
    shift is c of the mixture taken for one Gaussian, 0.8, made smaller: there the modes are chosen.
    """
    first, last = ((s**-2.0 + shift) ** -0.2 for s in (schedule.sigma_max, schedule.sigma_min))
    u = first + (last - first) * torch.linspace(0, 1, steps + 1, dtype=F64)
    out: Tensor = (u**-5 - shift).rsqrt()
    out[0], out[-1] = schedule.sigma_max, schedule.sigma_min
    return out


def trained(data: int, iterations: int, seed: int = 0) -> fs.DiffusionModel:
    """A denoiser fitted to samples of the mixture: to widen it costs a student next to nothing."""
    x = MIXTURE.sample(data, seed).float()
    build: Any = lambda: DenoisingMLP((1,), 64, 2, data_std=float(x.std()))  # noqa: E731
    network = fit_denoiser(seeded(seed, build), x, SCHEDULE, iterations, seed, batch=512)
    return fs.DiffusionModel(network.requires_grad_(False), SCHEDULE)


@lru_cache(maxsize=8)
def quantiles(n: int) -> Tensor:
    """(n,) the exact law's quantiles in the middles of n equal shares."""
    x = torch.linspace(-6, 6, 60_001, dtype=F64)
    below = torch.special.ndtr((x.unsqueeze(1) - MIXTURE.means[:, 0]) / MIXTURE.stds) @ MIXTURE.weights
    return torch.from_numpy(np.interp((np.arange(n) + 0.5) / n, below.numpy(), x.numpy()))


def draw(problem: fs.DiffusionModel, solver: Any, count: int, seed: int) -> Tensor:
    """(count,) float64 samples on fresh noise, as one samples in earnest."""
    plan, parts = getattr(solver, "plan", solver), list[Tensor]()
    for i, start in enumerate(range(0, count, CHUNK)):
        shape, own = (min(CHUNK, count - start), 1), 10_000 * seed + i
        source = fs.FreshIncrements(shape, levy=plan.levy, seed=own)
        with torch.no_grad():
            parts.append(fs.sample(problem, solver, shape=shape, seed=own, path=source))
    return torch.cat(parts).flatten().double()


def apart(blocks: list[Tensor], seed: int) -> dict[str, Any]:
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


@dataclass(frozen=True)
class Sampler:
    """What is measured: a model with a plan or a student."""

    name: str
    denoiser: str
    problem: fs.DiffusionModel
    solver: Any
    words: dict[str, Any]

    @property
    def plan(self) -> fs.Plan:
        plan: fs.Plan = getattr(self.solver, "plan", self.solver)
        return plan


def students(
    problem: fs.DiffusionModel, denoiser: str, data: Trajectories, kinds: list[dict[str, Any]], budget: Budget,
    seed: int,
) -> Iterator[Sampler]:  # fmt: skip
    """One of each kind and training seed, on the same trajectories."""
    for words in kinds:
        for k in range(words.get("seeds", 1)):
            asked = {"levy": words["levy"], "feedback": words.get("feedback", False)}
            student, report = fs.distill_sigdeg(
                problem, data=data, seed=seed + k, batch=budget.batch, iterations=budget.distillation,
                rate=2e-3, **asked,
            )  # fmt: skip
            name = f"{asked['levy']}{', feedback' if asked['feedback'] else ''}"
            told = asked | {"seed": seed + k, "seconds": report.seconds["training"], "losses": report.losses}
            yield Sampler(name, denoiser, problem, student, told)


def samplers(budget: Budget, seed: int) -> Iterator[Sampler]:
    """The teacher with a trained and with the exact denoiser, the untrained and the students of both."""
    coarse = levels(STEPS)
    even = fs.sigma_grid(SCHEDULE, STEPS, final="sigma_min")
    euler, shark = fs.EulerMaruyama(), fs.ShARK()
    models = {"trained": trained(budget.data, budget.iterations, seed)}
    models["exact"] = fs.DiffusionModel(MIXTURE.denoiser, SCHEDULE)
    kinds: dict[str, list[dict[str, Any]]] = {
        "trained": [{"levy": x, "seeds": budget.seeds if x != "W" else 1} for x in "WHK"]
        + [{"levy": "H", "feedback": True}],
        "exact": [{"levy": "K"}],
    }
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
        yield from students(problem, denoiser, data, kinds[denoiser], budget, seed)


class Ends:
    """Where samplers end along one Brownian path, and where the teacher of the same denoiser does."""

    def __init__(self, paths: int, seed: int) -> None:
        self.taus: Tensor = refined(levels(STEPS), FINE // STEPS) ** -2.0
        self.shape: tuple[int, int] = (paths, 1)
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.noise: Tensor = torch.randn(paths, 1, generator=generator) * SCHEDULE.sigma_max
        self.teachers: dict[str, Tensor] = {}

    def of(self, sampler: Sampler) -> Tensor:
        """(paths,) the end states."""
        # a path is made anew for each: it keeps nothing, and one with these knots is the same each time
        path = fs.BrownianPath(
            self.shape, t0=float(self.taus[0]), t1=float(self.taus[-1]), seed=self.seed, levy="K",
            clock="log", knots=self.taus,
        )  # fmt: skip
        with torch.no_grad():
            return fs.sample(sampler.problem, sampler.solver, noise=self.noise, path=path).flatten()

    def rmse(self, sampler: Sampler, ends: Tensor) -> float:
        """Root mean square distance to the teacher's ends; the teacher comes first."""
        teacher = self.teachers.setdefault(sampler.denoiser, ends)
        return float((ends - teacher).double().square().mean().sqrt())


def seconds(found: list[Sampler], budget: Budget, seed: int) -> list[float]:
    """Median CPU seconds of each for a chunk of samples on fresh noise, one after another in every round."""
    seen: list[list[float]] = [[] for _ in found]
    for k in range(budget.rounds + 1):
        for sampler, times in zip(found, seen):
            began = time.process_time()
            draw(sampler.problem, sampler.solver, min(CHUNK, budget.samples), seed + 900 + k)
            times.append(time.process_time() - began)
    return [statistics.median(times[1:]) for times in seen]


def study(seed: int = 0, budget: Budget = PAPER) -> Record:
    """Train, sample, measure."""
    began = time.process_time()
    ends, found, rows = Ends(budget.paths, seed + 5), list[Sampler](), list[dict[str, Any]]()
    for sampler in progress(samplers(budget, seed), "sampler"):
        blocks = [draw(sampler.problem, sampler.solver, budget.samples, seed + 1 + k)
                  for k in range(budget.blocks)]  # fmt: skip
        rows.append({
            "name": sampler.name, "denoiser": sampler.denoiser, "evaluations": sampler.plan.nfe,
            "rmse": ends.rmse(sampler, ends.of(sampler)), **apart(blocks, seed), "student": sampler.words,
        })  # fmt: skip
        found.append(sampler)
    for row, taken in zip(rows, seconds(found, budget, seed)):
        row["seconds"] = taken
    reals = [MIXTURE.sample(budget.samples, seed + 300 + k).flatten() for k in range(2 * budget.blocks)]
    one, other = (torch.cat(r).sort().values for r in (reals[: budget.blocks], reals[budget.blocks :]))
    main = next(s for s in found if s.name == "H" and s.denoiser == "trained")
    data = {
        "levels": levels(STEPS).tolist(), "rows": rows, "samples": budget.samples * budget.blocks,
        "floor": apart(reals[: budget.blocks], seed), "floor_two_samples": float((one - other).abs().mean()),
        "features": {"level": LEVEL, "rows": features(main.problem, main.solver, budget.samples, seed)},
        "seconds": "CPU seconds, 8,192 samples", "cpu_seconds": round(time.process_time() - began),
    }  # fmt: skip
    return Record("sigdeg-mixture", data, seed)


def ratios(record: Record) -> list[dict[str, Any]]:
    """For each student: its W1 over the teacher's, its time over the teacher's, errors against depth W's."""
    rows, out = record.data["rows"], list[dict[str, Any]]()
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


def table(record: Path) -> str:
    """The record's samplers in Markdown."""
    data = Record.load(record).data
    lines = [
        "| denoiser | sampler | evaluations | W1 | W2 | MMD | variance ratio | RMSE to the teacher's ends "
        "| seconds |",
        "| --- " * 9 + "|",
    ]
    for r in data["rows"]:
        name = r["name"] if not r["student"] else f"student {r['name']}, seed {r['student']['seed']}"
        cells = [r["denoiser"], name, r["evaluations"], *_distances(r)]
        cells += ["-" if r["name"] == TEACHER else f"{r['rmse']:.3f}", f"{r['seconds']:.3f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines.append("| " + " | ".join(["-", EXACT, "-", *_distances(data["floor"]), "-", "-"]) + " |")
    return "\n".join(lines)


def _distances(row: dict[str, Any]) -> list[str]:
    return [f"{row['w1']:.4f}", f"{row['w2']:.4f}", f"{row['mmd']:.4f}", f"{row['variance_ratio']:.4f}"]


def draw_figure(record: Record, path: str | Path) -> Path:
    """Densities of teacher, untrained and students; their distances to the exact law and to the teacher."""
    figure, (left, right) = canvas(10.6, 4.2, ncols=2, width_ratios=(1.25, 1))
    rows = [r for r in record.data["rows"] if r["denoiser"] == "trained"]
    count = len(rows[0]["histogram"])
    x = torch.linspace(*RANGE, count + 1, dtype=F64)
    middle = (x[1:] + x[:-1]) / 2
    away = (middle.unsqueeze(1) - MIXTURE.means[:, 0]) / MIXTURE.stds
    exact = (-0.5 * away.square()).exp() / MIXTURE.stds @ MIXTURE.weights / math.sqrt(2 * math.pi)
    left.fill_between(middle, exact, color="0.88", lw=0, label="exact law")
    shown = {n: next(r for r in rows if r["name"] == n) for n in SHADES}
    for name, row in shown.items():
        label = f"student {name}, {STEPS} steps" if len(name) == 1 else f"{name}, {_steps(row)} steps"
        left.plot(middle, row["histogram"], color=SHADES[name], lw=1.3, label=label)
    left.set_xlabel("x")
    left.set_ylabel("density")
    left.set_ylim(0, 1.75 * float(exact.max()))
    left.legend(fontsize=7.5, ncols=2, loc="upper left", frameon=False)
    for row in rows:
        if not row["name"].startswith(TEACHER):
            shade = SHADES[row["name"].split(",")[0]]
            face = "none" if "," in row["name"] else shade
            right.loglog(row["rmse"], row["w1"], "o", color=shade, mfc=face, ms=6)
            if row["student"].get("seed", record.seed) == record.seed:
                below = "feedback" in row["name"]  # its place is nearly that of the student without
                right.annotate(row["name"], (row["rmse"], row["w1"]), xytext=(-6, -12 if below else 5),
                               textcoords="offset points", ha="right", color=shade, fontsize=8)  # fmt: skip
    teacher, floor = shown[TEACHER]["w1"], record.data["floor"]["w1"]
    for value, text in ((teacher, f"teacher, {FINE} steps"), (LIMIT_W1 * teacher, f"{LIMIT_W1:g} x teacher"),
                        (floor, "exact samples")):  # fmt: skip
        right.axhline(value, color="0.4", lw=0.8, ls="-" if value == teacher else ":")
        right.annotate(text, (0.98, value), xycoords=("axes fraction", "data"), xytext=(0, 2), ha="right",
                       textcoords="offset points", color="0.3", fontsize=8)  # fmt: skip
    right.margins(x=0.25, y=0.1)
    right.set_xticks([0.1, 0.2, 0.4, 0.8], ["0.1", "0.2", "0.4", "0.8"])
    right.set_xticks([], minor=True)
    right.set_xlabel("RMSE to the teacher's ends along the same noise")
    right.set_ylabel("W1 to the exact law")
    right.grid(True, which="major", alpha=0.3)
    return write(figure, path)


def _steps(row: dict[str, Any]) -> int:
    return int(row["evaluations"]) // (2 if row["name"].startswith(SHARK) else 1)


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record and the figure; returns the tables and what they say of the limits."""
    record = study(seed, SMOKE if budget == "smoke" else PAPER)
    file = record.save(out / "records" / "sigdeg-mixture.json")
    draw_figure(record, out / "figures" / "sigdeg-mixture.svg")
    said = [
        f"{r['denoiser']} denoiser, student {r['name']}, seed {r['seed']}: W1 / teacher's {r['w1']:.2f} "
        f"(expected at most {LIMIT_W1:g}), time / teacher's 1/{1 / r['time']:.0f} (1/50), "
        f"{r['depth']:.2f} times as near as W ({LIMIT_SIGNATURE:g} for H)"
        for r in ratios(record)
    ]
    return [table(file), features_table(file), *said]
