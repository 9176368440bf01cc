"""Sig-DEG on MNIST: a class-conditional U-Net teacher of 300 steps, students of 20, 10 and 5."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep import DiffusionModel
from fewstep.learned.sigdeg.sampler_training import along
from fewstep.learned.sigdeg.unet import SigUNet
from fewstep.learned.training import held_out
from fewstep.learned.trajectories import Trajectories, make_trajectories
from fewstep_analysis import mnist_teacher
from fewstep_analysis.figures import canvas, colour, image_rows, write
from fewstep_analysis.mnist_judge import Judge
from fewstep_analysis.records import Record

TAKES = "2 h"
# Nine of the levels of ten steps that each take away the same share of the teacher's root mean squared error
# (0.5 at the largest level, 0.34 at 3, 0.17 at 1, 0.08 at 0.3, 0.03 at 0.1), rounded; the other levels of
# 20 steps lie between them.
TEN = (9.0, 4.5, 2.8, 1.8, 1.2, 0.8, 0.5, 0.28, 0.1)
# The levels of a student. The teacher's x0 is off by 2 at the largest, which a first step down to 9 carries
# on: half of what ten untrained steps lose. Hence a level more there, and one less where little is decided.
KEPT = {20: tuple(range(21)), 10: (0, 1, 2, 4, 6, 8, 10, 12, 14, 17, 20), 5: (0, 2, 6, 10, 14, 20)}
SUBSTEPS = 15  # of the teacher in each of 20 intervals
PRECISE = 0.1  # below this level the teacher computes in float32, above in bfloat16: half the time
COUNTS = (10, 20, 5)  # the students of 20 and 5 begin as that of 10
# trajectories = samples of a Fréchet distance; per count the iterations, batch and rate
BUDGETS: dict[str, tuple[int, dict[int, tuple[int, int, float]]]] = {
    "paper": (4096, {10: (2400, 64, 4e-4), 20: (300, 64, 2e-4), 5: (300, 64, 2e-4)}),
    "smoke": (32, dict.fromkeys(COUNTS, (2, 8, 1e-4))),
}


def levels() -> Tensor:
    """(21,) the levels of 20 steps."""
    schedule = mnist_teacher.schedule()
    ends = torch.tensor([schedule.sigma_max, *TEN, schedule.sigma_min], dtype=torch.float64)
    middles = (ends[:-1] * ends[1:]).sqrt()
    return torch.cat([torch.stack([ends[:-1], middles], 1).flatten(), ends[-1:]])


def teacher(labels: Tensor, net: object) -> DiffusionModel:
    """The teacher with a class a sample."""
    problem = mnist_teacher.problem(labels, net=net)  # type: ignore[arg-type]

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=float(sigma.max()) > PRECISE):
            return problem.denoiser(x, sigma)

    return DiffusionModel(denoiser, problem.schedule)


def study(
    budget: str, seed: int, device: torch.device | str, work: Path, data: Path | None = None
) -> tuple[Record, dict[str, Tensor]]:
    """Teacher data, students and distances; what is done is kept in `work`, and not done again."""
    count, trainings = BUDGETS[budget]
    net = mnist_teacher.network().to(device)
    problem, began = partial(teacher, net=net), time.perf_counter()
    substeps = SUBSTEPS if budget == "paper" else 1
    taught = make_trajectories(
        problem, levels(), count=count, event_shape=(1, 28, 28), substeps=substeps, levy="K",
        labels=torch.arange(count) % 10, seed=seed, folder=work / "teacher", device=device,
        progress=True,
    )  # fmt: skip
    seconds = {"teacher": time.perf_counter() - began}
    students, reports, network = {}, {}, SigUNet.of(net, mnist_teacher.schedule(), 3)
    for n in COUNTS:
        began, (iterations, batch, rate) = time.perf_counter(), trainings[n]
        students[n], reports[n] = fs.distill_sigdeg(
            problem, data=taught.coarsen(KEPT[n]), network=network, forcing=1.0, autocast=True,
            iterations=iterations, batch=batch, rate=rate, every=100, folder=work, device=device,
            progress=True,
        )  # fmt: skip
        seconds[f"student of {n}"] = time.perf_counter() - began
        network = _copy(students[10].network)
    body: dict[str, Any] = {
        "trajectories": count, "levels": levels().tolist(), "kept": {str(n): KEPT[n] for n in COUNTS},
        "teacher steps": taught.evaluations, "trainings": {str(n): trainings[n] for n in COUNTS},
        "seconds of the last call": seconds, "knots": {str(n): r.knots for n, r in reports.items()},
        "losses": {str(n): r.losses for n, r in reports.items()},
    }  # fmt: skip
    body["rows"] = distances(problem, taught, students, seed, device, data)
    return Record("sigdeg-mnist", body, seed), pictures(problem, taught, students, device)


def _copy(network: Any) -> SigUNet:
    """Another of the same weights, to be trained on."""
    other = SigUNet(**network.config)
    other.load_state_dict(network.state_dict())
    return other


def distances(
    problem: Any, taught: Trajectories, students: dict[int, fs.SigSampler], seed: int, device: Any,
    data: Path | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Fréchet and kernel distances to the training set, class score and right classes.

    Of as many samples as there are trajectories: a Fréchet distance is the larger the fewer they are.
    """
    judge, labels = Judge.of(data), torch.arange(len(taught)) % 10
    ends = taught.pick(torch.arange(len(taught))).knots[-1]
    rows = [("test digits", 0, judge.digits(labels, seed)), ("teacher", taught.evaluations, ends)]
    for n, student in sorted(students.items()):
        for name, solver in ({f"student of {n}": student} | untrained(student.plan.sigmas)).items():
            rows.append((name, n, _sample(problem, solver, labels, seed + n, device)))
    head = ("sampler", "evaluations")
    return [dict(zip(head, said)) | judge(x, labels) | {"std": float(x.std())} for *said, x in rows]


