"""SFDDM on MNIST, a class-conditional U-Net: the published loss, one fold of displacement, and halving.

The students that are missing in the work folder are trained; an interrupted run resumes from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
import sfddm_training as tools
from base import Experiment, Job, Record, Row, canvas, images_figure, packed, rms, table, ticks, write
from fewstep import TrainingOptions
from fewstep.learned.sfddm.process import StudentProcess
from fewstep.learned.unet_denoiser import UNetDenoiser
from fewstep_analysis import teachers
from mnist_data import mnist
from mnist_judge import Judge
from sfddm_training import DISPLACED, HALVED, PLAIN, PUBLISHED, SHORT, Trained, distil

NAME = "sfddm-mnist"
Key = tuple[str, int]  # way and number of steps
# halving starts at 64 steps, where teacher-DDIM is as good as its fine ODE, in halving's favour
STUDENTS: dict[str, Key] = {
    "displacement-8": (DISPLACED, 8), "displacement-4": (DISPLACED, 4), "halving-32": (HALVED, 32),
    "halving-16": (HALVED, 16), "halving-8": (HALVED, 8), "published-16": (PUBLISHED, 16),
}  # fmt: skip
SUBSTEPS = {8: 6, 4: 8}  # of displacement: 48 and 32 steps of the teacher in all
ARC, ARC_CLASS = 10, 3  # noises between two, and the digit that is drawn from them


@dataclass(frozen=True)
class Budget:
    """What a run computes.

    Attributes:
        images: to judge by.
        fine_steps: of the ODE that is taken as exact.
        published, displaced: trainings with the published loss, and of each fold of displacement.
        data: training images at most; the distances of a report are of as many samples, 64 at most.
        students: which are trained.
        real: training images that Fréchet distances are taken to; None for all.
    """

    images: int
    fine_steps: int
    published: TrainingOptions
    displaced: TrainingOptions
    data: int | None = None
    students: tuple[str, ...] = tuple(STUDENTS)
    real: int | None = None


def training_options(iterations: int, batch_size: int, learning_rate: float) -> TrainingOptions:
    return TrainingOptions(iterations, batch_size, learning_rate, checkpoint_every=100, autocast=True)


BUDGETS = {
    "smoke": Budget(20, 3, training_options(1, 2, 1e-3), training_options(1, 2, 3e-4), data=8, real=500),
    "paper": Budget(2000, 40, training_options(2000, 32, 1e-3), training_options(800, 32, 3e-4)),
}


def teacher() -> UNetDenoiser:
    """The shipped U-Net as a module `(x, sigma, labels=) -> x0`."""
    return UNetDenoiser.of(teachers.mnist_network(), teachers.mnist_schedule())


def train(budget: Budget, job: Job) -> dict[Key, Trained]:
    """All students by way and number of steps; the cost of a fold of halving includes those before it."""
    digits, classes, _, _ = mnist()
    options: Row = {"data": digits[: budget.data], "labels": classes[: budget.data], "seed": job.seed,
                    "device": job.device}  # fmt: skip
    made: dict[Key, Trained] = {}
    for name in budget.students:
        way, steps = STUDENTS[name]
        network, schedule = teacher(), teachers.mnist_schedule()
        before = made.get((HALVED, 2 * steps)) if way == HALVED else None
        if before is not None:
            network, schedule = before.student.network, before.student.process  # type: ignore[assignment]
        training = budget.published if way == PUBLISHED else budget.displaced
        substeps = SUBSTEPS[steps] if way == DISPLACED else 2
        t = distil(way, network, schedule, steps, job.work / name, training, substeps, **options)
        if before is not None:
            t = Trained(t.student, t.evaluations + before.evaluations, t.seconds + before.seconds, t.losses)
        made[way, steps] = t
    return made


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Train what is missing, sample all from the same noise with the same classes, and measure."""
    made, many = train(budget, job), budget.images
    net, schedule, labels = teacher().to(job.device), teachers.mnist_schedule(), torch.arange(many) % 10
    noise = torch.randn(many, 1, 28, 28, generator=torch.Generator().manual_seed(job.seed + 1000))
    every = fs.SFDDM(net, StudentProcess(schedule, torch.arange(len(schedule.log_sigmas))))
    draw_from = partial(sample, noise=noise, labels=labels, device=job.device)
    ends = {("fine", 0): draw_from(every, fs.UniPC(3), steps=budget.fine_steps)}
    for n in (16, 8, 4):
        ends[PLAIN, n] = draw_from(tools.on_phi(net, schedule, n))
        ends |= {key: draw_from(t.student) for key, t in made.items() if key[1] == n}
    rows = judge_samples(ends, made, labels, job.seed, budget.real)
    arc = partial(sample, noise=tools.slerp(noise[0], noise[1], ARC), labels=torch.full((ARC,), ARC_CLASS),
                  device=job.device)  # fmt: skip
    arcs = {label(("fine", 0)): arc(every, fs.UniPC(3), steps=budget.fine_steps)}
    arcs |= {label(key): arc(t.student) for key, t in made.items() if key[1] <= 16}
    data = {
        "images": many, "fine_steps": budget.fine_steps, "batch": budget.published.batch_size,
        **{k: tools.short(getattr(budget, k)) for k in ("published", "displaced")},
        "substeps": {str(n): s for n, s in SUBSTEPS.items()}, "halving_from": 64,
        "losses": {f"{way}, {n}": t.losses for (way, n), t in made.items()}, "rows": rows, **criteria(rows),
        "folds": tools.compare_folds(rows, "frechet", "rmse"),
        "pictures": packed({label(key): x[:10] for key, x in ends.items()}), "arc": packed(arcs),
    }  # fmt: skip
    return {NAME: Record(NAME, data, job.seed)}


