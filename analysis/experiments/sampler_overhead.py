"""What sampling costs beyond its arithmetic, as ratios to a bare loop taken in one run.

    fewstep study sampler-overhead

The network is eps = 0.1 x_t. The bare loop has the plan's own numbers as Python floats and nothing but
`mul`, `add` and `add_`: scale the input, take eps, form x0 (or keep eps), combine. Against it stand
`fewstep.sample` with a ready plan and, where diffusers is installed, its schedulers and ours for it. All
series take turns on one thread; the median of their CPU times is kept, which other work moves least.
The C allocator is told to keep its memory, as torch's does on a GPU: else a page fault, which strikes
either loop as the heap will have it, costs more than the arithmetic.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep_analysis.figures import canvas, write
from fewstep_analysis.parallel import progress
from fewstep_analysis.records import Record

TAKES = "5 min"
SHAPES = {(64, 3, 32, 32): 61, (2, 4, 8, 8): 201}
STEPS = (10, 50)
TARGETS = {"(64, 3, 32, 32)": 1.2, "(2, 4, 8, 8)": 2.0}
SOLVERS: dict[str, fs.DiffusionSolver] = {
    "DDIM": fs.DDIM(), "DPMSolverPP(2)": fs.DPMSolverPP(2), "DPMSolverPP(3)": fs.DPMSolverPP(3),
    "DEIS(3)": fs.DEIS(3), "UniPC(2)": fs.UniPC(2), "UniPC(3)": fs.UniPC(3),
}  # fmt: skip


def network(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.1


def bare(plan: fs.Plan, schedule: fs.Schedule, start: Tensor) -> Callable[[], Tensor]:
    """The plan's linear combinations by hand, everything known beforehand."""
    alphas, data = schedule.alpha(plan.sigma).tolist(), plan.prediction == "data"
    rows = [(a, r.sigma, *r.stage[:2], *r.update[:2]) for a, r in zip(alphas, plan.rows)]
    t, window = torch.zeros(len(start)), plan.update_eval.shape[1]
    first = 1 / schedule.alpha(plan.sigmas[:1]).item()

    def loop() -> Tensor:
        x, history = start * first, list[Tensor]()
        for alpha, sigma, c, d, a, b in rows:
            at = x
            if d or c != 1:
                at = torch.mul(x, c)
                for w, j in d:
                    at.add_(history[j], alpha=w)
            eps = network(torch.mul(at, alpha), t)
            history.insert(0, torch.add(at, eps, alpha=-sigma) if data else eps)
            del history[window:]
            if b or a != 1:
                x = torch.mul(x, a)
                for w, j in b:
                    x.add_(history[j], alpha=w)
        return x

    return loop


def theirs(name: str, steps: int, start: Tensor) -> Callable[[], Tensor] | None:
    """The diffusers scheduler that does the same, set up beforehand as far as it can be."""
    try:
        import diffusers as df
    except ImportError:
        return None
    made: Any = {
        "DDIM": lambda: df.DDIMScheduler(clip_sample=False),
        "DPMSolverPP(2)": lambda: df.DPMSolverMultistepScheduler(solver_order=2),
        "DPMSolverPP(3)": lambda: df.DPMSolverMultistepScheduler(solver_order=3),
        "DEIS(3)": lambda: df.DEISMultistepScheduler(solver_order=3),
        "UniPC(2)": lambda: df.UniPCMultistepScheduler(solver_order=2),
        "UniPC(3)": lambda: df.UniPCMultistepScheduler(solver_order=3),
    }[name]()

    def loop() -> Tensor:
        made.set_timesteps(steps)  # their state must be made anew for each run
        x = start
        for t in made.timesteps:
            x = made.step(network(x, t), t, x).prev_sample
        return x

    return loop


