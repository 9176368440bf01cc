"""The demo: distil a 300-step sampler of handwritten digits to 5 steps, and measure the result."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep import _validation
from fewstep.distances import sliced_w2

from . import datasets, problems, teachers
from .convergence import strong_orders
from .figures import image_rows, order_figure
from .records import Record, provenance
from .work import median_seconds

STEPS, TEACHER_STEPS, SAMPLES, SHOWN = 5, 300, 1000, 16
NUMBERS = 256 * 256  # of most tensors: a minibatch of 256 in layers of 256
QUICK_SHARE, LEVELS = 10, range(3, 9)  # the divisor of a quick demo's training; refinements of the orders
Row = dict[str, Any]


def run(
    out: Path, *, seed: int = 0, quick: bool = False, device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> Record:  # fmt: skip
    """Run the demo; writes digits.png, convergence.png, report.json and student.safetensors.

    Args:
        out: the folder of these files.
        quick: a tenth of the training.
        device: where teacher and student run; the small student of an SDE is always fitted on the CPU.
        say: receives one line per stage.
    """
    began = time.perf_counter()
    digits = datasets.digits()  # before any work: it needs an extra package
    device = _validation.check_device(device)
    out.mkdir(parents=True, exist_ok=True)
    problem = teachers.digits(device)
    say(f"[1/4] distil {TEACHER_STEPS} steps of the digits teacher to {STEPS}")
    share = QUICK_SHARE if quick else 1
    student, report = fs.distill_sigdeg(
        problem, steps=STEPS, teacher_steps=TEACHER_STEPS, levy="H", event_shape=(1, 8, 8), seed=seed,
        teacher_options=fs.TeacherOptions(trajectories=8192 // share), forcing=0.0,
        training=fs.TrainingOptions(iterations=1000 // share), device=device, progress=True,
    )  # fmt: skip
    student.save(out / "student.safetensors")
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report.seconds.items())
    say(f"      {stages}; distance to the teacher {report.parent_rmse:.3f} -> {report.student_rmse:.3f}")
    say(f"[2/4] sample {SAMPLES} digits each from the same noise")
    table = _compare(problem, student, *digits, seed, device)
    say("[3/4] draw them")
    image_rows({row["sampler"]: row.pop("images") for row in table}, out / "digits.png")
    say("[4/4] measure strong orders against torchsde paths")
    orders = _orders(out / "convergence.png", seed, share, device)
    data: dict[str, Any] = {"table": table, "orders": orders, "distillation": vars(report)}
    data["seconds"] = time.perf_counter() - began
    record = Record("demo", data, seed, provenance(str(device)))
    record.save(out / "report.json")
    return record


def _compare(
    problem: fs.DiffusionModel, student: fs.SigSampler, real: Tensor, held_out: Tensor, seed: int,
    device: torch.device,
) -> list[Row]:  # fmt: skip
    """The teacher, the naive coarse sampler and the student along one Brownian path."""
    fine, coarse = (fs.sigma_grid(problem.schedule, n, final="sigma_min") for n in (TEACHER_STEPS, STEPS))
    # one path for all three samplers; knots at the times of the fine grid make its queries cheap
    path = fs.BrownianPath(
        (SAMPLES, 1, 8, 8), t0=float(fine[0] ** -2), t1=float(fine[-1] ** -2), seed=seed + 1, levy="H",
        clock="log", knots=fine**-2.0, device=device,
    )  # fmt: skip
    noise = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * fine[0].float()
    noise = noise.to(device)
    naive = fs.EulerMaruyama()
    samplers: dict[str, Any] = {
        f"teacher, {TEACHER_STEPS} steps": naive.plan(fine), f"naive, {STEPS} steps": naive.plan(coarse),
        f"learned, {STEPS} steps": student,
    }  # fmt: skip
    rows: list[Row] = []
    for name, solver in samplers.items():
        with torch.no_grad():
            images = fs.sample(problem, solver, noise=noise, path=path).cpu()
        plan = getattr(solver, "plan", solver)

        def once(solver: Any = solver, levy: str = plan.levy) -> None:
            shape = (SAMPLES, 1, 8, 8)
            fresh = fs.FreshIncrements(shape, levy=levy, seed=seed, device=device)  # as in practice
            with torch.no_grad():
                fs.sample(problem, solver, shape=shape, seed=seed, path=fresh, device=device).cpu()

        rows.append({
            "sampler": name, "images": images[:SHOWN], "evaluations": plan.nfe,
            "sliced_w2": _distance(images, held_out),
            "seconds": median_seconds(once, 1 if plan.nfe > 100 else 5),
        })  # fmt: skip
    floor = _distance(real[: len(real) // 500 * 500], held_out)
    rows.append({"sampler": "real digits (training set)", "images": real[:SHOWN], "evaluations": 0,
                 "sliced_w2": floor, "seconds": 0.0})  # fmt: skip
    return rows


def _distance(images: Tensor, held_out: Tensor) -> float:
    """Mean sliced W2 of batches of 500 to the 500 held-out digits: it depends on the sample size."""
    parts = torch.split(images, len(held_out))
    return sum(sliced_w2(part, held_out) for part in parts) / len(parts)


def _orders(path: Path, seed: int, share: int, device: torch.device) -> list[dict[str, Any]]:
    """Orders of Euler-Maruyama, Milstein and a learned step, which needs no derivative of the diffusion."""
    problem = problems.sine()
    learned, _ = fs.distill_sigdeg_step(
        problem.sde, steps=64, y0=torch.linspace(-2.5, 2.5, 512, dtype=torch.float64).unsqueeze(1),
        teacher_options=fs.TeacherOptions(trajectories=4096 // share),
        training=fs.TrainingOptions(iterations=600 // share), seed=seed, progress=True,
    )  # fmt: skip
    solvers = [fs.EulerMaruyama(), fs.Milstein(), learned]
    estimates = strong_orders(solvers, problem, levels=LEVELS, paths=2000 // share, seed=seed, device=str(device))
    records = [e.record() for e in estimates]
    order_figure(records, path)
    return [r.data for r in records]


def lines(record: Record, out: Path) -> list[str]:
    """The results and the names of the files, as lines of text."""
    table = record.data["table"]
    found = [f"{'sampler':<28}{'evaluations':>12}{'sliced W2':>12}{'seconds':>10}"]
    for row in table:
        made = f"{row['evaluations']:>12}" if row["evaluations"] else f"{'-':>12}"
        took = f"{row['seconds']:>10.3f}" if row["evaluations"] else f"{'-':>10}"
        found.append(f"{row['sampler']:<28}{made}{row['sliced_w2']:>12.3f}{took}")
    teacher, naive, learned = table[:3]
    found += [
        "",
        f"learned / teacher {learned['sliced_w2'] / teacher['sliced_w2']:.2f} in distance to real digits, "
        f"naive / learned {naive['sliced_w2'] / learned['sliced_w2']:.2f}, "
        f"{teacher['seconds'] / learned['seconds']:.0f} times faster than the teacher",
    ]
    for e in record.data["orders"]:
        found.append(f"strong order of {e['solver']}: finest local slope {e['local'][-1]:.2f}")
    return [
        *found, "", f"Done in {record.data['seconds']:.0f} s. Written to {out}/:",
        "  digits.png  convergence.png  report.json  student.safetensors",
        "Next: fewstep convergence --solver milstein --out order.svg; fewstep solvers; in Python, "
        f"fewstep.load('{out}/student.safetensors')",
    ]  # fmt: skip
