"""What the studies of SFDDM share: ways to train a student, their cost, and halving to set them against."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep import _serialization
from fewstep.learned.sfddm.process import subsequence
from fewstep.learned.training import CHECKPOINT
from fewstep_analysis.figures import colour

PLAIN = "teacher, DDIM on phi"
PUBLISHED = "published loss, random weights"
COPIED = "published loss, teacher's weights"
DISPLACED = "displacement, one fold"
HALVED = "displacement, halving"
# Each with the loss that is the better for it: "end" leaves the smallest of many levels to drift, and the
# first folds of halving have many.
OPTIONS: dict[str, dict[str, Any]] = {
    PUBLISHED: {"start": "random", "loss": "l1"},
    COPIED: {"start": "teacher", "loss": "l1"},
    DISPLACED: {"target": "displacement", "loss": "end"},
    HALVED: {"target": "displacement", "loss": "mse", "substeps": 2},
}
SHADES = {PLAIN: "DDIM", PUBLISHED: "DerivativeFreeMilstein", DISPLACED: "SigStep", HALVED: "ShARK"}
SHORT = {PLAIN: "DDIM", PUBLISHED: "published", DISPLACED: "one fold", HALVED: "halving"}


@dataclass(frozen=True)
class Trained:
    """A student and what its training cost.

    Attributes:
        evaluations: samples that went forward through a network, student's and teacher's, in training.
        seconds: of CPU time, with the distances that the report asks for; of a training that was stopped and
            went on, those of its last part times all iterations over that part's.
        losses: averaged over tenths of the run.
    """

    student: fs.SFDDM
    evaluations: int
    seconds: float
    losses: list[float]


def distil(
    way: str, teacher: nn.Module, table: fs.DiscreteVP, steps: int, folder: Path, *, iterations: int,
    batch: int, **options: Any,
) -> Trained:  # fmt: skip
    """A student of so many steps, or the one that lies finished in the folder.

    Args:
        way: of `OPTIONS`.
        table: the teacher's levels; where the teacher is a student, its process.
        folder: holds checkpoint, student and costs; a call that was stopped goes on from there.
        options: of `fewstep.distill_sfddm`; `substeps` counts in the cost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, facts = folder / "student.safetensors", folder / "training.json"
    asked = OPTIONS[way] | {"iterations": iterations, "batch": batch} | options
    if not facts.exists():
        left = iterations - _done(folder / f"sfddm-{steps}.training")
        began = time.process_time()
        student, report = fs.distill_sfddm(
            teacher=teacher, schedule=table, steps=steps, folder=folder, progress=True, **asked
        )
        seconds = (time.process_time() - began) * iterations / max(left, 1)
        student.save(file)
        passes = 1 + (int(asked["substeps"]) if "target" in asked else 1)
        body = {"evaluations": iterations * batch * passes, "seconds": seconds, "losses": report.losses}
        with _serialization.atomic_write(facts) as part:  # last: where it is, all is done
            part.write_text(json.dumps(body))
    loaded = fs.load(file)
    assert isinstance(loaded, fs.SFDDM)
    return Trained(loaded, **json.loads(facts.read_text()))


def _done(checkpoint: Path) -> int:
    """Iterations that lie in a checkpoint, 0 without one."""
    return len(_serialization.read(checkpoint, (CHECKPOINT,))[1]["history"]) if checkpoint.exists() else 0


def halvings(
    teacher: nn.Module, table: fs.DiscreteVP, first: int, last: int, folder: Path, **options: Any
) -> Iterator[tuple[int, Trained]]:
    """Students of first/2, first/4, ... last steps, each taught two steps of the one before.

    The cost of each is that of all folds up to it (arXiv 2202.00512, with DDIM in its levels' own spacing).

    Args:
        first: the steps of the teacher that the first student is to do in half as many.
    """
    spent, steps = (0, 0.0), first // 2
    while steps >= last:
        made = distil(HALVED, teacher, table, steps, folder / f"halving-{steps}", **options)
        spent = spent[0] + made.evaluations, spent[1] + made.seconds
        yield steps, Trained(made.student, *spent, made.losses)
        teacher, table, steps = made.student.network, made.student.process, steps // 2


def on_phi(teacher: nn.Module, table: fs.DiscreteVP, steps: int) -> fs.SFDDM:
    """The teacher itself on a student's levels: what the published loss leads to."""
    return fs.SFDDM(teacher, fs.StudentProcess(table, subsequence(table, steps)))


def cost(made: Trained | None) -> dict[str, float]:
    """What training took; nought for what was not trained."""
    return {k: getattr(made, k) if made else 0 for k in ("evaluations", "seconds")}


def rms(gap: Tensor) -> float:
    """Root mean square over all elements."""
    return float(gap.double().square().mean().sqrt())


def slerp(a: Tensor, b: Tensor, count: int) -> Tensor:
    """(count, *event): noises on the arc from a to b (each of shape event), even in the angle."""
    unit = (a / a.norm()).flatten() @ (b / b.norm()).flatten()
    angle, shares = unit.clamp(-1, 1).acos(), torch.linspace(0, 1, count).reshape(-1, *[1] * a.dim())
    return (((1 - shares) * angle).sin() * a + (shares * angle).sin() * b) / angle.sin()


def packed(x: Tensor) -> dict[str, Any]:
    """Images in [-1, 1] as bytes that a record can hold: (n, 1, h, w)."""
    small = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return {"shape": list(x.shape), "bytes": base64.b64encode(small.numpy().tobytes()).decode()}


def unpacked(body: dict[str, Any]) -> Tensor:
    """The images of `packed`, to 1/255 of their range."""
    raw = bytearray(base64.b64decode(body["bytes"]))
    return torch.frombuffer(raw, dtype=torch.uint8).reshape(body["shape"]).float() / 127.5 - 1


def folds(rows: list[dict[str, Any]], measure: str, among: str | None = None) -> list[dict[str, Any]]:
    """One fold against halving, at each number of steps that both were trained for.

    Args:
        measure: the column that is to be small.
        among: another, of the same kind.

    Returns:
        steps, shares of halving's evaluations and seconds, and for each column one fold's over halving's
        and teacher-DDIM's over one fold's.
    """
    by = {(r["way"], r["steps"]): r for r in rows}
    out = []
    for steps in sorted({r["steps"] for r in rows if r["way"] == HALVED}):
        if (DISPLACED, steps) in by:
            one, many, plain = (by[way, steps] for way in (DISPLACED, HALVED, PLAIN))
            row = {"steps": steps, **{k: one[k] / many[k] for k in ("evaluations", "seconds")}}
            for name in filter(None, (measure, among)):
                row |= {f"{name}, over halving": one[name] / many[name],
                        f"{name}, gain on DDIM": plain[name] / one[name]}  # fmt: skip
            out.append(row)
    return out


def curve(axes: Any, rows: list[dict[str, Any]], x: str, y: str) -> None:
    """A line for each way through its rows, by number of steps."""
    for way, shade in SHADES.items():
        points = sorted((r["steps"], r[x], r[y]) for r in rows if r["way"] == way and r[x])
        if points:
            axes.loglog([p[1] for p in points], [p[2] for p in points], "-", color=colour(shade), marker="o",
                        ms=4, lw=1.4, label=way)  # fmt: skip
