"""D-ODE on a Gaussian, a smooth mixture and handwritten digits, for 3 to 20 network evaluations.

Errors are distances to the exact ODE, next to those of the best untrained samplers of the same cost.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fewstep as fs
from base import F64, Experiment, Job, Record, Row, canvas, images_figure, packed, progress, table, write
from dode_bench import BEST, GREEDY, TABLE, UNTRAINED, Bench, bases_table, draw_errors, gains, peak_bytes
from fewstep.learned.training import held_out
from fewstep_analysis.distillation import Task, task

PROBLEMS = ("gaussian", "smooth", "digits")
BASES = ("DDIM", "DPMSolverPP(2)")
SHOWN = 5  # evaluations of the pictures
MOST = 10  # of a fitted table


@dataclass(frozen=True)
class Size:
    """Initial states to fit to and to judge on; those of fitted tables, and their iterations."""

    fit: int
    test: int
    table: int
    iterations: int


@dataclass(frozen=True)
class Budget:
    """A size per problem; evaluations; steps of the reference; the most initial states of the Gaussian."""

    sizes: dict[str, Size]
    counts: tuple[int, ...]
    reference_steps: int
    population: int


BUDGETS = {
    "smoke": Budget(dict.fromkeys(PROBLEMS, Size(64, 64, 32, 2)), (3, 5), 50, 64),
    "paper": Budget(
        {"gaussian": Size(1024, 1024, 256, 100), "smooth": Size(1024, 1024, 512, 100),
         "digits": Size(1024, 512, 256, 100)},
        (3, 5, 8, 10, 20), 400, 16384,
    ),
}  # fmt: skip


def gaussian() -> Task:
    """64 independent Gaussian modes of variance 0.01 to 1: a linear flow, whose best kappa is known."""
    variance = torch.logspace(-2, 0, 64, dtype=F64)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        v = variance.to(x)
        return x * v / (v + sigma.to(x) ** 2)

    schedule = fs.EDM(0.02, 40.0)
    return Task("gaussian", fs.DiffusionModel(denoiser, schedule), schedule, (64,))


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """One record per problem."""
    return {f"dode-{name}": measure_problem(name, budget, job.seed) for name in budget.sizes}


def measure_problem(name: str, budget: Budget, seed: int) -> Record:
    """Untrained families and fitted tables for each number of evaluations."""
    size, model = budget.sizes[name], gaussian() if name == "gaussian" else task(name)
    bench = Bench.of(model, size.fit, size.test, seed, steps=budget.reference_steps)
    data: Row = {"problem": name, "samples": size.fit, "held_out": size.test, "counts": list(budget.counts)}
    for n in progress(budget.counts, "evaluations"):
        bench.peers(n)
        for base in BASES:
            ends = bench.learned(base, n)
        if n <= MOST:
            ends[TABLE] = bench.table(n, size.table, iterations=size.iterations)
        if n == SHOWN and len(model.event) > 1:
            shown = {f"{base}, {n} evaluations": UNTRAINED, f"one number per step, {n}": GREEDY,
                     f"{TABLE}, {n}": TABLE}  # fmt: skip
            images = {label: ends[kind][:14] for label, kind in shown.items()}
            data["pictures"] = packed(images | {"the exact ODE": bench.exact[:14]})
    data |= {"rows": bench.rows, "gains": gains(bench.rows, budget.counts)}
    if name == "gaussian":
        data["population"] = population(model, budget.population)
    if name == "digits":
        data["cost"] = cost(model, 256)
    return Record(f"dode-{name}", data, seed)


def population(model: Task, most: int) -> list[Row]:
    """The fitted kappa of DDIM at 10 evaluations against the population's, by number of initial states.

    On Gaussian data of mean 0 each mode of a state is a number times that of the initial state, so the
    expectations in the normal equations are sums over modes. One initial state per mode gives them exactly,
    among those that are fitted to and among those held out.
    """
    modes, problem = model.event[0], model.at(None)

    def kappa(noise: Tensor) -> Tensor:
        return fs.distill_dode(problem, fs.DDIM(), noise=noise, steps=10, guard=False)[0].fit.kappa[1:]

    each, one = torch.zeros(8 * modes, modes, dtype=model.dtype), torch.eye(modes, dtype=model.dtype)
    for part in held_out(len(each)):
        each[part] = model.schedule.sigma_max * one.repeat(len(part) // modes, 1)
    exact, out = kappa(each), []
    for n in (16, 64, 256, 1024, most):
        gap = (kappa(model.noise(n, 5)) - exact).abs() / exact.abs()
        out.append({"start_states": n, "median": float(gap.median()), "largest": float(gap.max())})
    return out


def cost(model: Task, samples: int) -> Row:
    """Seconds and peak memory of a ten-step table's fit, and memory of sampling as many initial states."""
    noise, problem = model.noise(samples, 3), model.at(None)
    start = time.perf_counter()
    fs.distill_dode(problem, fs.DDIM(), noise=noise, steps=10)
    seconds = round(time.perf_counter() - start, 2)
    fitting = peak_bytes(lambda: fs.distill_dode(problem, fs.DDIM(), noise=noise, steps=10))

    def sampling(batch: int) -> int:
        return peak_bytes(lambda: torch.cat(
            [fs.sample(problem, fs.DDIM(), noise=x, steps=10) for x in noise.split(batch)]))  # fmt: skip

    peaks = {str(batch): sampling(batch) for batch in (samples // 4, samples)}
    return {"start_states": samples, "seconds": seconds, "threads": torch.get_num_threads(),
            "fit_bytes": fitting, "sampling_bytes_by_batch": peaks}  # fmt: skip


def tables(records: dict[str, Record]) -> dict[str, str]:
    """RMSE of every base and way of fitting, and the best against the best, per problem."""
    made = {}
    for name, record in records.items():
        rows, lines = record.data["rows"], []
        for n in record.data["counts"]:
            untrained, learned = (
                min((r for r in rows if r["budget"] == n and ("untrained" in r["kind"]) == side),
                    key=lambda r: r["rmse"])
                for side in (True, False)
            )  # fmt: skip
            lines.append([n, f"{untrained['rmse']:.2g} ({untrained.get('which', untrained['base'])})",
                          f"{learned['rmse']:.2g} ({learned['kind']})",
                          f"{untrained['rmse'] / learned['rmse']:.1f}"])  # fmt: skip
        best = table(["evaluations", BEST, "best learned", "ratio"], lines)
        made[name] = f"{bases_table(rows)}\n\n{best}"
    if "dode-gaussian" in records:
        found = records["dode-gaussian"].data["population"]
        gaps = ", ".join(f"{100 * r['median']:.2g} % ({r['start_states']} initial states)" for r in found)
        made["dode-population"] = (
            f"The fitted $\\kappa$ of DDIM at 10 evaluations lies {gaps} from the population's optimum, in "
            "the median over rows."
        )
    if "dode-digits" in records:
        spent = records["dode-digits"].data["cost"]
        few, many = (
            spent["sampling_bytes_by_batch"][b] / 1e6 for b in sorted(spent["sampling_bytes_by_batch"], key=int)
        )
        made["dode-cost"] = (
            f"For 10 steps on the digits teacher, a small network, with {spent['start_states']} initial "
            f"states: {spent['seconds']:.1f} s; at most {spent['fit_bytes'] / 1e6:.2f} MB of tensors, where "
            f"sampling them takes {many:.2f} MB at once and {few:.2f} MB in these batches."
        )
    return made


def draw(records: dict[str, Record], folder: Path) -> None:
    """One panel per problem: learned tables by kind (thin: from DDIM), untrained families dotted."""
    figure, panels = canvas(4.1 * len(records), 4.4, ncols=len(records), squeeze=False)
    for axes, record in zip(panels[0], records.values()):
        draw_errors(axes, record.data["rows"], record.data["counts"], dict(zip(BASES, (0.8, 1.8))))
        axes.set_title(record.data["problem"], fontsize=10)
    panels[0][0].set_ylabel("RMSE to the exact ODE on held-out noise")
    handles, labels = panels[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7.5, ncols=4, loc="outside lower center")
    write(figure, folder / "dode-problems.svg")
    if "dode-digits" in records:
        images_figure(records["dode-digits"], folder / "dode-digits.png")


EXPERIMENT = Experiment(
    "dode-problems", __doc__, 10, BUDGETS, measure, tables, draw,
    records=tuple(f"dode-{name}" for name in PROBLEMS), figures=("dode-problems.svg", "dode-digits.png"),
)  # fmt: skip

if __name__ == "__main__":
    EXPERIMENT.main()