def label(key: Key) -> str:
    return SHORT[key[0]] + (f", {key[1]}" if key[1] else "")


@torch.no_grad()
def sample(
    student: fs.SFDDM, solver: Any = None, *, noise: Tensor, labels: Tensor, device: str, **options: Any
) -> Tensor:
    """Samples by the student's own steps, or by a solver on its model."""
    parts = []
    for x, y in zip(noise.split(250), labels.split(250), strict=True):
        mine = student.at(y.to(device))
        parts.append(fs.sample(mine.problem(), solver or mine, noise=x.to(device), **options).cpu())
    return torch.cat(parts)


@torch.no_grad()
def judge_samples(
    ends: dict[Key, Tensor], made: dict[Key, Trained], labels: Tensor, seed: int, real: int | None
) -> list[Row]:
    """Distances to the training set, and to the fine ODE and teacher-DDIM from the same noise."""
    judge, fine = Judge.of(real), ends["fine", 0]
    out: list[Row] = [{"way": "test digits", "steps": 0} | judge(judge.digits(labels, seed), labels)]
    for (way, n), x in ends.items():
        row = {"way": way, "steps": n, **judge(x, labels), **tools.cost(made.get((way, n)))}
        for suffix, other in (("rmse", fine), ("to_plain", ends.get((PLAIN, n)))):
            if other is not None:
                row |= {suffix: rms(x - other), f"feature_{suffix}": rms(judge.net(x) - judge.net(other))}
        out.append(row)
    return out


def criteria(rows: list[Row]) -> Row:
    """The published student's Fréchet distance over teacher-DDIM's, expected at most 1.05, and teacher-DDIM's
    over displacement's, expected at least 1.5."""
    by = {(r["way"], r["steps"]): r["frechet"] for r in rows}
    gains = {str(n): by[PLAIN, n] / by[DISPLACED, n] for n in SUBSTEPS}
    return {"published_over_plain": by[PUBLISHED, 16] / by[PLAIN, 16], "gains": gains}


def tables(records: dict[str, Record]) -> dict[str, str]:
    """One row per sampler, and the criteria."""
    data, rows = records[NAME].data, []
    for r in data["rows"]:
        row = [SHORT["fine"] if r["way"] == "fine" else r["way"], r["steps"] or None, f"{r['frechet']:.3f}"]
        row += [f"{r['kernel']:.2g}", f"{r['score']:.2f}", f"{r['right']:.1%}"]
        row += [f"{r[k]:.2g}" if r.get(k) else None for k in ("rmse", "to_plain", "feature_to_plain")]
        spent = r.get("evaluations")
        rows.append(row + ([f"{spent / 1e3:.3g}", f"{r['seconds']:.0f}"] if spent else [None, None]))
    head = ["sampler", "steps", "Fréchet", "kernel", "class score", "right class", "RMSE to ODE", "to DDIM",
            "of features", "trained, thousands", "CPU s"]  # fmt: skip
    gains = ", ".join(f"{v:.2f} at {n} steps" for n, v in data["gains"].items())
    note = f"Fréchet distance of the published student over teacher-DDIM's {data['published_over_plain']:.3f}"
    note += f"; of teacher-DDIM over one fold's of displacement: {gains}."
    for r in data["folds"]:
        note += (
            f" At {r['steps']} steps one fold takes {r['evaluations']:.2f} of halving's evaluations and "
            f"{r['seconds']:.2f} of its CPU seconds, at {r['frechet, over halving']:.2f} of its distance."
        )
    return {NAME: f"{table(head, rows)}\n\n{note}"}


def draw(records: dict[str, Record], folder: Path) -> None:
    """Fréchet distance against steps and training cost; digits of the same noise, and of an arc of noise."""
    figure, (left, right) = canvas(9.0, 4.2, ncols=2, sharey=True)
    rows = [r | {"evaluations": r.get("evaluations", 0)} for r in records[NAME].data["rows"]]
    tools.draw_ways(left, right, rows, "frechet")
    for way, style, words in (("fine", "--", "fine ODE"), ("test digits", ":", "test digits")):
        value = next(r["frechet"] for r in rows if r["way"] == way)
        left.axhline(value, color="0.3", ls=style, lw=1, label=words)
    left.set_ylabel("Fréchet distance to the training set")
    ticks(left, (4, 8, 16))
    right.set_xlabel("images through networks in training; labels: steps")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    write(figure, folder / f"{NAME}.svg")
    images_figure(records[NAME], folder / f"{NAME}.png")
    images_figure(records[NAME], folder / f"{NAME}-arc.png", "arc")


EXPERIMENT = Experiment(
    NAME, __doc__, 120, BUDGETS, measure, tables, draw,
    figures=(f"{NAME}.svg", f"{NAME}.png", f"{NAME}-arc.png"),
    needs="diffusers, and MNIST in the folder that FEWSTEP_DATA names",
)  # fmt: skip

if __name__ == "__main__":
    EXPERIMENT.main()
