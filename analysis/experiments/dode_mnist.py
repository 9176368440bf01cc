"""D-ODE on the MNIST U-Net: distance to the exact ODE, a FID-type distance to real digits, and pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from dode_problems import PEER_SHADES
from dode_ring import STYLES
from dode_tools import GREEDY, GRID, KINDS, SPACINGS, TERMS, UNTRAINED, Bench, Task, mnist, table
from fewstep_analysis import datasets, images
from fewstep_analysis.figures import canvas, colour, image_rows, write
from fewstep_analysis.memory import PeakMemory
from fewstep_analysis.parallel import progress
from fewstep_analysis.records import Record

TAKES = "18 min"
COUNTS, SHOWN = (5, 8, 10), (5, 8)  # SHOWN: of the pictures and the Fréchet distances
MAIN = "IPNDM(2)"
# even in the model's time from the largest level, and then to 0: no evaluation is spent at the smallest level
SPACING = "trailing"
ANY, COMMON = "best untrained", "best untrained, even grids"  # over all spacings, over SPACINGS alone
GUIDANCE = 3.0
# start states fitted to, judged on, to choose peers by, of a Fréchet distance; iterations; steps of the ODE
SIZES = {"paper": (64, 128, 16, 500, 120, 80), "smoke": (16, 16, 4, 16, 2, 5)}


def ways(base: str, n: int, iterations: int) -> dict[str, dict[str, Any]]:
    """What is fitted to a base at this count; a teacher of 30 to 40 steps."""
    quick: dict[str, Any] = {"teacher": fs.IPNDM(4), "teacher_substeps": {5: 6, 8: 4}.get(n, 3)}
    if base != MAIN:
        return {GREEDY: quick}
    rate = 0.03 if n == 5 else 0.008  # at 8 and 10 a rate of 0.03 helped no more
    grid = {"refine": "global", "learn_grid": True, "iterations": iterations, "rate": rate, "minibatch": 8}
    return {GREEDY: quick, TERMS: quick | {"terms": 3}, GRID: quick | {"terms": 3} | grid}


def study(
    budget: str = "paper", seed: int = 0, data: Path | None = None
) -> tuple[Record, dict[str, Tensor]]:  # fmt: skip
    """Fit and judge, one class a sample; the guided model at one count alone."""
    began = time.process_time()
    fit, test, few, many, iterations, steps = SIZES[budget]
    counts = COUNTS if budget == "paper" else SHOWN[:1]
    task = mnist()
    bench, scout = Bench.of(task, fit, test, seed, steps), Bench.of(task, fit, few, seed + 1, steps)
    check = bench.rmse(bench.sample(fs.IPNDM(4), steps=3 * steps // 4))
    for n in progress(counts, "budget"):
        _peers(bench, scout, n)
        for base in ("DDIM", "DPMSolverPP(2)", MAIN):
            bench.learned(base, n, ways(base, n, iterations), SPACING)
    body: dict[str, Any] = {
        "samples": fit, "held_out": test, "counts": list(counts), "spacing": SPACING, "rows": bench.rows,
        "reference": f"UniPC(3), {steps} steps", "reference_against_IPNDM(4)": check,
        "gains": {kind: gains(bench.rows, kind, counts) for kind in (ANY, COMMON)},
    }  # fmt: skip
    shown = [n for n in SHOWN if n in counts]
    body["frechet"] = frechet(bench, many, seed, shown, data)
    pictures = rows_of(bench, shown)
    body["guided"] = _guided(fit, test // 4, steps // 2, seed)
    body["cost"] = cost(task, fit)
    body["seconds"] = round(time.process_time() - began)
    return Record("dode-mnist", body, seed), pictures


def _peers(bench: Bench, scout: Bench, n: int) -> None:
    """Each family's best over the even grids, and over these and the trailing one."""
    bench.peers(n, spacings=SPACINGS, scout=scout, kind=COMMON)
    bench.peers(n, spacings=(SPACING,), scout=scout, kind=ANY)
    for family in PEER_SHADES:
        even, trailing = (_row(bench, family, kind, n) for kind in (COMMON, ANY))
        if even["rmse"] < trailing["rmse"]:
            trailing |= {k: even[k] for k in ("rmse", "which")}
            bench.made[family, ANY, n] = bench.made[family, COMMON, n]


def _row(bench: Bench, base: str, kind: str, n: int) -> dict[str, Any]:
    return next(r for r in bench.rows if (r["base"], r["kind"], r["budget"]) == (base, kind, n))


def _best(bench: Bench, n: int) -> str:
    """The family of the best untrained solver."""
    return min(PEER_SHADES, key=lambda family: float(_row(bench, family, ANY, n)["rmse"]))


def gains(rows: list[dict[str, Any]], kind: str, counts: tuple[int, ...]) -> dict[str, float]:
    """Per count the best untrained error of that kind over the best learned one."""
    out = {}
    for n in counts:
        learned = min(r["rmse"] for r in rows if r["budget"] == n and r["kind"] in KINDS[1:])
        out[str(n)] = min(r["rmse"] for r in rows if r["budget"] == n and r["kind"] == kind) / learned
    return out


