"""Sig-DEG on MNIST: a class-conditional U-Net teacher of 300 steps, students of 20, 10 and 5.

Trajectories and checkpoints stay in the work folder; the same command resumes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from base import (
    Experiment,
    Job,
    Record,
    Row,
    canvas,
    colour,
    curve,
    images_figure,
    packed,
    table,
    ticks,
    write,
)
from fewstep.learned.sigdeg.distill import along
from fewstep.learned.training import held_out
from fewstep.learned.trajectories import Trajectories, make_trajectories
from fewstep_analysis import teachers
from mnist_judge import Judge

NAME = "sigdeg-mnist"
# Nine of the noise levels of ten steps that each take away the same share of the teacher's root mean squared
# error (0.5 at the largest level, 0.34 at 3, 0.17 at 1, 0.08 at 0.3, 0.03 at 0.1), rounded; the other levels
# of 20 steps lie between them.
TEN = (9.0, 4.5, 2.8, 1.8, 1.2, 0.8, 0.5, 0.28, 0.1)
# The levels of a student. The teacher's x0 has an error of 2 at the largest, which a first step down to 9
# carries on: half of what ten untrained steps lose. Hence one more level there, and one less where little is
# decided.
KEPT = {20: tuple(range(21)), 10: (0, 1, 2, 4, 6, 8, 10, 12, 14, 17, 20), 5: (0, 2, 6, 10, 14, 20)}
PRECISE = 0.1  # below this level the teacher computes in float32, above in bfloat16, which takes half the time
EVENT = (1, 28, 28)


def training(iterations: int, learning_rate: float, batch_size: int = 64) -> fs.TrainingOptions:
    return fs.TrainingOptions(iterations, batch_size, learning_rate, checkpoint_every=100, autocast=True)


@dataclass(frozen=True)
class Budget:
    """What a run computes.

    Attributes:
        trajectories: of the teacher; also the number of samples of a Fréchet distance.
        substeps: of the teacher in each of 20 intervals.
        first, later: trainings of the student of 10 steps, and of those of 20 and 5, which start from it.
        real: training images that Fréchet distances are taken to; None for all.
    """

    trajectories: int
    substeps: int
    first: fs.TrainingOptions
    later: fs.TrainingOptions
    real: int | None = None


BUDGETS = {
    "smoke": Budget(32, 1, first=training(2, 1e-4, 8), later=training(2, 1e-4, 8), real=500),
    "paper": Budget(4096, 15, first=training(2400, 4e-4), later=training(300, 2e-4)),
}


def levels() -> Tensor:
    """(21,) the noise levels of 20 steps."""
    schedule = teachers.mnist_schedule()
    ends = torch.tensor([schedule.sigma_max, *TEN, schedule.sigma_min], dtype=torch.float64)
    middles = (ends[:-1] * ends[1:]).sqrt()
    return torch.cat([torch.stack([ends[:-1], middles], 1).flatten(), ends[-1:]])


def teacher(labels: Tensor, net: Any) -> fs.DiffusionModel:
    """The class-conditional teacher, one label per sample."""
    problem = teachers.mnist(labels, net=net)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=float(sigma.max()) > PRECISE):
            return problem.denoiser(x, sigma)

    return fs.DiffusionModel(denoiser, problem.schedule)


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """The teacher's trajectories, the students, their distances and pictures."""
    net = teachers.mnist_network().to(job.device)
    problem, start = partial(teacher, net=net), time.perf_counter()
    data = make_trajectories(
        problem, levels(), count=budget.trajectories, event_shape=EVENT, substeps=budget.substeps, levy="K",
        labels=torch.arange(budget.trajectories) % 10, seed=job.seed, folder=job.work / "teacher",
        device=job.device, progress=True,
    )  # fmt: skip
    seconds = {"teacher": time.perf_counter() - start}
    students, reports, trainings = {}, {}, {10: budget.first, 20: budget.later, 5: budget.later}
    network = fs.SigUNet.of(net, teachers.mnist_schedule(), 3)
    for n, options in trainings.items():
        start = time.perf_counter()
        students[n], reports[n] = fs.distill_sigdeg(
            problem, data=data.coarsen(KEPT[n]), network=network, forcing=1.0, training=options,
            folder=job.work, device=job.device, progress=True,
        )  # fmt: skip
        seconds[f"student of {n}"] = time.perf_counter() - start
        network = fs.SigUNet(**students[10].network.config)  # the students of 20 and 5 start from that of 10
        network.load_state_dict(students[10].network.state_dict())
    body = {
        "trajectories": budget.trajectories, "levels": levels().tolist(),
        "kept": {str(n): KEPT[n] for n in trainings}, "teacher steps": data.evaluations,
        "trainings": {str(n): [t.iterations, t.batch_size, t.learning_rate] for n, t in trainings.items()},
        "seconds of the last call": seconds, "knots": {str(n): r.knots for n, r in reports.items()},
        "losses": {str(n): r.losses for n, r in reports.items()},
        "rows": distances(problem, data, students, job, budget.real),
        "pictures": packed(pictures(problem, data, students, job.device)),
    }  # fmt: skip
    return {NAME: Record(NAME, body, job.seed)}


