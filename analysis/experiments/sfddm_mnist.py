"""SFDDM on MNIST, a class-conditional U-Net: the published loss, and one fold of displacement beside halving.

`train` makes one student; `run` makes those that are missing, and then measures. Both go on where they were
stopped.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
import sfddm_tools as tools
from fewstep.errors import one_of
from fewstep.learned.unet_denoiser import UNetDenoiser
from fewstep_analysis import datasets, mnist_teacher
from fewstep_analysis.figures import canvas, image_rows, write
from fewstep_analysis.mnist_judge import Judge
from fewstep_analysis.records import Record
from sfddm_tools import DISPLACED, HALVED, PLAIN, PUBLISHED, SHADES, SHORT, Trained, distil, rms

TAKES = "2 h"
Key = tuple[str, int]  # way and number of steps
# halving begins at 64 steps, where teacher-DDIM is as good as its fine ODE, which is to halving's favour
TRAININGS: dict[str, Key] = {
    "displacement-8": (DISPLACED, 8), "displacement-4": (DISPLACED, 4), "halving-32": (HALVED, 32),
    "halving-16": (HALVED, 16), "halving-8": (HALVED, 8), "published-16": (PUBLISHED, 16),
}  # fmt: skip
SUBSTEPS = {8: 6, 4: 8}  # of displacement, 48 and 32 steps of the teacher in all
# images judged by; steps of the fine ODE; batch; (iterations, rate) of the published loss, of displacement
Budget = tuple[int, int, int, tuple[int, float], tuple[int, float]]
BUDGETS: dict[str, Budget] = {
    "paper": (2000, 40, 32, (2000, 1e-3), (800, 3e-4)), "smoke": (20, 3, 2, (1, 1e-3), (1, 3e-4)),
}  # fmt: skip
ARC, ARC_CLASS = 10, 3  # noises between two, and the digit they are made into


def teacher() -> UNetDenoiser:
    """The shipped U-Net as a module `(x, sigma, labels=) -> x0`."""
    return UNetDenoiser.of(mnist_teacher.network(), mnist_teacher.schedule())


def train(
    name: str, out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu",
    data: Path | None = None,
) -> Trained:  # fmt: skip
    """One student, or the finished one; a fold of halving trains those before it where they are missing.

    Args:
        name: of `TRAININGS`.
        out: as for `run`; checkpoints, written every 100 iterations, and students lie in `out`/work.
        data: folder of MNIST; by default FEWSTEP_DATA.

    Raises:
        InputError: an unknown name, no MNIST, a checkpoint of another budget or seed.
    """
    if name not in TRAININGS:
        raise one_of("name", name, TRAININGS)
    way, steps = TRAININGS[name]
    _, _, batch, published, displaced = BUDGETS[budget]
    network, table = teacher(), mnist_teacher.schedule()
    if way == HALVED and steps < 32:
        before = train(f"halving-{2 * steps}", out, budget=budget, seed=seed, device=device, data=data)
        network, table = before.student.network, before.student.process  # type: ignore[assignment]
    digits, classes, _, _ = datasets.mnist(data)
    if budget == "smoke":  # the report's distances are of as many samples as there are data, 64 at most
        digits, classes = digits[:8], classes[:8]
    iterations, rate = published if way == PUBLISHED else displaced
    extra = {"substeps": SUBSTEPS[steps]} if way == DISPLACED else {}
    return distil(
        way, network, table, steps, work(out, budget, seed) / name, iterations=iterations, batch=batch,
        rate=rate, data=digits, labels=classes, seed=seed, device=device, autocast=True, every=100, **extra,
    )  # fmt: skip


def work(out: Path, budget: str, seed: int) -> Path:
    """Where students and checkpoints lie."""
    return out / "work" / f"sfddm-mnist-{budget}-{seed}"


def study(
    out: Path, budget: str, seed: int, device: torch.device | str, data: Path | None = None
) -> Record:  # fmt: skip
    """Train what is missing, sample all from the same noise with the same classes, and measure."""
    many, steps, batch, published, displaced = BUDGETS[budget]
    made = _made(out, budget, seed, device, data)
    net, table, labels = teacher().to(device), mnist_teacher.schedule(), torch.arange(many) % 10
    noise = torch.randn(many, 1, 28, 28, generator=torch.Generator().manual_seed(seed + 1000))
    whole = fs.SFDDM(net, fs.StudentProcess(table, torch.arange(len(table.log_sigmas))))
    draw_ = partial(_sample, noise=noise, labels=labels, device=device)
    ends = {("fine", 0): draw_(whole, fs.UniPC(3), steps=steps)}
    for n in (16, 8, 4):
        ends[PLAIN, n] = draw_(tools.on_phi(net, table, n))
        ends |= {key: draw_(t.student) for key, t in made.items() if key[1] == n}
    body: dict[str, Any] = {
        "images": many, "fine_steps": steps, "batch": batch, "published": published, "displaced": displaced,
        "substeps": {str(n): s for n, s in SUBSTEPS.items()}, "halving_from": 64,
        "losses": {f"{way}, {n}": t.losses for (way, n), t in made.items()},
    }  # fmt: skip
    body["rows"] = rows(ends, made, labels, seed, data)
    body |= criteria(body["rows"]) | {"folds": tools.folds(body["rows"], "frechet", "rmse")}
    which, arc = torch.arange(10), tools.slerp(noise[0], noise[1], ARC)
    body["pictures"] = {_label(key): tools.packed(x[which]) for key, x in ends.items()}
    along = partial(_sample, noise=arc, labels=torch.full((ARC,), ARC_CLASS), device=device)
    body["arc"] = {_label(("fine", 0)): tools.packed(along(whole, fs.UniPC(3), steps=steps))}
    body["arc"] |= {_label(k): tools.packed(along(t.student)) for k, t in made.items() if k[1] <= 16}
    return Record("sfddm-mnist", body, seed)


def _made(out: Path, budget: str, seed: int, device: Any, data: Path | None) -> dict[Key, Trained]:
    """All students by way and number of steps; of halving the cost is that of all folds so far."""
    made: dict[Key, Trained] = {}
    for name, key in TRAININGS.items():
        t = train(name, out, budget=budget, seed=seed, device=device, data=data)
        before = made.get((HALVED, 2 * key[1])) if key[0] == HALVED else None
        if before is not None:
            t = Trained(t.student, t.evaluations + before.evaluations, t.seconds + before.seconds, t.losses)
        made[key] = t
    return made


def _label(key: Key) -> str:
    return "fine ODE" if key[0] == "fine" else f"{SHORT[key[0]]}, {key[1]}"


@torch.no_grad()
def _sample(
    student: fs.SFDDM, solver: Any = None, *, noise: Tensor, labels: Tensor, device: Any, **options: Any
) -> Tensor:
    """The student's own steps, or a solver's on its model."""
    parts = []
    for x, y in zip(noise.split(250), labels.split(250), strict=True):
        mine = student.at(y.to(device))
        parts.append(fs.sample(mine.problem(), solver or mine, noise=x.to(device), **options).cpu())
    return torch.cat(parts)


def rows(
    ends: dict[Key, Tensor], made: dict[Key, Trained], labels: Tensor, seed: int,
    data: Path | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Distances to the training set, and to the fine ODE and teacher-DDIM from the same noise."""
    judge = Judge.of(data)
    test: dict[str, Any] = {"way": "test digits", "steps": 0}
    out = [test | judge(judge.digits(labels, seed), labels)]
    for (way, n), x in ends.items():
        plain, fine = ends.get((PLAIN, n)), ends["fine", 0]
        found = {"way": way, "steps": n, **judge(x, labels), **tools.cost(made.get((way, n)))}
        found |= {"rmse": rms(x - fine), "feature_rmse": _feature_rms(judge, x, fine)}
        if plain is not None:
            found |= {"to_plain": rms(x - plain), "feature_to_plain": _feature_rms(judge, x, plain)}
        out.append(found)
    return out


