"""Shared by the SFDDM experiments: ways of training a student, its cost, and halving as the alternative."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewstep as fs
from base import Row, colour, curve
from fewstep import _serialization
from fewstep.learned.sfddm.process import StudentProcess, subsequence
from fewstep.learned.training import CHECKPOINT

PLAIN = "teacher, DDIM on phi"
PUBLISHED = "published loss, random weights"
COPIED = "published loss, teacher's weights"
DISPLACED = "displacement, one fold"
HALVED = "displacement, halving"
# Each with the loss that suits it better: "end" lets the smallest of many levels drift, and the first folds
# of halving have many.
OPTIONS: dict[str, Row] = {
    PUBLISHED: {"target": "published", "start": "random", "loss": "l1"},
    COPIED: {"target": "published", "start": "teacher", "loss": "l1"},
    DISPLACED: {"target": "displacement", "loss": "end"},
    HALVED: {"target": "displacement", "loss": "mse"},
}
SHADES = {PLAIN: "DDIM", PUBLISHED: "DerivativeFreeMilstein", DISPLACED: "SigStep", HALVED: "ShARK"}
SHORT = {PLAIN: "DDIM", PUBLISHED: "published", DISPLACED: "one fold", HALVED: "halving", "fine": "fine ODE"}


@dataclass(frozen=True)
class Trained:
    """A student and what its training cost.

    Attributes:
        evaluations: samples that went forward through a network, student's and teacher's, in training.
        seconds: of CPU time, including the distances of the report. For a training that was interrupted,
            those of its last part, scaled to all iterations.
        losses: averaged over tenths of the run.
    """

    student: fs.SFDDM
    evaluations: int
    seconds: float
    losses: list[float]


def distil(
    way: str, teacher: nn.Module, schedule: Any, steps: int, folder: Path, training: fs.TrainingOptions,
    substeps: int = 2, **options: Any,
) -> Trained:  # fmt: skip
    """A student of so many steps, or the finished one of the folder.

    Args:
        way: a key of OPTIONS.
        schedule: the teacher's levels; where the teacher is a student, its process.
        folder: holds checkpoint, student and costs; an interrupted call resumes from it.
        substeps: of the teacher per step of the student, for displacement.
        options: of `fewstep.distill_sfddm`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, facts = folder / "student.safetensors", folder / "training.json"
    if not facts.exists():
        iterations = training.iterations or 0
        left = iterations - finished(folder / f"sfddm-{steps}.training")
        start, displaced = time.process_time(), OPTIONS[way]["target"] == "displacement"
        student, report = fs.distill_sfddm(
            teacher=teacher, schedule=schedule, steps=steps, folder=folder, progress=True, training=training,
            teacher_options=fs.TeacherOptions(substeps=substeps if displaced else None), **OPTIONS[way],
            **options,
        )  # fmt: skip
        seconds = (time.process_time() - start) * iterations / max(left, 1)
        student.save(file)
        passes = 1 + (substeps if displaced else 1)
        evaluations = iterations * (training.batch_size or 0) * passes
        body = {"evaluations": evaluations, "seconds": seconds, "losses": report.losses}
        _serialization.write_json(facts, body)  # last: its presence states that all is done
    loaded = fs.load(file)
    assert isinstance(loaded, fs.SFDDM)
    return Trained(loaded, **json.loads(facts.read_text()))


def short(training: fs.TrainingOptions) -> list[Any]:
    """Iterations and learning rate."""
    return [training.iterations, training.learning_rate]


def finished(checkpoint: Path) -> int:
    """Iterations that a checkpoint holds, 0 without one."""
    return len(_serialization.read(checkpoint, (CHECKPOINT,))[1]["history"]) if checkpoint.exists() else 0


def halvings(
    teacher: nn.Module,
    schedule: Any,
    first: int,
    last: int,
    folder: Path,
    training: fs.TrainingOptions,
    **options: Any,
) -> Iterator[tuple[int, Trained]]:
    """Students of first/2, first/4, ... last steps; each learns two steps of the one before as one.

    The cost of each is that of all folds up to it (arXiv 2202.00512, with DDIM on the levels' own spacing).
    """
    spent, steps = (0, 0.0), first // 2
    while steps >= last:
        made = distil(HALVED, teacher, schedule, steps, folder / f"halving-{steps}", training, **options)
        spent = spent[0] + made.evaluations, spent[1] + made.seconds
        yield steps, Trained(made.student, *spent, made.losses)
        teacher, schedule, steps = made.student.network, made.student.process, steps // 2


def on_phi(teacher: nn.Module, schedule: fs.DiscreteVP, steps: int) -> fs.SFDDM:
    """The teacher itself on a student's levels: what the published loss leads to."""
    return fs.SFDDM(teacher, StudentProcess(schedule, subsequence(schedule, steps)))


def cost(made: Trained | None) -> Row:
    """What training took; zero without training."""
    return {k: getattr(made, k) if made else 0 for k in ("evaluations", "seconds")}


def compare_folds(rows: list[Row], *columns: str) -> list[Row]:
    """One fold relative to halving, at each number of steps that both were trained for.

    Returns:
        one row per number of steps: shares of halving's evaluations and seconds, and for each column one
        fold's value over halving's and teacher-DDIM's over one fold's.
    """
    by = {(r["way"], r["steps"]): r for r in rows}
    out = []
    for steps in sorted({r["steps"] for r in rows if r["way"] == HALVED}):
        if (DISPLACED, steps) in by:
            one, many, plain = (by[way, steps] for way in (DISPLACED, HALVED, PLAIN))
            row = {"steps": steps, **{k: one[k] / many[k] for k in ("evaluations", "seconds")}}
            for name in columns:
                row |= {f"{name}, over halving": one[name] / many[name],
                        f"{name}, gain on DDIM": plain[name] / one[name]}  # fmt: skip
            out.append(row)
    return out


def draw_ways(left: Any, right: Any, rows: list[Row], y: str) -> None:
    """A line per way: against steps (left), and against the cost of training, with its steps (right)."""
    for axes, x in ((left, "steps"), (right, "evaluations")):
        for way, shade in SHADES.items():
            mine = sorted((r for r in rows if r["way"] == way and r[x]), key=lambda r: r["steps"])
            curve(
                axes,
                [(r[x], r[y]) for r in mine],
                "-",
                color=colour(shade),
                marker="o",
                ms=4,
                lw=1.4,
                label=way,
            )
        axes.grid(True, which="major", alpha=0.3)
    for r in rows:
        if r["evaluations"] and r["way"] in SHADES:
            right.annotate(str(r["steps"]), (r["evaluations"], r[y]), xytext=(4, 4),
                           textcoords="offset points", fontsize=7.5, color="0.3")  # fmt: skip
    left.set_xlabel("steps = network evaluations in sampling")


def slerp(a: Tensor, b: Tensor, count: int) -> Tensor:
    """(count, *event): noises on the arc from a to b (each of shape event), even in the angle."""
    unit = (a / a.norm()).flatten() @ (b / b.norm()).flatten()
    angle = unit.clamp(-1, 1).acos()
    shares = torch.linspace(0, 1, count).reshape(-1, *[1] * a.dim())
    return (((1 - shares) * angle).sin() * a + (shares * angle).sin() * b) / angle.sin()