def _shown(bench: Bench, n: int) -> dict[str, Any]:
    """The solvers that pictures and Fréchet distances are of, by their words."""
    row = _row(bench, _best(bench, n), ANY, n)
    words = {GREEDY: "one number a step", GRID: "grid and weights"}
    return {f"{row['which']}, {n} evaluations": bench.made[_best(bench, n), ANY, n]} | {
        f"{text}, {n}": bench.made[MAIN, kind, n] for kind, text in words.items()
    }


def frechet(bench: Bench, many: int, seed: int, counts: list[int], data: Path | None) -> dict[str, Any]:
    """Fréchet distances to the training set: of as many test digits, of the exact ODE, of solvers."""
    from fewstep_analysis.mnist_teacher import features

    train, _, test, classes = datasets.mnist(data)
    with torch.no_grad():
        net = features()
        real = torch.cat([net(x) for x in train.split(1000)])
        apart = lambda x: images.frechet_distance(net(x), real, features=lambda f: f)  # noqa: E731
        judged = Bench(bench.task, bench.fitted, bench.task.noise(many, seed + 500), bench.labels,
                       bench.task.labels(many, seed + 500), bench.exact)  # fmt: skip
        floors = [apart(test[_balanced(classes, many, seed + k)]) for k in range(5)]
        out = {"samples": many, "test digits": sum(floors) / len(floors)}
        out["UniPC(3), 30 steps"] = apart(judged.sample(fs.UniPC(3), steps=30))
        for n in counts:
            out |= {label: apart(judged.sample(solver)) for label, solver in _shown(bench, n).items()}
    return out


def _balanced(classes: Tensor, many: int, seed: int) -> Tensor:
    """(many,) places of chance, the classes in equal shares as far as they go round."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    each = [order[classes[order] == k] for k in range(10)]
    return torch.cat([places[: -(-many // 10)] for places in each])[:many]


def rows_of(bench: Bench, counts: list[int]) -> dict[str, Tensor]:
    """Rows of images of one noise, a column a digit."""
    assert bench.test_labels is not None
    which = [int((bench.test_labels == k).nonzero()[0]) for k in range(10)]
    rows = {"fine ODE": bench.exact[which]}
    for n in counts:
        rows |= {label: bench.sample(solver)[which] for label, solver in _shown(bench, n).items()}
    return rows


def _guided(fit: int, test: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """Classifier-free guidance, by the closed form alone."""
    bench = Bench.of(mnist(guidance=GUIDANCE), fit, test, seed, steps)
    bench.learned(MAIN, 5, {TERMS: {"terms": 3, "teacher": fs.IPNDM(4), "teacher_substeps": 6}}, SPACING)
    return bench.rows


def cost(task: Task, samples: int) -> dict[str, int]:
    """Peak memory of a three-step fit, and of sampling the same start states in the fit's batches."""
    noise, labels = task.noise(samples, 3), task.labels(samples, 3)
    assert labels is not None
    with PeakMemory() as fitting:
        fs.distill_dode(task.problem, fs.DDIM(), noise=noise, labels=labels, steps=3, teacher_substeps=2)
    with PeakMemory() as sampling, torch.no_grad():
        parts = zip(noise.split(samples // 4), labels.split(samples // 4))
        torch.cat([fs.sample(task.at(y), fs.DDIM(), noise=x, steps=3) for x, y in parts])
    return {"start_states": samples, "fit_bytes": fitting.peak, "sampling_bytes": sampling.peak}


def draw(record: Record, path: str | Path) -> Path:
    """Distance to the exact ODE against evaluations."""
    figure, axes = canvas(6.4, 4.8)
    rows, counts = record.data["rows"], record.data["counts"]
    for family, shade in PEER_SHADES.items():
        points = [(r["evaluations"], r["rmse"]) for r in rows if (r["base"], r["kind"]) == (family, ANY)]
        axes.loglog(*zip(*points), ":", color=colour(shade), marker="s", ms=3, lw=1,
                    label=f"{family}, untrained")  # fmt: skip
    for base, width in (("DPMSolverPP(2)", 0.8), (MAIN, 1.8)):
        for kind, (shade, style) in STYLES.items():
            points = [(r["evaluations"], r["rmse"]) for r in rows if (r["base"], r["kind"]) == (base, kind)]
            if points and kind != UNTRAINED:
                axes.loglog(*zip(*points), style, color=shade, marker="o", ms=3, lw=width,
                            label=f"{base}, {kind}")  # fmt: skip
    axes.set_xlabel("network evaluations")
    axes.set_ylabel("RMSE to the exact ODE on held-out noise")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set_xticks([], minor=True)
    axes.grid(True, which="major", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7.5, ncols=3, loc="outside lower center")
    return write(figure, path)


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record, the figure and the pictures; returns the tables. Needs MNIST (FEWSTEP_DATA)."""
    record, pictures = study(budget, seed)
    record.save(out / "records" / "dode-mnist.json")
    draw(record, out / "figures" / "dode-mnist.svg")
    image_rows(pictures, out / "figures" / "dode-mnist.png")
    data = record.data
    rows = [table(data["rows"], KINDS, data["counts"]), table(data["rows"], (ANY, COMMON), data["counts"])]
    return [*rows, *(f"{k}: {data[k]}" for k in ("gains", "frechet", "guided", "cost", "seconds"))]