@torch.no_grad()
def _feature_rms(judge: Judge, a: Tensor, b: Tensor) -> float:
    return rms(judge.net(a) - judge.net(b))


def criteria(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The published student's Fréchet distance over teacher-DDIM's, expected at most 1.05, and teacher-DDIM's
    over displacement's, expected at least 1.5."""
    by = {(r["way"], r["steps"]): r["frechet"] for r in found}
    gains = {str(n): by[PLAIN, n] / by[DISPLACED, n] for n in SUBSTEPS}
    return {"published_over_plain": by[PUBLISHED, 16] / by[PLAIN, 16], "gains": gains}


def draw(record: Record, path: str | Path) -> Path:
    """Fréchet distance against steps, and against what training cost."""
    figure, (left, right) = canvas(9.0, 4.2, ncols=2, sharey=True)
    found = record.data["rows"]
    tools.curve(left, found, "steps", "frechet")
    tools.curve(right, found, "evaluations", "frechet")
    for r in found:
        if r["way"] in SHADES and r["evaluations"]:
            right.annotate(str(r["steps"]), (r["evaluations"], r["frechet"]), xytext=(4, 4),
                           textcoords="offset points", fontsize=7.5, color="0.3")  # fmt: skip
    for way, style in (("fine", "--"), ("test digits", ":")):
        value = next(r["frechet"] for r in found if r["way"] == way)
        left.axhline(value, color="0.3", ls=style, lw=1, label="fine ODE" if way == "fine" else way)
    left.set_xlabel("steps = network evaluations in sampling")
    left.set_ylabel("Fréchet distance to the training set")
    left.set_xticks([4, 8, 16], ["4", "8", "16"])
    left.set_xticks([], minor=True)
    right.set_xlabel("images through networks in training; steps beside")
    for axes in (left, right):
        axes.grid(True, which="major", alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    return write(figure, path)


def markdown(record: Record) -> str:
    """The table: a row for each sampler."""
    data = record.data
    lines = ["| sampler | steps | Fréchet | kernel | class score | right class | RMSE to ODE | to DDIM "
             "| of features | trained, thousands | CPU s |", "| --- " * 11 + "|"]  # fmt: skip
    for r in data["rows"]:
        cells = ["fine ODE" if r["way"] == "fine" else r["way"], r["steps"] or "-", f"{r['frechet']:.3f}"]
        cells += [f"{r['kernel']:.2g}", f"{r['score']:.2f}", f"{r['right']:.1%}"]
        cells += [f"{r[k]:.2g}" if r.get(k) else "-" for k in ("rmse", "to_plain", "feature_to_plain")]
        cost = r.get("evaluations")
        cells += [f"{cost / 1e3:.3g}", f"{r['seconds']:.0f}"] if cost else ["-", "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    gains = ", ".join(f"{v:.2f} at {n} steps" for n, v in data["gains"].items())
    said = f"Fréchet distance of the published student over teacher-DDIM's {data['published_over_plain']:.3f}"
    said += f"; of teacher-DDIM over one fold's of displacement: {gains}."
    for r in data["folds"]:
        said += (
            f" At {r['steps']} steps one fold takes {r['evaluations']:.2f} of halving's evaluations and "
            f"{r['seconds']:.2f} of its CPU seconds, at {r['frechet, over halving']:.2f} of its distance."
        )
    return "\n".join([*lines, "", said])


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record, the figure and the pictures; returns the table. Needs MNIST (FEWSTEP_DATA)."""
    record = study(out, budget, seed, device)
    record.save(out / "records" / "sfddm-mnist.json")
    draw(record, out / "figures" / "sfddm-mnist.svg")
    for name, key in (("sfddm-mnist", "pictures"), ("sfddm-mnist-arc", "arc")):
        shown = {k: tools.unpacked(v) for k, v in record.data[key].items()}
        image_rows(shown, out / "figures" / f"{name}.png")
    return markdown(record).splitlines()


if __name__ == "__main__":
    import sys

    for _asked in sys.argv[1:] or TRAININGS:  # one after another
        train(_asked, Path("docs"))
