"""The cost of sampling beyond its arithmetic, as ratios to a bare loop of the same run.

The network is eps = 0.1 x_t. The bare loop has the plan's own numbers as Python floats and nothing but `mul`,
`add` and `add_`: scale the input, take eps, form x0 (or keep eps), combine. It is compared with
`fewstep.sample` with a ready plan and, where diffusers is installed, with its schedulers and this library's
for it. All series take turns on one thread; the median of their CPU times is kept, which other work affects
least. The C allocator keeps its memory, as torch's does on a GPU: otherwise page faults, which strike either
loop at random, cost more than the arithmetic.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from base import Experiment, Job, Record, canvas, progress, single_threaded, table, write

NAME = "sampler-overhead"
STEPS = (10, 50)
TARGETS = {"(64, 3, 32, 32)": 1.2, "(2, 4, 8, 8)": 2.0}
# each solver with diffusers' scheduler of the same method
SOLVERS: dict[str, tuple[fs.DiffusionSolver, str, dict[str, Any]]] = {
    "DDIM": (fs.DDIM(), "DDIMScheduler", {"clip_sample": False}),
    "DPMSolverPP(2)": (fs.DPMSolverPP(2), "DPMSolverMultistepScheduler", {"solver_order": 2}),
    "DPMSolverPP(3)": (fs.DPMSolverPP(3), "DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DEIS(3)": (fs.DEIS(3), "DEISMultistepScheduler", {"solver_order": 3}),
    "UniPC(2)": (fs.UniPC(2), "UniPCMultistepScheduler", {"solver_order": 2}),
    "UniPC(3)": (fs.UniPC(3), "UniPCMultistepScheduler", {"solver_order": 3}),
}


@dataclass(frozen=True)
class Budget:
    """Rounds of timing by shape of the samples."""

    rounds: dict[tuple[int, ...], int]


BUDGETS = {
    "smoke": Budget({(64, 3, 32, 32): 3, (2, 4, 8, 8): 10}),
    "paper": Budget({(64, 3, 32, 32): 61, (2, 4, 8, 8): 201}),
}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """One row per shape, solver and number of steps."""
    single_threaded()
    keep_memory()
    schedule, rows = fs.DiscreteVP.named("linear"), []
    problem = fs.DiffusionModel(fs.from_epsilon(network, schedule), schedule)
    for shape, rounds in budget.rounds.items():
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for steps in STEPS:
            for name in progress(list(SOLVERS), "solver"):
                plan = SOLVERS[name][0].plan(fs.sigma_grid(schedule, steps))
                series: dict[str, Callable[[], Tensor]] = {"bare": bare_loop(plan, schedule, noise)}
                series["fewstep"] = lambda plan=plan, noise=noise: fs.sample(problem, plan, noise=noise)
                if importlib.util.find_spec("diffusers"):
                    series |= scheduler_loops(name, steps, noise)
                seconds = medians(series, rounds)
                assert torch.allclose(series["bare"](), series["fewstep"](), rtol=1e-4, atol=1e-5)
                ratios = {f"{k}_ratio": v / seconds["bare"] for k, v in seconds.items() if k != "bare"}
                rows.append({"shape": str(shape), "solver": name, "steps": steps,
                             "bare_us_per_step": 1e6 * seconds["bare"] / steps} | ratios)  # fmt: skip
    return {NAME: Record(NAME, {"rows": rows, "targets": TARGETS}, job.seed)}


def network(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.1


def bare_loop(plan: fs.Plan, schedule: fs.Schedule, noise: Tensor) -> Callable[[], Tensor]:
    """The plan's linear combinations by hand, everything known beforehand."""
    alphas, data = schedule.alpha(plan.sigma).tolist(), plan.prediction == "data"
    rows = [(a, r.sigma, *r.stage[:2], *r.update[:2]) for a, r in zip(alphas, plan.rows)]
    t, window = torch.zeros(len(noise)), plan.update_eval.shape[1]
    first = 1 / schedule.alpha(plan.sigmas[:1]).item()

    def loop() -> Tensor:
        x, history = noise * first, list[Tensor]()
        for alpha, sigma, stage_x, stage_eval, update_x, update_eval in rows:
            at = x
            if stage_eval or stage_x != 1:
                at = torch.mul(x, stage_x)
                for w, j in stage_eval:
                    at.add_(history[j], alpha=w)
            eps = network(torch.mul(at, alpha), t)
            history.insert(0, torch.add(at, eps, alpha=-sigma) if data else eps)
            del history[window:]
            if update_eval or update_x != 1:
                x = torch.mul(x, update_x)
                for w, j in update_eval:
                    x.add_(history[j], alpha=w)
        return x

    return loop


