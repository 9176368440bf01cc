"""Sig-DEG on MNIST: a class-conditional U-Net teacher of 300 steps, students of 20, 10 and 5."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import fewstep as fs
import torch
from fewstep import Denoising
from fewstep.learned.sig_unet import SigUNet
from fewstep.learned.training import Report, held_out
from fewstep.learned.trajectories import Trajectories, make_trajectories
from torch import Tensor

from .. import datasets, images, mnist_teacher
from ..figures import canvas, colour, image_rows, write
from ..records import Record

# Ten steps that each take away the same share of the teacher's root mean squared error (0.5 at the largest
# level, 0.34 at 3, 0.17 at 1, 0.08 at 0.3, 0.03 at 0.1), rounded; above 9 there is nearly only noise.
TEN = (9.0, 4.5, 2.8, 1.8, 1.2, 0.8, 0.5, 0.28, 0.1)
SUBSTEPS = 15  # of the teacher in each of 20 intervals
PRECISE = 0.1  # below this level the teacher computes in float32, above in bfloat16: half the time
COUNTS = (10, 20, 5)  # the students of 20 and 5 begin as that of 10
BATCH = 64
Stage = tuple[float, int, int, float]
# trajectories; samples of a Fréchet distance; per count (share forced, iterations, batch, rate), in turn
BUDGETS: dict[str, tuple[int, int, dict[int, tuple[Stage, ...]]]] = {
    "paper": (1536, 1500, {
        10: ((1.0, 2200, BATCH, 4e-4), (0.0, 400, 32, 2e-4)),
        20: ((1.0, 200, BATCH, 2e-4), (0.0, 30, 32, 1e-4)),
        5: ((1.0, 200, BATCH, 2e-4), (0.0, 200, 32, 2e-4)),
    }),
    "smoke": (32, 20, {n: ((0.5, 2, 8, 1e-4),) for n in COUNTS}),
}  # fmt: skip


def levels() -> Tensor:
    """(21,) the levels of 20 steps; one in two is that of ten, one in four of five."""
    schedule = mnist_teacher.schedule()
    ends = torch.tensor([schedule.sigma_max, *TEN, schedule.sigma_min], dtype=torch.float64)
    middles = (ends[:-1] * ends[1:]).sqrt()
    return torch.cat([torch.stack([ends[:-1], middles], 1).flatten(), ends[-1:]])


def teacher(labels: Tensor, net: object) -> Denoising:
    """The teacher with a class a sample."""
    problem = mnist_teacher.problem(labels, net=net)  # type: ignore[arg-type]

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=float(sigma.max()) > PRECISE):
            return problem.denoiser(x, sigma)

    return Denoising(denoiser, problem.schedule)


def study(
    budget: str, seed: int, device: torch.device | str, work: Path, data: Path | None = None
) -> tuple[Record, dict[str, Tensor]]:
    """Teacher data, students and distances; what is done is kept in `work`, and not done again."""
    count, many, stages = BUDGETS[budget]
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
        began = time.perf_counter()
        students[n], reports[n] = _train(problem, taught.coarsen(20 // n), network, stages[n], work, device)
        seconds[f"student of {n}"] = time.perf_counter() - began
        network = _copy(students[10].network)
    body: dict[str, Any] = {
        "trajectories": count, "levels": levels().tolist(), "teacher steps": taught.evaluations,
        "stages": {str(n): stages[n] for n in COUNTS}, "seconds": seconds,
        "knots": {str(n): r.knots for n, r in reports.items()},
        "losses": {str(n): r.losses for n, r in reports.items()},
    }  # fmt: skip
    body["rows"] = distances(problem, taught, students, many, seed, device, data)
    return Record("sigdeg-mnist", body, seed), pictures(problem, taught, students, device)


def _copy(network: Any) -> SigUNet:
    """Another of the same weights, to be trained on."""
    other = SigUNet(**network.config)
    other.load_state_dict(network.state_dict())
    return other


def _train(
    problem: Any, taught: Trajectories, network: SigUNet, stages: tuple[Stage, ...], work: Path, device: Any
) -> tuple[fs.SigSampler, Report]:
    """One stage after another, each with its own checkpoint."""
    for k, (forcing, iterations, batch, rate) in enumerate(stages):
        student, report = fs.distill_sigdeg(
            problem, data=taught, network=network.requires_grad_(True), forcing=forcing, autocast=True,
            iterations=iterations, batch=batch, rate=rate, every=100, folder=work / f"stage-{k}",
            device=device, progress=True,
        )  # fmt: skip
    return student, report


def distances(
    problem: Any, taught: Trajectories, students: dict[int, fs.SigSampler], many: int, seed: int, device: Any,
    data: Path | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Fréchet and kernel distances to the training set, class score and right classes, of so many samples."""
    train, _, test, classes = datasets.mnist(data)
    net = mnist_teacher.features()
    labels = torch.arange(many) % 10
    with torch.no_grad():
        real = torch.cat([net(x) for x in train.split(1000)])
        row = partial(_row, labels=labels, net=net, real=real)
        rows = [row("test digits", 0, test[_balanced(classes, many, seed)])]
        rows.append(row("teacher", taught.evaluations, taught.pick(torch.arange(many)).knots[-1]))
        for n, student in sorted(students.items()):
            for name, solver in ({f"student of {n}": student} | untrained(taught, n)).items():
                rows.append(row(name, n, _sample(problem, solver, labels, seed + n, device)))
    return rows