def in_place(name: str, steps: int, start: Tensor) -> Callable[[], Tensor] | None:
    """This library's scheduler for diffusers, in the same loop."""
    try:
        from fewstep.integrations.diffusers.scheduler import FewStepScheduler
    except ImportError:
        return None
    made = FewStepScheduler(solver=SOLVERS[name], clip_sample=False)

    def loop() -> Tensor:
        made.set_timesteps(steps)
        x = start
        for t in made.timesteps:
            x = made.step(network(x, t), t, x).prev_sample
        return x

    return loop


def medians(series: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after another in every round."""
    seen: dict[str, list[float]] = {name: [] for name in series}
    with torch.no_grad():
        for _ in range(rounds):
            for name, call in series.items():
                began = time.thread_time()
                call()
                seen[name].append(time.thread_time() - began)
    return {name: statistics.median(times[1:]) for name, times in seen.items()}


def keep_memory() -> None:
    """glibc: no block is mapped by itself (-3) and none is trimmed (-1); elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        for option in (-3, -1):
            ctypes.CDLL(None).mallopt(option, 2**30)


def measure(rounds: float = 1.0) -> list[dict[str, Any]]:
    """A row for each shape, solver and number of steps."""
    schedule, rows = fs.DiscreteVP.named("linear"), []
    problem = fs.DiffusionModel(fs.from_epsilon(network, schedule), schedule)
    for shape, count in SHAPES.items():
        start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for steps in STEPS:
            for name, solver in progress(list(SOLVERS.items()), "solver"):
                plan = solver.plan(fs.sigma_grid(schedule, steps))
                series = {
                    "bare": bare(plan, schedule, start),
                    "fewstep": lambda plan=plan, start=start: fs.sample(problem, plan, noise=start),
                }
                for who, make in (("scheduler", in_place), ("diffusers", theirs)):
                    if loop := make(name, steps, start):
                        series[who] = loop
                seconds = medians(series, max(3, int(count * rounds)))
                assert torch.allclose(series["bare"](), series["fewstep"](), rtol=1e-4, atol=1e-5)
                row = {"shape": str(shape), "solver": name, "steps": steps}
                row["bare_us_per_step"] = 1e6 * seconds["bare"] / steps
                ratios = {f"{k}_ratio": v / seconds["bare"] for k, v in seconds.items() if k != "bare"}
                rows.append(row | ratios)
    return rows


def draw(record: Record, path: str | Path) -> Path:
    """The ratios at 50 steps, a panel a shape, bars from 1 on a logarithmic axis."""
    figure, panels = canvas(7.6, 3.4, ncols=2, sharey=True)
    kinds = {"fewstep": "fs.sample", "scheduler": "FewStepScheduler", "diffusers": "diffusers' own"}
    colours = dict(zip(kinds, ("#0072B2", "#56B4E9", "#999999")))
    for axes, shape in zip(panels, map(str, SHAPES)):
        rows = [r for r in record.data["rows"] if r["shape"] == shape and r["steps"] == STEPS[-1]]
        for k, (kind, label) in enumerate(kinds.items()):
            ratios = [r.get(f"{kind}_ratio", 1.0) for r in rows]
            places = [i + 0.27 * (k - 1) for i in range(len(rows))]
            axes.bar(places, [v - 1 for v in ratios], 0.25, bottom=1, color=colours[kind], label=label)
        axes.set_yscale("log")
        axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.set_xticks(range(len(rows)), [r["solver"] for r in rows], rotation=35, ha="right", fontsize=8)
        axes.set_title(f"samples {shape}", fontsize=9)
        axes.grid(True, axis="y", alpha=0.3)
    panels[0].set_ylabel("CPU time, bare arithmetic = 1")
    panels[0].legend(fontsize=8)
    return write(figure, path)


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record and the figure; returns a line a row."""
    torch.set_num_threads(1)
    keep_memory()
    rows = measure(0.05 if budget == "smoke" else 1.0)
    record = Record("sampler-overhead", {"rows": rows, "targets": TARGETS}, seed)
    record.save(out / "records" / "sampler-overhead.json")
    draw(record, out / "figures" / "sampler-overhead.svg")
    return ["  ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in r.values()) for r in rows]
