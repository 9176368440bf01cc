"""All that needs a GPU, in one command of under nine minutes: tests, agreement, orders, speed, overhead, MNIST.

Six parts. Each runs in a process of its own, has its own time limit, and is saved when it ends, with what it has
measured by then and the error that ended it, if any. The next part goes on. A further run of the same command
measures again only the parts that have not finished.

tests: the tests marked `cuda`. agreement: every solver against the CPU along one path, and host synchronisations per
step. orders: strong orders against torchsde's `srk` on the same BrownianInterval. throughput: path-steps per second
of increments and solvers, as a share of the memory-bandwidth floor. overhead: a sampling loop next to its bare
arithmetic in a CUDA graph. mnist: samplers of the MNIST teacher, by their distances to real digits.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
import sampler_overhead
from base import (
    ROOT,
    Experiment,
    Job,
    Record,
    Row,
    canvas,
    curve,
    images_figure,
    packed,
    progress,
    rms,
    table,
    ticks,
    write,
)
from fewstep import InputError
from fewstep.brownian.bridge import VARIANCES
from fewstep_analysis import devices, problems
from fewstep_analysis.devices import is_cuda, median_seconds
from fewstep_analysis.figures import draw_orders
from fewstep_analysis.records import provenance

NAME = "gpu"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
MOST_ON_CPU = 1 << 14  # paths; more take hours
EQUAL = 1000  # the largest difference to the CPU that counts as rounding, in units of rounding
SOLVERS: dict[str, tuple[fs.StochasticSolver, str, int, str]] = {
    # solver, noise type, letters of an increment, torchsde's method of the same order
    "EulerMaruyama": (fs.EulerMaruyama(), "diagonal", 1, "euler"),
    "Milstein": (fs.Milstein(), "diagonal", 1, "milstein"),
    "ShARK": (fs.ShARK(), "additive", 2, "srk"),
}
NOISE = {"fresh W": 1, "fresh W,H": 2, "path W": 1, "path W,H": 2}  # letters of an increment
FORMS = {  # of a program, with marker and colour in the figure
    "eager": ("o", "#0072B2"), "compiled": ("s", "#009E73"), "compiled, CUDA graph": ("D", "#D55E00"),
    "CUDA graph": ("v", "#CC79A7"), "steps": ("^", "#E69F00"), "steps, CUDA graph": ("^", "#E69F00"),
    "torchsde": ("x", "0.4"),
}  # fmt: skip
SAMPLERS: dict[str, fs.DiffusionSolver] = {
    "DDIM": fs.DDIM(), "DPMSolverPP(2)": fs.DPMSolverPP(2), "DPMSolverPP(3)": fs.DPMSolverPP(3),
    "DEIS(3)": fs.DEIS(3), "IPNDM(3)": fs.IPNDM(3), "UniPC(2)": fs.UniPC(2), "UniPC(3)": fs.UniPC(3),
    "EulerMaruyama": fs.EulerMaruyama(), "DPMSolverSDE(2)": fs.DPMSolverSDE(2),
}  # fmt: skip
FINE = fs.UniPC(3)  # with many steps, the ODE that is taken as exact
BATCH = 2500  # images


@dataclass(frozen=True)
class Budget:
    """What a run computes.

    Attributes:
        parts: the parts, in order, with their time limits in seconds.
        solvers: those of `agreement`; None for all.
        paths, levels, additive_levels: of the strong orders; the step size is 2^-level.
        fit: trajectories and iterations of the learned step; None measures it unfitted, equal to its parent.
        shapes, steps: of the timed increments and solves.
        samples: shapes of the sampling loops.
        copy: bytes copied to measure the bandwidth.
        seconds: about how long each timing repeats its call.
        backend: of `torch.compile`.
        images, counts, fine: samples of the MNIST teacher, evaluations of the samplers and of the exact ODE.
        real: training images that distances are taken to; None for all.
    """

    parts: dict[str, float]
    solvers: tuple[str, ...] | None
    paths: int
    levels: tuple[int, ...]
    additive_levels: tuple[int, ...]
    fit: tuple[int, int] | None
    shapes: tuple[tuple[int, ...], ...]
    steps: int
    samples: tuple[tuple[int, ...], ...]
    copy: int
    seconds: float
    backend: str
    images: int
    counts: tuple[int, ...]
    fine: int
    real: int | None


BUDGETS = {
    "smoke": Budget(
        parts={"tests": 60, "agreement": 60, "orders": 60, "throughput": 60, "overhead": 60, "mnist": 60},
        solvers=("ShARK", "UniPC"), paths=32, levels=(2, 3, 4), additive_levels=(1, 2, 3), fit=None,
        shapes=((64, 2),), steps=4, samples=((2, 4, 8, 8),), copy=1 << 20, seconds=0, backend="eager",
        images=10, counts=(3,), fine=3, real=200,
    ),
    "paper": Budget(
        parts={"tests": 150, "agreement": 45, "orders": 80, "throughput": 230, "overhead": 35, "mnist": 60},
        solvers=None, paths=1 << 20, levels=tuple(range(4, 10)), additive_levels=tuple(range(3, 8)), fit=(1024, 100),
        # the last is well past the L2 cache, in which the others fit
        shapes=((1 << 20, 1), (65536, 16), (4, 4, 128, 128), (1 << 24, 4)), steps=8,
        samples=((64, 3, 32, 32), (4, 4, 128, 128)), copy=1 << 30, seconds=0.2, backend="inductor",
        images=5000, counts=(5, 8, 10, 20), fine=60, real=None,
    ),
}  # fmt: skip


Found = Row | tuple[str, Any]
"""What a part yields: a row, or a further entry of its record."""


def measure(budget: Budget, job: Job) -> Iterator[tuple[str, Record]]:
    """One record per part, as it ends."""
    if budget.paths > MOST_ON_CPU and not is_cuda(job.device):
        raise InputError(
            f"device: got {job.device!r} for {budget.paths} paths, expected 'cuda' for more than {MOST_ON_CPU}. "
            "On a CPU run: python analysis/experiments/gpu.py --device cpu --budget smoke"
        )
    settings = json.loads(json.dumps(dataclasses.asdict(budget)))
    made = provenance(job.device) | {"facts": facts(job.device)}
    for part in progress(budget.parts, "part"):
        if part not in PARTS:
            raise InputError(f"parts: got {part!r}, expected some of {', '.join(PARTS)}.")
        file = job.work / f"{part}.json"
        data = finished(file, settings, made)
        if data is None:
            data = {"settings": settings, **in_process(part, budget, job, budget.parts[part])}
            Record(f"{NAME}-{part}", data, job.seed, made).save(file)
        yield f"{NAME}-{part}", Record(f"{NAME}-{part}", data, job.seed, made)


def facts(device: str) -> Row:
    """What an absolute time depends on besides the versions."""
    if not is_cuda(device):
        return {}
    has, triton = torch.cuda.get_device_properties(device), importlib.util.find_spec("triton")
    return {
        "memory": has.total_memory, "multiprocessors": has.multi_processor_count, "l2": has.L2_cache_size,
        "capability": f"{has.major}.{has.minor}", "cuda": torch.version.cuda, "triton": triton is not None,
    }  # fmt: skip


def finished(file: Path, settings: Row, made: Row) -> Row | None:
    """The data of a part that an earlier run finished with the same settings, commit and device."""
    if not file.exists():
        return None
    record = Record.load(file)
    same = record.data["settings"] == settings and all(record.made[k] == made[k] for k in ("device", "commit"))
    return record.data if same and not record.data["error"] else None


def in_process(part: str, budget: Budget, job: Job, limit: float) -> Row:
    """Run a part in a process of its own: a hang ends with it, and so does a broken device context."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(send, part, budget, job), daemon=True)
    data: Row = {"rows": [], "error": f"stopped after {limit:g} s"}
    begun = time.perf_counter()
    process.start()
    send.close()
    try:
        while receive.poll(max(0.0, begun + limit - time.perf_counter())):
            found = receive.recv()
            if isinstance(found, dict):
                data["rows"].append(found)
            else:
                data[found[0]] = found[1]
    except EOFError:
        process.join()
        if process.exitcode:
            data["error"] = f"the process ended with exit code {process.exitcode}"
    process.kill()
    process.join()
    return data | {"seconds": time.perf_counter() - begun}