def untrained(taught: Trajectories, n: int) -> dict[str, Any]:
    """The same parent without training, on the student's grid and on two of common use; and an ODE solver."""
    schedule, parent = mnist_teacher.schedule(), fs.EulerMaruyama()
    grids = {s: fs.sigma_grid(schedule, n, s, "sigma_min") for s in ("logsnr", "karras")}
    grids["the student's grid"] = taught.coarsen(20 // n).sigmas
    rows = {f"untrained, {name}": parent.plan(grid) for name, grid in grids.items()}
    return rows | {"UniPC(3), an ODE solver": fs.UniPC(3).plan(grids["the student's grid"])}


def _sample(problem: Any, solver: Any, labels: Tensor, seed: int, device: Any) -> Tensor:
    parts = []
    for k, part in enumerate(labels.split(250)):
        mine = solver.at(part) if isinstance(solver, fs.SigSampler) else solver
        with torch.no_grad():
            parts.append(fs.sample(problem(part), mine, shape=(len(part), 1, 28, 28), seed=1000 * seed + k,
                                   device=device).cpu())  # fmt: skip
    return torch.cat(parts)


def _row(name: str, evaluations: int, x: Tensor, *, labels: Tensor, net: Any, real: Tensor) -> dict[str, Any]:
    found = net(x)
    return {
        "sampler": name, "evaluations": evaluations,
        "frechet": images.frechet_distance(found, real, features=lambda f: f),
        "kernel": images.kernel_distance(found, real[:: max(1, len(real) // 10000)], features=lambda f: f),
        "score": images.class_score(x, logits=net.logits),
        "right": float((net.head(found).argmax(1) == labels).double().mean()), "std": float(x.std()),
    }  # fmt: skip


def _balanced(classes: Tensor, many: int, seed: int) -> Tensor:
    """(many,) places of chance with classes 0, 1, ..., 9, 0, 1, ..."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    each = [order[classes[order] == k] for k in range(10)]
    return torch.tensor([int(each[i % 10][i // 10]) for i in range(many)])


def pictures(
    problem: Any, taught: Trajectories, students: dict[int, fs.SigSampler], device: Any
) -> dict[str, Tensor]:
    """Held-out paths, a column each of a class: teacher, students and untrained along the same noise."""
    held = held_out(len(taught))[1].tolist()
    index = torch.tensor([next((i for i in held if i % 10 == k), held[0]) for k in range(10)])
    rows = {f"teacher, {taught.evaluations} steps": taught.pick(index).knots[-1]}
    for n, student in sorted(students.items(), reverse=True):
        some = taught.coarsen(20 // n).pick(index).to(device)
        rows[f"student, {n}"] = _along(problem, student, some)
        if n != 20:
            rows[f"untrained, {n}"] = _along(problem, student.plan, some)
    return rows


@torch.no_grad()
def _along(problem: Any, solver: Any, some: Any) -> Tensor:
    """The final states along the noise of these trajectories."""
    from fewstep.sample import evaluator_of, run

    plan, x, supply = getattr(solver, "plan", solver), some.knots[0], iter(some.xi)
    at = problem(some.labels)
    evaluate = evaluator_of(at, plan, x) if plan is solver else solver.at(some.labels).evaluator(at, x)
    return run(plan, x, evaluate, lambda *_: next(supply).unbind(1)).cpu()


def draw(record: Record, path: str | Path) -> Path:
    """Fréchet distance against evaluations."""
    figure, axes = canvas(6.4, 4.4)
    rows = record.data["rows"]
    kinds = {
        "student": ("student", "SigStep"),
        "untrained, the": ("untrained, on the student's grid", "EulerMaruyama"),
        "untrained, logsnr": ("untrained, even in log SNR", "Milstein"),
        "UniPC": ("UniPC(3), an ODE solver, on the student's grid", "ShARK"),
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