def untrained(sigmas: Tensor) -> dict[str, Any]:
    """The same parent without training, on the student's grid and on one even in log SNR."""
    parent = fs.EulerMaruyama()
    even = fs.sigma_grid(mnist_teacher.schedule(), len(sigmas) - 1, "logsnr", "sigma_min")
    grids = {"even in log SNR": even, "the student's grid": sigmas}
    return {f"untrained, {name}": parent.plan(grid) for name, grid in grids.items()}


def _sample(problem: Any, solver: Any, labels: Tensor, seed: int, device: Any) -> Tensor:
    """Samples of these classes; a student computes as it was trained, in bfloat16."""
    parts, taught = [], isinstance(solver, fs.SigSampler)
    for k, part in enumerate(labels.split(250)):
        mine = solver.at(part) if taught else solver
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=taught):
            parts.append(fs.sample(problem(part), mine, shape=(len(part), 1, 28, 28), seed=1000 * seed + k,
                                   device=device).float().cpu())  # fmt: skip
    return torch.cat(parts)


def pictures(
    problem: Any, taught: Trajectories, students: dict[int, fs.SigSampler], device: Any
) -> dict[str, Tensor]:
    """Held-out paths, a column each of a class: teacher, students and untrained along the same noise."""
    held = held_out(len(taught))[1].tolist()
    index = torch.tensor([next((i for i in held if i % 10 == k), held[0]) for k in range(10)])
    rows = {f"teacher, {taught.evaluations} steps": taught.pick(index).knots[-1]}
    for n, student in sorted(students.items(), reverse=True):
        some = taught.coarsen(KEPT[n]).pick(index).to(device)
        solvers = {f"student, {n}": student.at(some.labels), f"untrained, {n}": student.plan}
        with torch.no_grad():
            rows |= {k: along(problem(some.labels), s, some)[-1].cpu() for k, s in solvers.items()}
    return rows


def draw(record: Record, path: str | Path) -> Path:
    """Fréchet distance against evaluations."""
    figure, axes = canvas(6.4, 4.4)
    rows = record.data["rows"]
    kinds = {
        "student": ("student", "SigStep"),
        "untrained, the": ("untrained, on the student's grid", "EulerMaruyama"),
        "untrained, even": ("untrained, even in log SNR", "Milstein"),
    }
    for kind, (said, shade) in kinds.items():
        points = sorted((r["evaluations"], r["frechet"]) for r in rows if r["sampler"].startswith(kind))
        axes.loglog(*zip(*points), "-", color=colour(shade), marker="o", ms=4, label=said)
    for name, style in (("teacher", "--"), ("test digits", ":")):
        value = next(r["frechet"] for r in rows if r["sampler"] == name)
        axes.axhline(value, color="0.3", ls=style, lw=1, label=name)
    axes.set_xlabel("network evaluations")
    axes.set_ylabel("Fréchet distance to the training set")
    axes.set_xticks([5, 10, 20], ["5", "10", "20"])
    axes.set_xticks([], minor=True)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    return write(figure, path)


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record, the figure and the pictures; returns the table. Needs MNIST (FEWSTEP_DATA).

    Trajectories and checkpoints stay in `out`/work; the same command goes on from them.
    """
    record, shown = study(budget, seed, device, out / "work" / f"sigdeg-mnist-{budget}")
    record.save(out / "records" / "sigdeg-mnist.json")
    draw(record, out / "figures" / "sigdeg-mnist.svg")
    image_rows(shown, out / "figures" / "sigdeg-mnist.png")
    return [f"{r['sampler']}, {r['evaluations']}: {r['frechet']:.3f}" for r in record.data["rows"]]
