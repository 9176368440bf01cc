"""SFDDM on 8x8 digits: what the published loss reaches, and one fold of displacement compared with halving.

Finished students stay in the work folder; the same command resumes. They are small: the CPU is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fewstep as fs
import sfddm_training as tools
from base import F64, Experiment, Job, Record, Row, canvas, images_figure, packed, rms, table, ticks, write
from fewstep import TrainingOptions
from fewstep.distances import sliced_w2
from fewstep_analysis import datasets, teachers
from sfddm_training import COPIED, DISPLACED, HALVED, PLAIN, PUBLISHED, SHORT, Trained, distil, short

NAME = "sfddm-digits"
LABELS = 1024  # of the teacher's table
COPIED_AT = 16  # the number of steps at which the teacher's weights are shown to stay as they are
SHOWN, COLUMNS = 4, 12  # steps and number of the digits in the picture


@dataclass(frozen=True)
class Budget:
    """What a run computes.

    Attributes:
        counts: steps of the students.
        samples: to judge by.
        halve_from: steps of the teacher where halving starts.
        published, displaced, halved: trainings with the published loss, with displacement in one fold, and of
            each fold of halving.
        data: training images at most; the distances of a report are of as many samples, 64 at most.
    """

    counts: tuple[int, ...]
    samples: int
    halve_from: int
    published: TrainingOptions
    displaced: TrainingOptions
    halved: TrainingOptions
    data: int | None = None


BUDGETS = {
    "smoke": Budget(
        (16, 4), 64, 64, TrainingOptions(3, 16, 2e-3), TrainingOptions(2, 16, 1e-3),
        TrainingOptions(2, 16, 1e-3), data=8,
    ),
    "paper": Budget(
        (128, 64, 16, 8, 4), 1000, LABELS, TrainingOptions(2500, 128, 2e-3), TrainingOptions(1400, 128, 1e-3),
        TrainingOptions(1000, 128, 1e-3),
    ),
}  # fmt: skip


def schedule() -> fs.DiscreteVP:
    """1024 levels, even in log sigma over the teacher's range, as a variance-preserving table."""
    low, high = (math.log10(s) for s in (teachers.DIGITS.sigma_min, teachers.DIGITS.sigma_max))
    return fs.DiscreteVP(1 / (1 + torch.logspace(low, high, LABELS, dtype=F64).square()))


