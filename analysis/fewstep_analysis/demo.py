"""The demo: a sampler of handwritten digits in 5 evaluations in place of 300, fitted while you wait, and measured."""

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
QUICK_SHARE, LEVELS = 10, range(3, 9)  # the divisor of a quick demo's samples; refinements of the orders
STATES, PARTS = 512, 10  # start states of the fit; parts that a standard error leaves out in turn
Row = dict[str, Any]


def run(
    out: Path, *, seed: int = 0, quick: bool = False, train: bool = False, device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> Record:  # fmt: skip
    """Run the demo; writes digits.png, convergence.png, report.json and table.safetensors.

    Args:
        out: the folder of these files.
        quick: a tenth of the samples and of the training.
        train: also distil a network to the same number of evaluations, which writes student.safetensors, and a
            learned step of an SDE.
        device: where the samplers run; the small student of an SDE is always fitted on the CPU.
        say: receives one line per stage.
    """
    began = time.perf_counter()
    digits = datasets.digits()  # before any work: it needs an extra package
    device = _validation.check_device(device)
    out.mkdir(parents=True, exist_ok=True)
    problem, share = teachers.digits(device), QUICK_SHARE if quick else 1
    say(f"[1/4] fit a table of {STEPS} evaluations to {TEACHER_STEPS} steps of the digits teacher")
    states = torch.randn(max(32, STATES // share), 1, 8, 8, generator=torch.Generator().manual_seed(seed + 2))
    table, fit = fs.fit_table(
        problem, nfe=STEPS, noise=states.to(device) * problem.schedule.sigma_max, levy="K", seed=seed,
        teacher_steps=TEACHER_STEPS, starts=1, iterations=10, progress=True,
    )  # fmt: skip
    table.save(out / "table.safetensors")
    say(f"      distance to the teacher on the same noise {fit.base_errors.rmse:.3f} -> {fit.student_errors.rmse:.3f}")
    data: dict[str, Any] = {"fit": {"base": fit.base_errors.rmse, "fitted": fit.student_errors.rmse}}
    fitted: dict[str, Any] = {f"fitted table, {STEPS} steps": table}
    if train:
        say("      distil a network to the same number of evaluations")
        student, report = fs.distill_sigdeg(
            problem, steps=STEPS, teacher_steps=TEACHER_STEPS, levy="H", event_shape=(1, 8, 8), seed=seed,
            teacher_options=fs.TeacherOptions(trajectories=8192 // share), forcing=0.0,
            training=fs.TrainingOptions(iterations=1000 // share), device=device, progress=True,
        )  # fmt: skip
        student.save(out / "student.safetensors")
        data["distillation"] = vars(report)
        fitted[f"distilled network, {STEPS} steps"] = student
    say(f"[2/4] sample {SAMPLES} digits each from the same noise")
    data["table"] = rows = _compare(problem, fitted, *digits, seed, device)
    say("[3/4] draw them")
    title = "Digits from the same start noise, along the same Brownian path; below, real ones"
    image_rows({row["sampler"]: row.pop("images") for row in rows}, out / "digits.png", title)
    say("[4/4] measure strong orders against torchsde paths")
    data["orders"] = _orders(out / "convergence.png", seed, share, train, device)
    data["seconds"] = time.perf_counter() - began
    record = Record("demo", data, seed, provenance(str(device)))
    record.save(out / "report.json")
    return record


def _compare(
    problem: fs.DiffusionModel, fitted: dict[str, Any], real: Tensor, held_out: Tensor, seed: int,
    device: torch.device,
) -> list[Row]:  # fmt: skip
    """The teacher, its sampler in few steps and what was fitted, along one Brownian path."""
    fine, coarse = (fs.sigma_grid(problem.schedule, n, final="sigma_min") for n in (TEACHER_STEPS, STEPS))
    # one path for all three samplers; knots at the times of the fine grid make its queries cheap
    path = fs.BrownianPath(
        (SAMPLES, 1, 8, 8), t0=float(fine[0] ** -2), t1=float(fine[-1] ** -2), seed=seed + 1, levy="K",
        clock="log", knots=fine**-2.0, device=device,
    )  # fmt: skip
    noise = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * fine[0].float()
    noise = noise.to(device)
    plain = fs.EulerMaruyama()
    samplers: dict[str, Any] = {
        f"teacher, {TEACHER_STEPS} steps": plain.plan(fine), f"untrained, {STEPS} steps": plain.plan(coarse), **fitted,
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
            "sliced_w2": _distance(images, held_out), "sliced_w2_se": _spread(images, held_out),
            "seconds": median_seconds(once, 1 if plan.nfe > 100 else 5),
        })  # fmt: skip
    floor = _distance(real[: len(real) // 500 * 500], held_out)
    rows.append({
        "sampler": "real digits (training set)", "images": real[:SHOWN], "evaluations": 0, "sliced_w2": floor,
        "sliced_w2_se": _spread(real[: len(real) // 500 * 500], held_out), "seconds": 0.0,
    })  # fmt: skip
    return rows


def _distance(images: Tensor, held_out: Tensor) -> float:
    """Mean sliced W2 of batches of 500 to the 500 held-out digits: it depends on the sample size."""
    parts = torch.split(images, len(held_out))
    return sum(sliced_w2(part, held_out) for part in parts) / len(parts)


def _spread(images: Tensor, held_out: Tensor) -> float:
    """The standard error of a distance over other images, by the jackknife over tenths of them."""
    parts = images[: len(images) // PARTS * PARTS].chunk(PARTS)
    without = [torch.cat([p for p in parts if p is not left]) for left in parts]
    found = torch.tensor([_distance(rest[: len(rest) // 450 * 450], held_out[:450]) for rest in without])
    return float(((PARTS - 1) * found.var(unbiased=False)).sqrt())


def _orders(path: Path, seed: int, share: int, train: bool, device: torch.device) -> list[dict[str, Any]]:
    """Orders of Euler-Maruyama, Milstein and SRID2; with `train` also of a learned step."""
    problem = problems.sine()
    solvers: list[fs.StochasticSolver] = [fs.EulerMaruyama(), fs.Milstein(), fs.SRID2()]
    if train:
        learned, _ = fs.distill_sigdeg_step(
            problem.sde, steps=64, y0=torch.linspace(-2.5, 2.5, 512, dtype=torch.float64).unsqueeze(1),
            teacher_options=fs.TeacherOptions(trajectories=4096 // share),
            training=fs.TrainingOptions(iterations=600 // share), seed=seed, progress=True,
        )  # fmt: skip
        solvers.append(learned)
    estimates = strong_orders(solvers, problem, levels=LEVELS, paths=1000 // share, seed=seed, device=str(device))
    records = [e.record() for e in estimates]
    order_figure(records, path)
    return [r.data for r in records]


def lines(record: Record, out: Path) -> list[str]:
    """The results and the names of the files, as lines of text."""
    table = record.data["table"]
    found = [f"{'sampler':<28}{'evaluations':>12}{'sliced W2':>18}{'seconds':>10}"]
    for row in table:
        made = f"{row['evaluations']:>12}" if row["evaluations"] else f"{'-':>12}"
        took = f"{row['seconds']:>10.3f}" if row["evaluations"] else f"{'-':>10}"
        distance = f"{row['sliced_w2']:.3f} ± {row['sliced_w2_se']:.3f}"
        found.append(f"{row['sampler']:<28}{made}{distance:>18}{took}")
    teacher, plain, fitted = table[:3]
    found += [
        "",
        "sliced W2: distance to real digits that nothing was fitted to, with its standard error",
        f"fitted / teacher {fitted['sliced_w2'] / teacher['sliced_w2']:.2f}, untrained / fitted "
        f"{plain['sliced_w2'] / fitted['sliced_w2']:.2f} in this distance; the table is "
        f"{teacher['seconds'] / fitted['seconds']:.0f} times faster",
    ]
    for e in record.data["orders"]:
        found.append(f"strong order of {e['solver']}: {e['order']:.2f} [{e['low']:.2f}, {e['high']:.2f}]")
    student = "  student.safetensors" if "distillation" in record.data else ""
    return [
        *found, "", f"Done in {record.data['seconds']:.0f} s. Written to {out}/:",
        f"  digits.png  convergence.png  report.json  table.safetensors{student}",
        f"Next: in Python, fewstep.load('{out}/table.safetensors')",
        "      fewstep compare --problem digits --nfe 5",
        "      fewstep convergence --solver milstein --out order.svg",
    ]  # fmt: skip
