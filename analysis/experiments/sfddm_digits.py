"""SFDDM on 8x8 digits: what the published loss reaches, and one fold of displacement against halving."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewstep as fs
import sfddm_tools as tools
from fewstep.distances import sliced_w2
from fewstep_analysis import datasets, teachers
from fewstep_analysis.figures import canvas, image_rows, write
from fewstep_analysis.records import Record
from sfddm_tools import COPIED, DISPLACED, HALVED, PLAIN, PUBLISHED, SHADES, SHORT, Trained, distil, rms

TAKES = "15 min"
Row = dict[str, Any]
LABELS = 1024  # of the teacher's table
COPIED_AT = 16  # the number of steps at which the teacher's weights are shown to stay
SHOWN, COLUMNS = 4, 12  # steps and number of the digits in the picture
Training = tuple[int, float]  # iterations, rate
# steps; samples judged by; batch; of the published loss, of displacement in one fold, of a fold of halving
BUDGETS: dict[str, tuple[tuple[int, ...], int, int, Training, Training, Training]] = {
    "paper": ((128, 64, 16, 8, 4), 1000, 128, (2500, 2e-3), (1400, 1e-3), (1000, 1e-3)),
    "smoke": ((16, 4), 64, 16, (3, 2e-3), (2, 1e-3), (2, 1e-3)),
}


def table() -> fs.DiscreteVP:
    """1024 levels, even in log sigma over the teacher's range, as a variance-preserving table."""
    low, high = (math.log10(s) for s in (teachers.DIGITS.sigma_min, teachers.DIGITS.sigma_max))
    sigmas = torch.logspace(low, high, LABELS, dtype=torch.float64)
    return fs.DiscreteVP(1 / (1 + sigmas.square()))


