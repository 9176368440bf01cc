"""The cost of this library next to others at every size, the unflattering ones included.

Each row is the same work in two libraries (or a bare loop): walks with walks, queries with queries, default noise with
default noise. The series of a row take turns on one thread; the ratio is the median over the rounds of the other's CPU
time divided by ours, with its quartiles. Above 1 this library is faster.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torchsde
from torch import Tensor

import fewstep as fs
import peers_k_diffusion
from base import F64, Experiment, Job, Record, Row, progress, single_threaded, table
from fewstep.brownian.levy_area import levy_area
from fewstep.integrations import k_diffusion as ours_k
from fewstep.integrations.torchsde import sdeint
from sampler_overhead import keep_memory

NAME = "speed-rows"
Shape = tuple[int, ...]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Budget:
    """Rounds of timing, batches of SDEs with their steps, and shapes of images."""

    rounds: int
    sizes: tuple[tuple[Shape, int], ...]
    images: tuple[Shape, ...]


BUDGETS = {
    "smoke": Budget(2, (((8, 1), 8),), ((1, 4, 8, 8),)),
    "paper": Budget(
        7, (((64, 1), 256), ((500, 2), 128), ((4096, 16), 32), ((65536, 4), 8)), ((1, 4, 64, 64), (4, 16, 128, 128))
    ),
}  # fmt: skip


class Sine(torch.nn.Module):
    """An SDE object of torchsde."""

    sde_type: str = "ito"

    def __init__(self, noise_type: str) -> None:
        super().__init__()
        self.noise_type = noise_type

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        if self.noise_type == "additive":
            return 0.8 * torch.eye(y.shape[-1]).expand(len(y), -1, -1)
        return 0.8 + 0.6 * torch.cos(y)


SINE, ELEMENTWISE = fs.SDE.from_torchsde(Sine("diagonal")), fs.SDE(lambda t, y: torch.sin(y), lambda t, y: torch.full_like(y, 0.8), "additive")  # fmt: skip  # noqa: E501
METHODS: dict[str, Any] = {"euler": fs.EulerMaruyama(), "milstein": fs.Milstein()}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """All rows; those of packages that are not installed are left out."""
    single_threaded()
    keep_memory()
    rows: list[Row] = []
    groups = [
        *(group(shape, steps) for shape, steps in budget.sizes for group in (solves, gradients, bare, noise)),
        areas(), *(sampling(shape) for shape in budget.images),
        *(scheduler(shape, dtype) for shape in budget.images for dtype in (torch.float32, torch.bfloat16)),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, and of paths without knots
        for group in progress(groups, "group"):
            for kind, what, size, peer, ours, theirs in group:
                found = times({"ours": ours, "theirs": theirs}, budget.rounds)
                ratios = [b / a for a, b in zip(found["ours"], found["theirs"], strict=True)]
                low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
                us = {name: 1e6 * statistics.median(v) for name, v in found.items()}
                cost = {"ratio": ratio, "low": low, "high": high, "ours_us": us["ours"], "theirs_us": us["theirs"]}
                rows.append({"group": kind, "what": what, "size": size, "peer": peer, "cost": cost})
    return {NAME: Record(NAME, {"rows": rows, "rounds": budget.rounds}, job.seed)}


def times(series: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each series, one after another in every round, without a first round that warms up."""
    found: dict[str, list[float]] = {name: [] for name in series}
    for _ in range(rounds + 1):
        for name, call in series.items():
            start = time.thread_time()
            call()
            found[name].append(time.thread_time() - start)
    return {name: v[1:] for name, v in found.items()}


Rows = Iterator[tuple[str, str, str, str, Run, Run]]


def interval(shape: Shape, hint: float | None, levy: str = "none", **options: Any) -> Any:
    """torchsde's path, with its step as a hint."""
    options |= {"levy_area_approximation": levy, "dtype": torch.float32}
    return torchsde.BrownianInterval(0.0, 1.0, size=shape, dt=hint, **options)