def substeps(steps: int) -> int:
    """Of the teacher in one step of the student: 64 or more in all, at least 4 in one."""
    return max(4, -(-64 // steps))


def train(budget: Budget, job: Job) -> dict[tuple[str, int], Trained]:
    """All students by way and number of steps; finished ones of the work folder are not trained again."""
    teacher, levels = teachers.digits().denoiser, schedule()
    assert isinstance(teacher, nn.Module)
    common = {"data": datasets.digits()[0][: budget.data], "seed": job.seed}
    made = {}
    for steps in budget.counts:
        made[DISPLACED, steps] = distil(
            DISPLACED, teacher, levels, steps, job.work / f"displacement-{steps}", budget.displaced,
            substeps=substeps(steps), **common,
        )  # fmt: skip
        made[PUBLISHED, steps] = distil(
            PUBLISHED, teacher, levels, steps, job.work / f"published-{steps}", budget.published, **common
        )
    few = replace(budget.published, iterations=20)
    made[COPIED, COPIED_AT] = distil(COPIED, teacher, levels, COPIED_AT, job.work / "copied", few, **common)
    first, last = budget.halve_from, budget.counts[-1]
    halved = tools.halvings(teacher, levels, first, last, job.work, budget.halved, **common)
    return made | {(HALVED, n): t for n, t in halved}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Train or find the students, sample all from the same noise, and measure."""
    made, levels, denoiser = train(budget, job), schedule(), teachers.digits().denoiser
    assert isinstance(denoiser, nn.Module)
    real, held_out = datasets.digits()
    noise = torch.randn(budget.samples, 1, 8, 8, generator=torch.Generator().manual_seed(job.seed + 1000))
    exact = fs.DiffusionModel(denoiser, levels)
    fine = fs.sample(exact, fs.DPMSolverPP(2), noise=noise, steps=200)
    check = fs.sample(exact, fs.UniPC(3), noise=noise, steps=100)
    judge = partial(judge_samples, fine=fine, held_out=held_out)
    rows, ends = [], {}
    for steps in sorted({n for _, n in made}, reverse=True):
        plain = ends[PLAIN, steps] = sample(tools.on_phi(denoiser, levels, steps), noise)
        rows.append(judge(PLAIN, steps, plain, None))
        for (way, n), t in made.items():
            if n == steps:
                ends[way, n] = sample(t.student, noise)
                rows.append(judge(way, n, ends[way, n], t) | {"to_plain": rms(ends[way, n] - plain)})
    images = {f"{SHORT[way]}, {n}": x[:COLUMNS] for (way, n), x in ends.items() if n == SHOWN}
    data = {
        "labels": LABELS, "counts": list(budget.counts), "samples": budget.samples,
        "batch": budget.halved.batch_size,
        **{k: short(getattr(budget, k)) for k in ("published", "displaced")}, "fold": short(budget.halved),
        "substeps": {str(n): substeps(n) for n in budget.counts},
        "floor": distance(real[: len(real) // 500 * 500], held_out), "fine": distance(fine, held_out),
        "fine_against_UniPC(3)": rms(fine - check), "apart": rms(fine - fine.roll(1, 0)), "rows": rows,
        "copied_loss": max(made[COPIED, COPIED_AT].losses),
        "folds": tools.compare_folds(rows, "rmse", "sliced_w2"),
        "pictures": packed({"teacher, 200 steps": fine[:COLUMNS]} | images),
    }  # fmt: skip
    return {NAME: Record(NAME, data, job.seed)}


@torch.no_grad()
def sample(student: fs.SFDDM, noise: Tensor) -> Tensor:
    return fs.sample(student.problem(), student, noise=noise)


def judge_samples(way: str, steps: int, x: Tensor, t: Trained | None, *, fine: Tensor, held_out: Tensor) -> Row:
    """Distances of one sampler, and what its training cost."""
    return {
        "way": way, "steps": steps, "sliced_w2": distance(x, held_out), "rmse": rms(x - fine),
        "same_class": agreement(x, fine), **tools.cost(t),
    }  # fmt: skip


def distance(images: Tensor, held_out: Tensor) -> float:
    """Mean sliced W2 of batches of 500 to the 500 held-out digits: equal numbers on both sides."""
    parts = images.split(len(held_out))
    return sum(sliced_w2(part, held_out) for part in parts) / len(parts)


def agreement(a: Tensor, b: Tensor) -> float:
    """The share of pairs of samples whose nearest real digits have the same class."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(v) for v in load_digits(return_X_y=True))
    real = images.float().div(8).sub(1)
    x, y = (labels[torch.cdist(v.flatten(1), real).argmin(1)] for v in (a, b))
    return float((x == y).double().mean())


def tables(records: dict[str, Record]) -> dict[str, str]:
    """One row per number of steps and way; then one fold relative to halving."""
    data = records[NAME].data
    head = ["steps", "way", "sliced W2 to held-out digits", "RMSE to the fine ODE", "RMSE to DDIM on phi",
            "same class", "training: evaluations, millions", "CPU seconds"]  # fmt: skip
    rows = [
        [r["steps"], r["way"], f"{r['sliced_w2']:.3f}", f"{r['rmse']:.3g}",
         f"{r['to_plain']:.3g}" if "to_plain" in r else None, f"{r['same_class']:.1%}",
         *([f"{r['evaluations'] / 1e6:.3g}", f"{r['seconds']:.3g}"] if r["evaluations"] else [None, None])]
        for r in data["rows"] if r["steps"] in data["counts"]
    ]  # fmt: skip
    note = f"Sliced W2 to held-out digits: training digits {data['floor']:.3f}, fine ODE {data['fine']:.3f}."
    columns = {
        "one fold's evaluations over halving's": "evaluations", "CPU seconds": "seconds",
        "RMSE": "rmse, over halving", "sliced W2": "sliced_w2, over halving",
        "RMSE of teacher-DDIM over one fold's": "rmse, gain on DDIM",
    }  # fmt: skip
    folds = [[r["steps"], *(f"{r[k]:.2f}" for k in columns.values())] for r in reversed(data["folds"])]
    return {NAME: f"{table(head, rows)}\n\n{note}\n\n{table(['steps', *columns], folds)}"}


def draw(records: dict[str, Record], folder: Path) -> None:
    """Distance to the fine ODE, and digits of the same noise."""
    figure, (left, right) = canvas(9.0, 4.2, ncols=2, sharey=True)
    data = records[NAME].data
    tools.draw_ways(left, right, [r for r in data["rows"] if r["steps"] in data["counts"]], "rmse")
    left.set_ylabel("RMSE to the teacher's fine ODE, same noise")
    ticks(left, data["counts"])
    right.set_xlabel("samples through networks in training; labels: steps")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
    write(figure, folder / f"{NAME}.svg")
    images_figure(records[NAME], folder / f"{NAME}.png")


EXPERIMENT = Experiment(
    NAME, __doc__, 15, BUDGETS, measure, tables, draw, figures=(f"{NAME}.svg", f"{NAME}.png"),
    needs="scikit-learn",
)  # fmt: skip

if __name__ == "__main__":
    EXPERIMENT.main()