def scheduler_loops(name: str, steps: int, noise: Tensor) -> dict[str, Callable[[], Tensor]]:
    """This library's scheduler for diffusers, and the one of diffusers that does the same."""
    import diffusers

    from fewstep.integrations.diffusers import FewStepScheduler

    solver, kind, options = SOLVERS[name]

    def loop_of(scheduler: Any) -> Callable[[], Tensor]:
        def loop() -> Tensor:
            scheduler.set_timesteps(steps)  # the state must be made anew for each run
            x = noise
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t), t, x).prev_sample
            return x

        return loop

    ours = FewStepScheduler(solver=solver, clip_sample=False)
    return {"scheduler": loop_of(ours), "diffusers": loop_of(getattr(diffusers, kind)(**options))}


def medians(series: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each series, one after another in every round; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in series}
    with torch.no_grad():
        for _ in range(rounds):
            for name, call in series.items():
                start = time.thread_time()
                call()
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def keep_memory() -> None:
    """glibc: no block is mapped by itself (-3) and none is trimmed (-1); elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        for option in (-3, -1):
            ctypes.CDLL(None).mallopt(option, 2**30)


def tables(records: dict[str, Record]) -> dict[str, str]:
    """Time of a sampling loop over that of a bare loop of the same arithmetic."""
    record = records[NAME]
    rows = [
        [r["shape"], r["solver"], r["steps"], f"{r['bare_us_per_step']:.0f}", f"{r['fewstep_ratio']:.2f}",
         *(f"{r[k]:.{n}f}" if k in r else None for k, n in (("scheduler_ratio", 2), ("diffusers_ratio", 1)))]
        for r in record.data["rows"]
    ]  # fmt: skip
    head = ["shape", "solver", "steps", "bare loop, µs per step", "fewstep", "scheduler", "diffusers"]
    made = record.made
    note = f"*Measured on: {made['device']}, threads: {made['threads']}; torch {made['versions']['torch']}, "
    return {NAME: f"{table(head, rows)}\n\n{note}Python {made['versions']['python']}.*"}


def draw(records: dict[str, Record], folder: Path) -> None:
    """The ratios at 50 steps, one panel per shape, bars from 1 on a logarithmic axis."""
    figure, panels = canvas(7.6, 3.4, ncols=2, sharey=True)
    kinds = {"fewstep": "fs.sample", "scheduler": "FewStepScheduler", "diffusers": "diffusers' own"}
    colours = dict(zip(kinds, ("#0072B2", "#56B4E9", "#999999")))
    for axes, shape in zip(panels, TARGETS):
        rows = [r for r in records[NAME].data["rows"] if r["shape"] == shape and r["steps"] == STEPS[-1]]
        for k, (kind, label) in enumerate(kinds.items()):
            heights = [r.get(f"{kind}_ratio", 1.0) - 1 for r in rows]
            places = [i + 0.27 * (k - 1) for i in range(len(rows))]
            axes.bar(places, heights, 0.25, bottom=1, color=colours[kind], label=label)
        axes.set_yscale("log")
        axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.set_xticks(range(len(rows)), [r["solver"] for r in rows], rotation=35, ha="right", fontsize=8)
        axes.set_title(f"samples {shape}", fontsize=9)
        axes.grid(True, axis="y", alpha=0.3)
    panels[0].set_ylabel("CPU time, bare arithmetic = 1")
    panels[0].legend(fontsize=8)
    write(figure, folder / f"{NAME}.svg")


EXPERIMENT = Experiment(
    NAME, __doc__, 5, BUDGETS, measure, tables, draw, figures=(f"{NAME}.svg",), needs="diffusers for its rows"
)

if __name__ == "__main__":
    EXPERIMENT.main()