def solves(shape: Shape, steps: int) -> Rows:
    """Solves on a path: `solve` and `sdeint` next to torchsde's, on dyadic grids and on others."""
    y0, size = torch.ones(shape), str(shape)
    for n, kind in ((steps, "dyadic"), (steps * 3 // 2 + 4, "not dyadic")):
        grid, ts = torch.linspace(0, 1, n + 1, dtype=F64), torch.tensor([0.0, 1.0])

        def theirs(method: str, noise: str = "diagonal", levy: str = "none", n: int = n, ts: Tensor = ts) -> Run:
            sde = Sine(noise)
            return lambda: torchsde.sdeint(sde, y0, ts, bm=interval(shape, 1 / n, levy), method=method, dt=1 / n)

        def ours(sde: fs.SDE, solver: Any, levy: str = "W", grid: Tensor = grid) -> Run:
            return lambda: fs.solve(sde, solver, y0, grid, path=fs.BrownianPath(shape, levy=levy, knots=grid))

        for method, solver in METHODS.items():
            what = f"solve, {type(solver).__name__}, path, {kind}"
            yield "solve", what, size, "torchsde", ours(SINE, solver), theirs(method)
            what = f"sdeint, {method}, {kind}"
            own = Sine("diagonal")
            run = lambda m=method, n=n, ts=ts, own=own: sdeint(own, y0, ts, method=m, dt=1 / n, seed=1)  # noqa: E731
            yield "sdeint", what, size, "torchsde", run, theirs(method)
        yield "solve", f"solve, SRID2, path, {kind}", size, "torchsde", ours(SINE, fs.SRID2(), "H"), theirs("srk", "diagonal", "space-time")  # fmt: skip  # noqa: E501


def gradients(shape: Shape, steps: int) -> Rows:
    """Forward and backward."""
    grid, ts = torch.linspace(0, 1, steps + 1, dtype=F64), torch.tensor([0.0, 1.0])

    def back(end: Callable[[Tensor], Tensor]) -> Run:
        return lambda: end(torch.ones(shape, requires_grad=True)).sum().backward()  # type: ignore[no-untyped-call]

    for method, solver in METHODS.items():
        own = lambda y, s=solver: fs.solve(SINE, s, y, grid, path=fs.BrownianPath(shape, knots=grid)).y  # noqa: E731
        their = lambda y, m=method: torchsde.sdeint(  # noqa: E731
            Sine("diagonal"), y, ts, bm=interval(shape, 1 / steps), method=m, dt=1 / steps
        )[-1]
        yield "gradient", f"{type(solver).__name__}, forward and backward", str(shape), "torchsde", back(own), back(their)  # fmt: skip  # noqa: E501


def bare(shape: Shape, steps: int) -> Rows:
    """The steps written by hand with fresh normals, next to `solve` on a path and with fresh noise."""
    grid, y0 = torch.linspace(0, 1, steps + 1, dtype=F64), torch.ones(shape)
    h, root = 1 / steps, (1 / steps) ** 0.5

    def euler() -> Tensor:
        y = y0
        for _ in range(steps):
            y = torch.add(y, torch.sin(y), alpha=h).add_((0.8 + 0.6 * torch.cos(y)).mul_(torch.randn(shape).mul_(root)))
        return y

    def sra1() -> Tensor:
        y = y0
        for _ in range(steps):
            W, H = torch.randn(shape).mul_(root), torch.randn(shape).mul_(root / 12**0.5)
            k = torch.sin(y)
            inner = torch.add(y, k, alpha=0.75 * h).add_(W, alpha=0.6).add_(H, alpha=1.2)
            y = torch.add(y, k, alpha=h / 3).add_(torch.sin(inner), alpha=2 * h / 3).add_(W, alpha=0.8)
        return y

    cases = ((SINE, fs.EulerMaruyama(), euler, "W"), (ELEMENTWISE, fs.SRA1(), sra1, "H"))
    for sde, solver, by_hand, levy in cases:
        name = type(solver).__name__
        for source in ("path", "fresh noise"):

            def run(sde: fs.SDE = sde, solver: Any = solver, levy: str = levy, source: str = source) -> Any:
                path = fs.BrownianPath(shape, levy=levy, knots=grid) if source == "path" else None
                return fs.solve(sde, solver, y0, grid, path=path)

            yield "overhead", f"{name}, {source}", str(shape), "bare loop", run, by_hand
    for generator in ("torch", "counter"):

        def compiled(generator: str = generator) -> Any:
            path = fs.BrownianPath(shape, knots=grid, generator=generator)
            return fs.solve(SINE, fs.EulerMaruyama(), y0, grid, path=path, compile=True)

        yield "overhead", f"EulerMaruyama, path, {generator}, compiled", str(shape), "bare loop", compiled, euler


def noise(shape: Shape, steps: int) -> Rows:
    """Walks with walks, queries with queries, single intervals of new paths with theirs."""
    size, ends = str(shape), [i / steps for i in range(steps + 1)]
    grid, other = torch.tensor(ends, dtype=F64), torch.linspace(0, 1, steps * 3 // 2 + 5, dtype=F64)
    rng = random.Random(0)

    def walk(grid: Tensor, **options: Any) -> Run:
        return lambda: [i.W for i in fs.BrownianPath(shape, **options).increments(grid)]

    def queries(path: Callable[[], Any], ask: Callable[[Any, float, float], Any], ends: list[float]) -> Run:
        def run() -> None:
            made = path()
            for a, b in zip(ends, ends[1:]):
                ask(made, a, b)

        return run

    own, their = (lambda p, a, b: p.increment(a, b)), (lambda p, a, b: p(a, b))
    hinted = queries(lambda: interval(shape, 1 / steps), their, ends)
    yield "noise", "W, walk, dyadic", size, "torchsde, queries", walk(grid), hinted
    yield "noise", "W, queries in order, dyadic", size, "torchsde, queries", queries(lambda: fs.BrownianPath(shape), own, ends), hinted  # fmt: skip  # noqa: E501
    times = other.tolist()
    unhinted = queries(lambda: interval(shape, times[1]), their, times)
    yield "noise", "W, walk, not dyadic, no knots", size, "torchsde, queries", walk(other), unhinted
    yield "noise", "W, walk, not dyadic, knots", size, "torchsde, queries", walk(other, knots=other), unhinted
    for what, draw in {
        "one interval at random": lambda: sorted((rng.random(), rng.random())),
        "one interval 2^-8": lambda: [k := rng.randrange(2**8) / 2**8, k + 2.0**-8],
        "one interval 2^-20": lambda: [k := rng.randrange(2**20) / 2**20, k + 2.0**-20],
    }.items():
        asked = [draw() for _ in range(4)]
        made = lambda ends=asked: [fs.BrownianPath(shape, seed=i).increment(*e) for i, e in enumerate(ends)]  # noqa: E731
        theirs = lambda ends=asked: [interval(shape, None)(*e) for e in ends]  # noqa: E731
        yield "noise", f"W, {what}", size, "torchsde", made, theirs
        fixed = lambda ends=asked: [interval(shape, None, halfway_tree=True, tol=2.0**-48)(*e) for e in ends]  # noqa: E731
        yield "noise", f"W, {what}", size, "torchsde, any order", made, fixed
    for generator in ("torch", "counter"):
        one, seeds = {"generator": generator}, list(range(shape[0]))
        yield "noise", f"W, walk, {generator}, seeds=[...]", size, "one seed", walk(grid, seeds=seeds, **one), walk(grid, **one)  # fmt: skip  # noqa: E501


def areas() -> Rows:
    """Legendre's and Fourier's series of the same error, 16 paths of 8 channels."""
    inc = fs.BrownianPath((16, 8), levy="H").increment(0.0, 1e-3)
    own, other = (lambda m=m: levy_area(inc, m) for m in ("legendre", "fourier"))
    yield "noise", "Lévy area, legendre", "(16, 8)", "fourier", own, other


def network(x: Tensor, t: Any, **_: Any) -> Tensor:
    return x * 0.1


def sampling(shape: Shape) -> Rows:
    """Stochastic samplers with their default noise; 10 steps around a network that costs nothing."""
    schedule, size, steps = fs.DiscreteVP.named("linear"), str(shape), 10
    model = fs.DiffusionModel(fs.from_epsilon(network, schedule), schedule)
    start = torch.randn(shape)
    for solver in (fs.DPMSolverSDE(2), fs.ShARK()):
        plan = solver.plan(fs.sigma_grid(schedule, steps))
        run = lambda p=plan: fs.sample(model, p, noise=start, seed=1)  # noqa: E731
        normals = lambda: [torch.randn(shape) for _ in range(40 * steps)]  # noqa: E731
        yield "sampling", f"{type(solver).__name__}, default noise", size, "40 randn per step", run, normals
    if not peers_k_diffusion.installed():
        return
    with peers_k_diffusion.modules() as (theirs, _):
        sigmas = theirs.get_sigmas_karras(steps, 0.03, 15.0)
        x = 15.0 * start
        for name, one in {"dpmpp_2m": fs.DPMSolverPP(2), "euler": fs.EDMEuler(), "heun": fs.EDMHeun(),
                          "dpm_2": fs.DPMSolver(2), "dpmpp_2m_sde": fs.DPMSolverSDE(2)}.items():  # fmt: skip
            options: dict[str, Any] = {"disable": True}
            their = lambda n=name, o=options: getattr(theirs, f"sample_{n}")(network, x, sigmas, **o)  # noqa: E731
            ready, build = ours_k.sampler(one), ours_k.sampler
            yield "k-diffusion", f"sample_{name}, ready", size, "k-diffusion", lambda r=ready, o=options: r(network, x, sigmas, **o), their  # fmt: skip  # noqa: E501
            yield "k-diffusion", f"sample_{name}, sampler(...) per call", size, "k-diffusion", lambda s=one, b=build, o=options: b(s)(network, x, sigmas, **o), their  # fmt: skip  # noqa: E501


def scheduler(shape: Shape, dtype: torch.dtype) -> Rows:
    """Loops of 10 steps of schedulers, next to those of diffusers."""
    if not importlib.util.find_spec("diffusers"):
        return
    import diffusers

    from fewstep.integrations.diffusers import FewStepScheduler

    start, size = torch.randn(shape).to(dtype), f"{shape}, {str(dtype).removeprefix('torch.')}"
    cases: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "DDIM": (fs.DDIM(), "DDIMScheduler", {"clip_sample": False}),
        "DPM++ 2M": (fs.DPMSolverPP(2), "DPMSolverMultistepScheduler", {"solver_order": 2}),
        "UniPC 2": (fs.UniPC(2), "UniPCMultistepScheduler", {"solver_order": 2}),
        "SDE-DPM++ 2M": (fs.DPMSolverSDE(2), "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    }
    for name, (solver, kind, options) in cases.items():

        def loop(made: Any) -> Run:
            def run() -> Tensor:
                made.set_timesteps(10)
                x = start
                for t in made.timesteps:
                    x = made.step(network(x, t), t, x).prev_sample
                return x

            return run

        own, other = FewStepScheduler(solver=solver, clip_sample=False), getattr(diffusers, kind)(**options)
        yield "diffusers", f"{name}, scheduler", size, "diffusers", loop(own), loop(other)


def tables(records: Any) -> dict[str, str]:
    """The rows below 1, then every row, and the summary by group."""
    record = records[NAME]
    rows = sorted(record.data["rows"], key=lambda r: r["cost"]["ratio"])
    made = record.made
    note = f"*torch {made['versions']['torch']}, Python {made['versions']['python']}; {made['device']}, one thread; "
    note += f"{record.data['rounds']} rounds.*"
    worst = [r for r in rows if r["cost"]["ratio"] < 1 and r["peer"] not in OWN]
    return {
        "speed-worst": listed(worst) if worst else "No row is below 1.",
        "speed-rows": f"{listed(rows)}\n\n{note}",
    }


OWN = ("bare loop", "one seed", "fourier", "40 randn per step")  # limits and goals of this library, no others


def listed(rows: list[Row]) -> str:
    """The rows as a table."""
    found = [
        [*(r[k] for k in ("what", "size", "peer")), *(r["cost"][k] for k in ("ratio", "low", "high"))] for r in rows
    ]
    cells = [[*words, f"{ratio:.2f}", f"{low:.2f} to {high:.2f}"] for *words, ratio, low, high in found]
    return table(["what", "size", "peer", "ratio", "quartiles"], cells)


def summary(record: Record) -> str:
    """The worst, the median and the best ratio of each group and peer."""
    groups: dict[tuple[str, str], list[float]] = {}
    for r in record.data["rows"]:
        if r["peer"] not in OWN:
            groups.setdefault((r["group"], r["peer"].split(",")[0]), []).append(r["cost"]["ratio"])
    rows = [
        [group, peer, len(v), f"{min(v):.2f}", f"{statistics.median(v):.2f}", f"{max(v):.2f}"]
        for (group, peer), v in groups.items()
    ]
    return table(["what", "peer", "rows", "worst", "median", "best"], rows)


EXPERIMENT = Experiment(
    NAME, __doc__, 6, BUDGETS, measure, tables, needs="the other packages for their rows (diffusers, k-diffusion)"
)

if __name__ == "__main__":
    EXPERIMENT.main()