def distances(
    problem: Any, data: Trajectories, students: dict[int, fs.SigSampler], job: Job, real: int | None
) -> list[Row]:
    """Fréchet and kernel distances to the training set, class score and share of right classes.

    Each is of as many samples as there are trajectories: a Fréchet distance is larger for fewer samples.
    """
    judge, labels = Judge.of(real), torch.arange(len(data)) % 10
    ends = data.pick(torch.arange(len(data))).knots[-1]
    samples = [("test digits", 0, judge.digits(labels, job.seed)), ("teacher", data.evaluations, ends)]
    for n, student in sorted(students.items()):
        for name, solver in ({f"student of {n}": student} | untrained(student.plan.sigmas)).items():
            samples.append((name, n, sample(problem, solver, labels, job.seed + n, job.device)))
    return [{"sampler": name, "evaluations": n, **judge(x, labels), "std": float(x.std())} for name, n, x in samples]


def untrained(sigmas: Tensor) -> dict[str, Any]:
    """The parent without training, on the student's grid and on one even in log SNR."""
    even = fs.sigma_grid(teachers.mnist_schedule(), len(sigmas) - 1, "logsnr", "sigma_min")
    grids = {"even in log SNR": even, "the student's grid": sigmas}
    return {f"untrained, {name}": fs.EulerMaruyama().plan(grid) for name, grid in grids.items()}


def sample(problem: Any, solver: Any, labels: Tensor, seed: int, device: str) -> Tensor:
    """Samples of these classes; a student computes in bfloat16, as it was trained."""
    parts, learned = [], isinstance(solver, fs.SigSampler)
    for k, part in enumerate(labels.split(250)):
        mine = solver.at(part) if learned else solver
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=learned):
            x = fs.sample(problem(part), mine, shape=(len(part), *EVENT), seed=1000 * seed + k, device=device)
        parts.append(x.float().cpu())
    return torch.cat(parts)


def pictures(problem: Any, data: Trajectories, students: dict[int, fs.SigSampler], device: str) -> dict[str, Tensor]:
    """Held-out paths, one column per class: teacher, students and untrained along the same noise."""
    held = held_out(len(data))[1].tolist()
    index = torch.tensor([next((i for i in held if i % 10 == k), held[0]) for k in range(10)])
    rows = {f"teacher, {data.evaluations} steps": data.pick(index).knots[-1]}
    for n, student in sorted(students.items(), reverse=True):
        some = data.coarsen(KEPT[n]).pick(index).to(device)
        solvers = {f"student, {n}": student.at(some.labels), f"untrained, {n}": student.plan}
        with torch.no_grad():
            rows |= {k: along(problem(some.labels), s, some)[-1].cpu() for k, s in solvers.items()}
    return rows


def tables(records: dict[str, Record]) -> dict[str, str]:
    """The samplers by their distances."""
    rows = [
        [r["sampler"], r["evaluations"] or None, f"{r['frechet']:.3f}", f"{1000 * r['kernel']:.2f}",
         f"{r['score']:.2f}", f"{r['right']:.1%}", f"{r['std']:.3f}"]
        for r in records[NAME].data["rows"]
    ]  # fmt: skip
    head = ["sampler", "evaluations", "Fréchet", "kernel x 1000", "class score", "right class", "std"]
    return {NAME: table(head, rows)}


def draw(records: dict[str, Record], folder: Path) -> None:
    """Fréchet distance against evaluations, and pictures."""
    figure, axes = canvas(6.4, 4.4)
    rows = records[NAME].data["rows"]
    for kind, words, shade in (
        ("student", "student", "SigStep"),
        ("untrained, the", "untrained, on the student's grid", "EulerMaruyama"),
        ("untrained, even", "untrained, even in log SNR", "Milstein"),
    ):
        points = sorted((r["evaluations"], r["frechet"]) for r in rows if r["sampler"].startswith(kind))
        curve(axes, points, "-", color=colour(shade), marker="o", ms=4, label=words)
    for name, style in (("teacher", "--"), ("test digits", ":")):
        value = next(r["frechet"] for r in rows if r["sampler"] == name)
        axes.axhline(value, color="0.3", ls=style, lw=1, label=name)
    axes.set_xlabel("network evaluations")
    axes.set_ylabel("Fréchet distance to the training set")
    ticks(axes, (5, 10, 20))
    axes.legend(fontsize=8)
    write(figure, folder / f"{NAME}.svg")
    images_figure(records[NAME], folder / f"{NAME}.png")


EXPERIMENT = Experiment(
    NAME, __doc__, 120, BUDGETS, measure, tables, draw, figures=(f"{NAME}.svg", f"{NAME}.png"),
    needs="diffusers, and MNIST in the folder that FEWSTEP_DATA names",
)  # fmt: skip

if __name__ == "__main__":
    EXPERIMENT.main()