def substeps(steps: int) -> int:
    """Of the teacher in one of the student's: 64 or more in all, at least 4 in one."""
    return max(4, -(-64 // steps))


def train(budget: str, seed: int, work: Path) -> dict[tuple[str, int], Trained]:
    """All students by way and number of steps; what lies finished in `work` is not trained again."""
    counts, _, batch, *trainings = BUDGETS[budget]
    teacher, levels = teachers.digits().denoiser, table()
    assert isinstance(teacher, nn.Module)
    data = datasets.digits()[0]
    # the report's distances are of as many samples as there are data, 64 at most
    common: dict[str, Any] = {"data": data if budget == "paper" else data[:8], "batch": batch, "seed": seed}
    slow, fast, fold = ({"iterations": n, "rate": r, **common} for n, r in trainings)
    make = partial(distil, teacher=teacher, table=levels)
    made = {}
    for steps in counts:
        made[DISPLACED, steps] = make(
            DISPLACED, steps=steps, folder=work / f"displacement-{steps}", substeps=substeps(steps), **fast
        )
        made[PUBLISHED, steps] = make(PUBLISHED, steps=steps, folder=work / f"published-{steps}", **slow)
    few = slow | {"iterations": 20}
    made[COPIED, COPIED_AT] = make(COPIED, steps=COPIED_AT, folder=work / "copied", **few)
    first = LABELS if budget == "paper" else 4 * counts[0]
    made |= {(HALVED, n): t for n, t in tools.halvings(teacher, levels, first, counts[-1], work, **fold)}
    return made


def study(budget: str, seed: int, work: Path) -> Record:
    """Train or find the students, sample all from the same noise, and measure."""
    counts, many, batch, published, displaced, fold = BUDGETS[budget]
    made, levels, problem = train(budget, seed, work), table(), teachers.digits()
    assert isinstance(problem.denoiser, nn.Module)
    real, held_out = datasets.digits()
    noise = torch.randn(many, 1, 8, 8, generator=torch.Generator().manual_seed(seed + 1000))
    exact = fs.DiffusionModel(problem.denoiser, levels)
    fine = fs.sample(exact, fs.DPMSolverPP(2), noise=noise, steps=200)
    check = fs.sample(exact, fs.UniPC(3), noise=noise, steps=100)
    judge = partial(_row, fine=fine, held_out=held_out)
    rows, ends = [], {}
    for steps in sorted({n for _, n in made}, reverse=True):
        plain = tools.on_phi(problem.denoiser, levels, steps)
        ends[PLAIN, steps] = _sample(plain, noise)
        rows.append(judge(PLAIN, steps, ends[PLAIN, steps], None))
        for (way, n), t in made.items():
            if n == steps:
                ends[way, n] = _sample(t.student, noise)
                rows.append(judge(way, n, ends[way, n], t) | {"to_plain": rms(ends[way, n] - ends[PLAIN, n])})
    shown = {"teacher, 200 steps": fine} | {f"{SHORT[w]}, {n}": x for (w, n), x in ends.items() if n == SHOWN}
    body = {
        "labels": LABELS, "counts": list(counts), "samples": many, "batch": batch,
        "published": published, "displaced": displaced, "fold": fold,
        "substeps": {str(n): substeps(n) for n in counts},
        "floor": _distance(real[: len(real) // 500 * 500], held_out), "fine": _distance(fine, held_out),
        "fine_against_UniPC(3)": rms(fine - check), "apart": rms(fine - fine.roll(1, 0)), "rows": rows,
        "copied_loss": max(made[COPIED, COPIED_AT].losses), "folds": tools.folds(rows, "rmse", "sliced_w2"),
        "pictures": {k: tools.packed(x[:COLUMNS]) for k, x in shown.items()},
    }  # fmt: skip
    return Record("sfddm-digits", body, seed)


@torch.no_grad()
def _sample(student: fs.SFDDM, noise: Tensor) -> Tensor:
    return fs.sample(student.problem(), student, noise=noise)


def _row(way: str, steps: int, x: Tensor, t: Trained | None, *, fine: Tensor, held_out: Tensor) -> Row:
    """Distances of one sampler, and what its training cost."""
    return {
        "way": way, "steps": steps, "sliced_w2": _distance(x, held_out), "rmse": rms(x - fine),
        "same_class": _agreement(x, fine), **tools.cost(t),
    }  # fmt: skip


def _distance(images: Tensor, held_out: Tensor) -> float:
    """Mean sliced W2 of batches of 500 to the 500 held-out digits: a like number on either side."""
    parts = images.split(len(held_out))
    return sum(sliced_w2(part, held_out) for part in parts) / len(parts)


def _agreement(a: Tensor, b: Tensor) -> float:
    """The share of samples of the same number whose nearest real digits are of the same class."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(v) for v in load_digits(return_X_y=True))
    real = images.float().div(8).sub(1)
    x, y = (labels[torch.cdist(v.flatten(1), real).argmin(1)] for v in (a, b))
    return float((x == y).double().mean())


def draw(record: Record, path: str | Path) -> Path:
    """Distance to the fine ODE against steps, and against what training cost."""
    figure, (left, right) = canvas(9.0, 4.2, ncols=2, sharey=True)
    rows, counts = record.data["rows"], record.data["counts"]
    asked = [r for r in rows if r["steps"] in counts]
    tools.curve(left, asked, "steps", "rmse")
    left.set_xlabel("steps = network evaluations in sampling")
    left.set_ylabel("RMSE to the teacher's fine ODE, same noise")
    left.set_xticks(counts, [str(n) for n in counts])
    left.set_xticks([], minor=True)
    tools.curve(right, asked, "evaluations", "rmse")
    for r in asked:
        if r["evaluations"] and r["way"] in SHADES:
            right.annotate(str(r["steps"]), (r["evaluations"], r["rmse"]), xytext=(4, 4),
                           textcoords="offset points", fontsize=7.5, color="0.3")  # fmt: skip
    right.set_xlabel("samples through networks in training; steps beside")
    for axes in (left, right):
        axes.grid(True, which="major", alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
    return write(figure, path)


def pictures(record: Record, path: str | Path) -> Path:
    """Digits of the same noise, a row a sampler."""
    return image_rows({k: tools.unpacked(v) for k, v in record.data["pictures"].items()}, path)


def markdown(record: Record) -> str:
    """The table: a row for each number of steps and way."""
    data = record.data
    lines = ["| steps | way | sliced W2 to held-out digits | RMSE to the fine ODE | RMSE to DDIM on phi | "
             "same class | training: evaluations, millions | CPU seconds |", "| --- " * 8 + "|"]  # fmt: skip
    for r in data["rows"]:
        if r["steps"] in data["counts"]:
            cells = [r["steps"], r["way"], f"{r['sliced_w2']:.3f}", f"{r['rmse']:.3g}"]
            cells += [f"{r['to_plain']:.3g}" if "to_plain" in r else "-", f"{r['same_class']:.1%}"]
            made = r["evaluations"]
            cells += [f"{made / 1e6:.3g}", f"{r['seconds']:.3g}"] if made else ["-", "-"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", f"Sliced W2 of training digits to held-out ones {data['floor']:.3f}, of the fine ODE's "
              f"{data['fine']:.3f}.", "", "| steps | one fold's evaluations over halving's | CPU seconds "
              "| RMSE | sliced W2 | RMSE of teacher-DDIM over one fold's |", "| --- " * 6 + "|"]  # fmt: skip
    for r in reversed(data["folds"]):
        cells = [r["evaluations"], r["seconds"], r["rmse, over halving"], r["sliced_w2, over halving"]]
        cells.append(r["rmse, gain on DDIM"])
        lines.append(f"| {r['steps']} | " + " | ".join(f"{v:.2f}" for v in cells) + " |")
    return "\n".join(lines)


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record, the figure and the pictures; returns the table.

    Students stay in `out`/work; the same command goes on from them. They are small: the CPU is used.
    """
    record = study(budget, seed, out / "work" / f"sfddm-digits-{budget}-{seed}")
    record.save(out / "records" / "sfddm-digits.json")
    draw(record, out / "figures" / "sfddm-digits.svg")
    pictures(record, out / "figures" / "sfddm-digits.png")
    return markdown(record).splitlines()