def work(send: Any, part: str, budget: Budget, job: Job) -> None:
    """Send what a part yields, then the error that ended it, or None."""
    error = None
    try:
        if not is_cuda(job.device):
            torch.set_num_threads(1)
        with torch.no_grad():
            for found in PARTS[part](budget, job):
                send.send(found)
    except Exception as stopped:
        error = first_line(stopped)
    send.send(("error", error))
    send.close()


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """The value of a call, or the reason why it has none."""
    try:
        return call(), None
    except Exception as error:
        return None, first_line(error)


# ---------------------------------------------------------------- tests and agreement


def tests(budget: Budget, job: Job) -> Iterator[Found]:
    """The outcome of each test marked `cuda`."""
    if importlib.util.find_spec("pytest") is None:
        yield "note", "pytest is not installed: python -m pip install pytest"
        return
    files = [str(p) for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in p.read_text()]
    job.work.mkdir(parents=True, exist_ok=True)
    report = job.work / "tests.xml"
    report.unlink(missing_ok=True)
    words = ["-m", "cuda", "-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, f"--junitxml={report}", *files],
        cwd=ROOT, capture_output=True, text=True, timeout=0.8 * budget.parts["tests"],
    )  # fmt: skip
    yield "note", (done.stdout.strip().splitlines() or ["pytest printed nothing"])[-1]
    for case in xml.parse(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        yield {
            "test": f"{case.get('classname')}.{case.get('name')}", "seconds": float(case.get("time", 0)),
            "outcome": "passed" if outcome is None else outcome.tag,
            "message": None if outcome is None else (outcome.get("message") or "").split("\n")[0][:200],
        }  # fmt: skip


def agreement(budget: Budget, job: Job) -> Iterator[Found]:
    """Each solver, problem and dtype: the distance to the CPU along one portable path; synchronisations per step."""
    for name, solver in fs.solvers().items():
        if budget.solvers is not None and name not in budget.solvers:
            continue
        for case, run in devices.cases_of(solver):
            row: Row = {"solver": name, "case": case, "reason": None}
            for dtype, kind in DTYPES.items():
                ends, error = attempt(lambda r=run, k=kind: [r(d, k, 8, True) for d in ("cpu", job.device)])
                row |= {dtype: None if error else devices.distance(*ends), "reason": row["reason"] or error}
            if is_cuda(job.device):
                found, error = attempt(lambda r=run: devices.synchronisations_of(r, job.device))
                row |= {"synchronisations": found, "reason": row["reason"] or error}
            yield row


# ---------------------------------------------------------------- strong orders


def orders(budget: Budget, job: Job) -> Iterator[Found]:
    """Strong orders on diagonal and additive noise, against torchsde where it is installed."""
    from fewstep_analysis.convergence import strong_orders

    reference = "torchsde" if importlib.util.find_spec("torchsde") else "levels"
    if reference == "levels":
        yield "note", "torchsde is not installed: differences of consecutive levels instead"
    options: Row = {"paths": budget.paths, "seed": job.seed, "device": job.device, "reference": reference}
    begun = time.perf_counter()
    step = learned(budget, job.seed + 1)
    yield "fit", {"settings": budget.fit, "seconds": time.perf_counter() - begun}
    diagonal = [fs.EulerMaruyama(), fs.Milstein(), step]
    for solvers, problem, levels in (
        ([fs.EulerMaruyama(), fs.ShARK()], problems.additive_sine(), budget.additive_levels),
        (diagonal, problems.sine(), budget.levels),
    ):
        begun = time.perf_counter()
        found = strong_orders(solvers, problem, levels=levels, **options)
        for estimate in found:
            yield estimate.record().data | {"seconds": time.perf_counter() - begun}


def learned(budget: Budget, seed: int) -> fs.SigStep:
    """The learned step of the problem `sine`, fitted on the CPU, or unfitted and equal to its parent."""
    import sigdeg_order
    from fewstep.learned.sigdeg.networks import Coefficients

    if budget.fit is None:
        return fs.SigStep(Coefficients(1, 5, scaled=True).double())
    with torch.enable_grad():
        fit = dataclasses.replace(
            sigdeg_order.BUDGETS["smoke"], trajectories=budget.fit[0], iterations=budget.fit[1]
        )  # fmt: skip
        return sigdeg_order.learned(sigdeg_order.sine(), fit, seed)[0]


# ---------------------------------------------------------------- throughput


def throughput(budget: Budget, job: Job) -> Iterator[Found]:
    """Times of increments and solves in every form, the surest forms first."""
    bandwidth = devices.copy_bandwidth(job.device, budget.copy)
    yield "copy", {"bytes": budget.copy, "bytes_per_second": bandwidth}
    if not (theirs := importlib.util.find_spec("torchsde") is not None):
        yield "note", "torchsde is not installed: no rows of it"
    kinds = [(shape, dtype) for dtype in DTYPES for shape in budget.shapes]

    def row(what: str, form: str, shape: tuple[int, ...], dtype: str, program: Callable[[], Any]) -> Row:
        """Make a program, time it, and compare the time with that of the bytes which it must move."""
        seconds, error = attempt(lambda: median_seconds(program(), job.device, budget.seconds))
        out: Row = {"what": what, "form": form, "shape": list(shape), "dtype": dtype, "reason": error}
        if seconds is not None:
            elements = math.prod(shape) * budget.steps
            moved = elements * elements_moved(what) * DTYPES[dtype].itemsize
            out |= {"seconds": seconds, "path_steps_per_second": elements / seconds,
                    "share": moved / bandwidth / seconds}  # fmt: skip
        if is_cuda(job.device):
            torch.cuda.empty_cache()
        return out

    for shape, dtype in kinds:
        make = Programs(shape, DTYPES[dtype], job, budget.steps)
        for what in (*NOISE, *SOLVERS):
            yield row(what, "eager", shape, dtype, lambda m=make, w=what: m.program(w))
        for what in SOLVERS:
            by_hand = "steps, CUDA graph" if is_cuda(job.device) else "steps"
            yield row(what, by_hand, shape, dtype, lambda m=make, w=what, f=by_hand: made(partial(m.steps, w), f))
        for what in ("path W", "path W,H", *SOLVERS) if theirs else ():
            yield row(what, "torchsde", shape, dtype, lambda m=make, w=what: m.torchsde(w))
    # compiling takes long, and a capture that fails may leave the device unusable: last
    for form, some in (("compiled", kinds), ("compiled, CUDA graph", kinds[: len(budget.shapes)])):
        for shape, dtype in some if is_cuda(job.device) or form == "compiled" else ():
            make = Programs(shape, DTYPES[dtype], job, budget.steps)
            for what in SOLVERS:
                yield row(
                    what, form, shape, dtype, lambda m=make, w=what, f=form: made(m.program(w), f, budget.backend)
                )


def elements_moved(what: str) -> int:
    """Numbers that a step reads or writes at least: its normals, once drawn; a solver's normals again and its state."""
    return NOISE[what] if what in NOISE else 2 + 2 * SOLVERS[what][2]


def made(program: Callable[[], Any], form: str, backend: str = "") -> Callable[[], Any]:
    """A program in one of the forms that torch can give it; raises where it cannot."""
    if form.startswith("compiled"):
        torch._dynamo.reset()
        options: Row = {"mode": "reduce-overhead"} if form.endswith("graph") else {"backend": backend}
        program = torch.compile(program, fullgraph=True, dynamic=False, **options)
    elif form.endswith("graph"):
        return devices.captured(program)
    return lambda: program()


class Programs:
    """What is timed, for one shape and dtype: functions without arguments, on random data."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, job: Job, steps: int) -> None:
        self.shape, self.dtype, self.device, self.seed, self.count = shape, dtype, job.device, job.seed, steps
        generator = torch.Generator(job.device).manual_seed(job.seed)
        self.y0 = torch.randn(shape, dtype=dtype, device=job.device, generator=generator)
        self.grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)

    def sde(self, what: str) -> fs.SDE:
        """Cheap elementwise fields: dy = -y dt + y/5 dW, or dW/2 for additive noise."""
        noise = SOLVERS[what][1]
        g = (lambda t, y: 0.2 * y) if noise == "diagonal" else (lambda t, y: y.new_full((1,), 0.5))
        return fs.SDE(lambda t, y: -y, g, noise)

    def program(self, what: str) -> Callable[[], Any]:
        """`fs.solve` with fresh increments, or a walk over increments that keeps them all."""
        return partial(self.solve if what in SOLVERS else self.increments, what)

    def increments(self, what: str) -> list[Tensor | None]:
        kind = fs.FreshIncrements if what.startswith("fresh") else fs.BrownianPath
        levy = "H" if what.endswith("H") else "W"
        source = kind(self.shape, levy=levy, seed=self.seed, dtype=self.dtype, device=self.device)
        return [field for i in source.increments(self.grid) for field in (i.W, i.H)]

    def solve(self, what: str) -> Tensor:
        return fs.solve(self.sde(what), SOLVERS[what][0], self.y0, self.grid, seed=self.seed).y

    def steps(self, what: str) -> Tensor:
        """The steps alone, as a user writes them for a CUDA graph: torch's own generator is safe to capture."""
        solver, _, letters, _ = SOLVERS[what]
        sde, h = self.sde(what), 1 / self.count
        times = [self.y0.new_full((), k * h) for k in range(self.count + 1)]
        y, carry = self.y0, solver.init(sde, times[0], self.y0)
        for t0, t1 in pairwise(times):
            normals = [torch.empty_like(y, dtype=torch.float32).normal_(0, math.sqrt(h * v)).to(self.dtype)
                       for v in VARIANCES[:letters]]  # fmt: skip
            y, carry, _ = solver.step(sde, t0, t1, y, fs.Increment(h, *normals), carry)
        return y

    def torchsde(self, what: str) -> Callable[[], Any]:
        """torchsde's solver of the same kind, or its path queried step by step, with its step as a hint."""
        import torchsde

        from fewstep_analysis.monte_carlo import TorchsdeSDE

        y0 = self.y0.reshape(self.shape[0], -1) if len(self.shape) == 2 else self.y0.flatten(0, 1).flatten(1)
        area, h, times = what.endswith("H") or what == "ShARK", 1 / self.count, self.grid.tolist()
        size = y0.shape

        def interval() -> Any:
            return torchsde.BrownianInterval(
                0.0, 1.0, size=size, dtype=self.dtype, device=self.device, entropy=self.seed, dt=h,
                levy_area_approximation="space-time" if area else "none",
            )  # fmt: skip

        def queries() -> list[Any]:
            bm = interval()
            return [bm(a, b, return_U=area) for a, b in pairwise(times)]

        if what in NOISE:
            return queries
        sde = DiagonalSDE(self.sde(what)) if SOLVERS[what][1] == "additive" else TorchsdeSDE(self.sde(what), 1)
        ts = self.y0.new_tensor([0.0, 1.0])
        return lambda: torchsde.sdeint(sde, y0, ts, bm=interval(), method=SOLVERS[what][3], dt=h)


class DiagonalSDE(torch.nn.Module):
    """Additive noise as diagonal noise, since torchsde's additive noise is a matrix, too large for many components."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, sde: fs.SDE) -> None:
        super().__init__()
        self.f, self.inner = sde.drift, sde.diffusion

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.inner(t, y).expand_as(y)


# ---------------------------------------------------------------- samplers


def overhead(budget: Budget, job: Job) -> Iterator[Found]:
    """Microseconds per step of sampling loops around a network that costs nothing."""
    schedule, steps = fs.DiscreteVP.named("linear"), 20
    problem = fs.DiffusionModel(fs.from_epsilon(sampler_overhead.network, schedule), schedule)
    forms = ("eager", "CUDA graph", "compiled") if is_cuda(job.device) else ("eager", "compiled")
    # captures of the library's loop may fail and leave the device unusable: last
    turns = [("bare", f) for f in forms[:2] if f != "compiled"] + [("fs.sample", f) for f in FORMS if f in forms]
    for (loop, form), shape in product(turns, budget.samples):
        noise = torch.randn(shape, device=job.device, generator=torch.Generator(job.device).manual_seed(job.seed))
        for name, (solver, _, _) in sampler_overhead.SOLVERS.items():
            plan = solver.plan(fs.sigma_grid(schedule, steps))
            run = {"bare": sampler_overhead.bare_loop(plan, schedule, noise),
                   "fs.sample": partial(fs.sample, problem, plan, noise=noise)}[loop]  # fmt: skip
            timed = partial(median_seconds, device=job.device, seconds=budget.seconds)
            seconds, reason = attempt(lambda r=run, f=form, t=timed: t(made(r, f, budget.backend)))
            yield {"loop": loop, "form": form, "shape": list(shape), "solver": name, "steps": steps,
                   "reason": reason, "us_per_step": None if reason else 1e6 * seconds / steps}  # fmt: skip


def mnist(budget: Budget, job: Job) -> Iterator[Found]:
    """Samplers of the MNIST teacher: RMSE to the exact ODE, distances to real digits."""
    if not os.environ.get("FEWSTEP_DATA"):
        yield "note", "skipped: FEWSTEP_DATA does not name the folder of MNIST's four files"
        return
    if importlib.util.find_spec("diffusers") is None:
        yield "note", "skipped: diffusers, whose U-Net the teacher is, is not installed"
        return
    from fewstep_analysis import distillation
    from mnist_judge import Judge

    task, judge = distillation.mnist(job.device), Judge.of(budget.real)
    judge = dataclasses.replace(judge, net=judge.net.to(job.device), real=judge.real.to(job.device))
    labels = (torch.arange(budget.images) % 10).to(job.device)
    noise = task.noise(budget.images, job.seed).to(job.device)

    def images(plan: fs.Plan) -> Tensor:
        return torch.cat([
            fs.sample(task.at(c), plan, noise=x, seed=job.seed + k)
            for k, (x, c) in enumerate(zip(noise.split(BATCH), labels.split(BATCH)))
        ])  # fmt: skip

    def plan_of(solver: fs.DiffusionSolver, steps: int) -> fs.Plan:
        return solver.plan(fs.sigma_grid(task.schedule, steps, "trailing"), task.schedule)

    digits = judge.digits(labels.cpu(), job.seed).to(job.device)
    yield {"sampler": "test digits", "evaluations": None, "rmse": None, **judge(digits, labels)}
    fine = plan_of(FINE, budget.fine)
    exact = images(fine)
    yield {"sampler": "fine ODE", "evaluations": fine.nfe, "rmse": 0.0, **judge(exact, labels)}
    pictures = {"test digits": digits[:10], f"fine ODE, {fine.nfe}": exact[:10]}
    for n in budget.counts:
        for name, solver in SAMPLERS.items():
            plan = plan_of(solver, n)
            x = images(plan)
            # a stochastic sampler does not approximate the ODE from the same noise
            rmse = None if plan.levy else rms(x - exact)
            yield {"sampler": name, "evaluations": plan.nfe, "rmse": rmse, **judge(x, labels)}
            if n == budget.counts[0]:
                pictures[f"{name}, {n}"] = x[:10]
    yield "pictures", packed(pictures)


PARTS: dict[str, Callable[[Budget, Job], Iterator[Found]]] = {
    f.__name__: f for f in (tests, agreement, orders, throughput, overhead, mnist)
}


# ---------------------------------------------------------------- tables


def tables(records: dict[str, Record]) -> dict[str, str]:
    """One table per part, with the device, and what was not measured and why."""
    return {f"{NAME}-{part}": described(records.get(f"{NAME}-{part}"), show) for part, show in TABLES.items()}


def described(record: Record | None, show: Callable[[Row], str]) -> str:
    """The table of a part, what ended it, and what it was measured on."""
    if record is None:
        return "Not measured yet."
    data, made = record.data, record.made
    parts = [show(data)] if data["rows"] else []
    parts += [f"Note: {data['note']}."] if data.get("note") else []
    parts += [f"Not complete: {data['error']}."] if data["error"] else []
    reasons = dict.fromkeys(r["reason"] for r in data["rows"] if r.get("reason"))
    parts += ["Not available:\n\n" + "\n".join(f"- `{one}`" for one in reasons)] if reasons else []
    versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
    parts.append(f"*Measured on {made['device']} in {data['seconds']:.0f} s; {versions}; seed {record.seed}.*")
    return "\n\n".join(parts)


def tests_table(data: Row) -> str:
    """By test function: its cases, and the messages of those that did not pass."""
    rows = []
    for name, some in groupby(data["rows"], key=lambda r: r["test"].partition("[")[0]):
        cases = list(some)
        passed, seconds = sum(r["outcome"] == "passed" for r in cases), sum(r["seconds"] for r in cases)
        others = "; ".join(f"{r['test'].partition('[')[2]} {r['message']}" for r in cases if r["outcome"] != "passed")
        rows.append([f"`{name.rpartition('.')[2]}`", len(cases), passed, f"{seconds:.1f}", others or None])
    return table(["test", "cases", "passed", "seconds", "not passed"], rows)


def agreement_table(data: Row) -> str:
    """By solver: the largest distances to the CPU, and synchronisations of 8 further steps."""
    rows: list[list[Any]] = []
    for name in dict.fromkeys(r["solver"] for r in data["rows"]):
        mine = [r for r in data["rows"] if r["solver"] == name]
        most = [max((r[d] for r in mine if r[d] is not None), default=math.nan) for d in DTYPES]
        waits = [r["synchronisations"]["more"] for r in mine if r.get("synchronisations")]
        places = ", ".join(dict.fromkeys(place for w in waits for place in w))
        equal = "yes" if max(most) <= EQUAL and all(r["reason"] is None for r in mine) else "no"
        count = max(sum(w.values()) for w in waits) if waits else None
        rows.append([f"`{name}`", len(mine), *(f"{v:.0f}" for v in most), equal, count, places])
    head = ["solver", "problems", "float32", "float64", "equal", "synchronisations in 8 steps", "at"]
    return f"Largest difference, in units of rounding; equal up to {EQUAL}.\n\n{table(head, rows)}"


def orders_table(data: Row) -> str:
    rows = []
    for e in data["rows"]:
        slope = f"{e['order']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"
        rows.append([f"`{e['solver']}`", e["problem"], f"{e['paths']:,}", f"{e['declared']:.1f}", slope,
                     " ".join(f"{v:.2f}" for v in e["local"]), e["reference"], f"{e['seconds']:.0f}"])  # fmt: skip
    head = ["solver", "problem", "paths", "declared", "fitted slope", "local slopes, coarse to fine", "reference", "s"]
    return table(head, rows)


def throughput_table(data: Row) -> str:
    """Path-steps per second in every form, with the share of the bandwidth floor."""
    cells: dict[tuple[Any, ...], Row] = {}
    for r in data["rows"]:
        text = f"{r['path_steps_per_second']:.2g} ({r['share']:.0%})" if r["reason"] is None else "n/a"
        cells.setdefault((r["what"], tuple(r["shape"]), r["dtype"]), {})[r["form"]] = text
    forms = [form for form in FORMS if any(form in found for found in cells.values())]
    rows = [[*key, *(found.get(form) for form in forms)] for key, found in sorted(cells.items(), key=by_shape)]
    copied = f"A copy moved {data['copy']['bytes_per_second'] / 1e12:.3g} TB/s."
    return f"{copied}\n\n{table(['program', 'shape', 'dtype', *forms], rows)}"


def by_shape(item: tuple[tuple[Any, ...], Any]) -> tuple[Any, ...]:
    """Order of the table: by size, dtype, program."""
    what, shape, dtype = item[0]
    return math.prod(shape), shape, dtype, [*NOISE, *SOLVERS].index(what)


def overhead_table(data: Row) -> str:
    """Microseconds per step in every form."""
    cells: dict[tuple[Any, ...], Row] = {}
    for r in data["rows"]:
        text = "n/a" if r["us_per_step"] is None else f"{r['us_per_step']:.1f}"
        cells.setdefault((tuple(r["shape"]), r["solver"]), {})[f"{r['loop']}, {r['form']}"] = text
    forms = list(dict.fromkeys(form for found in cells.values() for form in found))
    head = ["µs per step of samples", "solver", *forms]
    return table(head, [[*key, *(found.get(form) for form in forms)] for key, found in cells.items()])


def mnist_table(data: Row) -> str:
    rows = [
        [r["sampler"], r["evaluations"], None if r["rmse"] is None else f"{r['rmse']:.4f}", f"{r['frechet']:.3f}",
         f"{1000 * r['kernel']:.2f}", f"{r['score']:.2f}", f"{r['right']:.1%}"]
        for r in data["rows"]
    ]  # fmt: skip
    head = ["sampler", "evaluations", "RMSE to the fine ODE", "Fréchet", "kernel x 1000", "class score", "right class"]
    return table(head, rows)


TABLES: dict[str, Callable[[Row], str]] = {
    "tests": tests_table, "agreement": agreement_table, "orders": orders_table, "throughput": throughput_table,
    "overhead": overhead_table, "mnist": mnist_table,
}  # fmt: skip


# ---------------------------------------------------------------- figures


def draw(records: dict[str, Record], folder: Path) -> None:
    """A figure for each record that has rows to draw."""
    for part, drawn in {"orders": draw_order, "throughput": draw_throughput, "mnist": draw_mnist}.items():
        record = records.get(f"{NAME}-{part}")
        if record is not None and record.data["rows"]:
            drawn(record, folder / f"{NAME}-{part}.svg")


def draw_order(record: Record, path: Path) -> None:
    """Error against step size, one panel per problem."""
    curves = record.data["rows"]
    kinds = list(dict.fromkeys(c["noise_type"] for c in curves))
    figure, axes = canvas(4.6 * len(kinds), 4.2, ncols=len(kinds), squeeze=False)
    for panel, noise in zip(axes[0], kinds, strict=True):
        mine = [c for c in curves if c["noise_type"] == noise]
        draw_orders(panel, mine, labels_inside=True)
        panel.set_title(f"{noise} noise: {mine[0]['problem'].replace('_', ' ')}, reference: {mine[0]['reference']}",
                        fontsize=9)  # fmt: skip
    axes[0][0].set_ylabel(f"RMSE at t = 1 over {curves[0]['paths']:,} paths")
    figure.suptitle(f"Strong orders on {record.made['device']} (slope [95 % interval])", fontsize=10)
    write(figure, path)


def draw_throughput(record: Record, path: Path) -> None:
    """Path-steps per second of each program, one panel per shape and dtype; a bar marks the bandwidth floor."""
    found = [r for r in record.data["rows"] if r["reason"] is None]
    panels = {(tuple(r["shape"]), r["dtype"]): None for r in found}
    shapes, dtypes = (list(dict.fromkeys(key[k] for key in panels)) for k in (0, 1))
    names, drawn = [*NOISE, *SOLVERS], {}
    figure, axes = canvas(2.9 * len(shapes) + 2, 2.5 * len(dtypes) + 1.2, nrows=len(dtypes), ncols=len(shapes),
                          squeeze=False, sharex=True, sharey=True)  # fmt: skip
    for r in found:
        panel = axes[dtypes.index(r["dtype"])][shapes.index(tuple(r["shape"]))]
        y, rate, (marker, shade) = names.index(r["what"]), r["path_steps_per_second"], FORMS[r["form"]]
        drawn["bandwidth floor"] = panel.plot(rate / r["share"], y, "|", color="k", ms=11, mew=1.6)[0]
        drawn[r["form"]] = panel.plot(rate, y, marker, color=shade, ms=5.5, mfc="none", mew=1.2)[0]
        panel.set_title(f"{' x '.join(f'{n:,}' for n in r['shape'])}, {r['dtype']}", fontsize=9)
    for panel in axes.flat:
        panel.set_xscale("log")
        panel.grid(True, axis="both", alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel("path-steps per second", fontsize=9)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    keys = [k for k in (*FORMS, "bandwidth floor") if k in drawn]
    figure.legend([drawn[k] for k in keys], keys, loc="outside lower center", ncols=len(keys), fontsize=8)
    figure.suptitle(f"Throughput on {record.made['device']}", fontsize=10)
    write(figure, path)


def draw_mnist(record: Record, path: Path) -> None:
    """Fréchet distance, and RMSE to the fine ODE, against evaluations; pictures."""
    figure, panels = canvas(9.4, 4.2, ncols=2)
    rows = record.data["rows"]
    for k, name in enumerate(SAMPLERS):
        mine = [r for r in rows if r["sampler"] == name]
        for panel, key in zip(panels, ("frechet", "rmse"), strict=True):
            points = [(r["evaluations"], r[key]) for r in mine if r[key]]
            curve(panel, points, "-", color=f"C{k}", marker="os^vDPX<>"[k], ms=4, lw=1.2, label=name)
    for r, style in zip(rows, (":", "--")):  # the real digits and the fine ODE
        panels[0].axhline(r["frechet"], color="0.3", ls=style, lw=1, label=r["sampler"])
    for panel, words in zip(panels, ("Fréchet distance to the training set", "RMSE to the fine ODE"), strict=True):
        panel.set_xlabel("network evaluations")
        panel.set_ylabel(words)
        ticks(panel, sorted({r["evaluations"] for r in rows[2:]}))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    write(figure, path)
    images_figure(record, path.with_suffix(".png"))


EXPERIMENT = Experiment(
    NAME, __doc__, 9, BUDGETS, measure, tables, draw, records=tuple(f"{NAME}-{part}" for part in PARTS),
    figures=("gpu-orders.svg", "gpu-throughput.svg", "gpu-mnist.svg", "gpu-mnist.png"), device="cuda",
    needs="a CUDA device; torchsde, diffusers, pytest and MNIST for their parts",
)  # fmt: skip

if __name__ == "__main__":
    EXPERIMENT.main()
