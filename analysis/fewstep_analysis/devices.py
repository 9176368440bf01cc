"""Solvers on a device: their results next to those of the CPU, host synchronisations, times, CUDA graphs."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fewstep as fs
from fewstep.brownian.increment import letters_for
from fewstep.testing import cases

Case = Callable[[str, torch.dtype, int, bool], Tensor]
"""`(device, dtype, steps, portable) -> result on that device`, along the path of seed 0."""

SCHEDULE = fs.DiscreteVP.named("linear")
MODEL = fs.DiffusionModel(fs.from_epsilon(lambda x, t: torch.tanh(x), SCHEDULE), SCHEDULE)
CELLS = 64  # of a path with areas


def is_cuda(device: str) -> bool:
    """Whether this is the name of a CUDA device."""
    return torch.device(device).type == "cuda"


def cases_of(solver: fs.Solver) -> Iterator[tuple[str, Case]]:
    """What a solver solves, with names: the SDEs of the conformance suite, a diffusion model.

    These problems compute on the device alone, so what is read or copied there is the solver's.
    """
    if isinstance(solver, fs.StochasticSolver):
        for sde, name in cases(solver):
            yield name, partial(solved, solver, sde)
    if isinstance(solver, fs.DiffusionSolver):
        yield "sampling", partial(sampled, solver)


def solved(
    solver: fs.StochasticSolver, sde: fs.SDE, device: str, dtype: torch.dtype, steps: int, portable: bool
) -> Tensor:
    """The state at t = 1 of a solve from fixed values, (4, 3, 2)."""
    y0 = torch.linspace(0.1, 1, 24, dtype=dtype, device="cpu").reshape(4, 3, 2).to(device)
    shape = sde.noise_shape(y0, sde.diffusion(y0.new_zeros(()), y0))
    path = fs.BrownianPath(
        shape, levy=letters_for(solver.card.levy), dtype=dtype, device=device, portable=portable
    )  # fmt: skip
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")
    return fs.solve(sde, solver, y0, grid, path=fs.AreaPath(path, CELLS) if solver.card.levy == "A" else path).y


def sampled(solver: fs.DiffusionSolver, device: str, dtype: torch.dtype, steps: int, portable: bool) -> Tensor:
    """Samples of `MODEL` from fixed noise, (4, 2, 3)."""
    plan = solver.plan(fs.sigma_grid(SCHEDULE, steps), SCHEDULE)
    x = torch.randn(4, 2, 3, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(0))
    path = None
    if plan.levy:
        ends = float(plan.sigmas[0]) ** -2, max(float(plan.noise.nan_to_num(0).max()), SCHEDULE.sigma_min**-2)
        path = fs.BrownianPath(
            (4, 2, 3), *ends, levy="K", dtype=dtype, device=device, clock="log", portable=portable
        )  # fmt: skip
    return fs.sample(MODEL, plan, noise=x.to(device, dtype), path=path)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the rounding of the largest value."""
    a, b = a.cpu(), b.cpu()
    return float((a - b).abs().max() / (a.abs().max() * torch.finfo(a.dtype).eps))


def synchronisations(call: Callable[[], object]) -> Counter[str]:
    """Where a call waits for the CUDA device: counts by the line of Python that waits."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [w for w in found if "called a synchronizing" in str(w.message)]
    return Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in waits)


def synchronisations_of(case: Case, device: str) -> dict[str, Counter[str]]:
    """Those of 8 steps, and those of 8 further ones; a path of the device supplies the noise."""
    few, many = (synchronisations(partial(case, device, torch.float32, steps, False)) for steps in (8, 16))
    return {"first": few, "more": many - few}


def median_seconds(call: Callable[[], object], device: str, seconds: float = 0.2, least: int = 5) -> float:
    """The median time of a call after two others: by CUDA events, or by the clock on a CPU.

    Args:
        seconds: about how long to repeat it, with at least `least` and at most 100 repetitions.
    """
    call()
    begun = time.perf_counter()
    call()
    if is_cuda(device):
        torch.cuda.synchronize()
    count = min(max(int(seconds / max(time.perf_counter() - begun, 1e-9)), least), 100)
    return statistics.median((_cuda_times if is_cuda(device) else _cpu_times)(call, count))


def _cuda_times(call: Callable[[], object], count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _cpu_times(call: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return times


def copy_bandwidth(device: str, size: int = 1 << 30) -> float:
    """Bytes read and written per second by a copy of `size` random bytes on the device."""
    source = torch.randint(1 << 30, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph of the call; raises where the call cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up on another stream, as capture requires
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
