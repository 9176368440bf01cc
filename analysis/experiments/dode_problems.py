"""D-ODE on a Gaussian, a smooth mixture and handwritten digits: distance to the exact ODE for 3 to 20
evaluations, beside the best untrained samplers of the same cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from dode_ring import STYLES, kinds
from dode_tools import COUNTS, GREEDY, GRID, KINDS, PEERS, UNTRAINED, Bench, Task, table, task
from fewstep.learned.training import held_out
from fewstep_analysis.figures import canvas, colour, image_rows, write
from fewstep_analysis.memory import PeakMemory
from fewstep_analysis.parallel import progress
from fewstep_analysis.records import Record

TAKES = "10 min"
BASES = ("DDIM", "DPMSolverPP(2)")
# start states fitted to, judged on; iterations of grid and weights, of kappa alone
BUDGETS = {
    "gaussian": (1024, 1024, 1000, 400), "smooth": (1024, 1024, 2000, 400), "digits": (1024, 512, 500, 150),
}  # fmt: skip
SHOWN = 5  # evaluations of the pictures
PEER_SHADES = {
    "DPM-Solver++": "DPMSolverPP",
    "UniPC": "UniPC",
    "DEIS": "LogODE",
    "iPNDM": "DerivativeFreeMilstein",
}


def linear() -> Task:
    """64 independent Gaussian modes of variance 0.01 to 1: a linear flow, kappa with a population optimum."""
    variance = torch.logspace(-2, 0, 64, dtype=torch.float64)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        v = variance.to(x)
        return x * v / (v + sigma.to(x) ** 2)

    schedule = fs.EDM(0.02, 40.0)
    return Task("gaussian", fs.DiffusionModel(denoiser, schedule), schedule, (64,))


def study(name: str, seed: int = 0, quick: bool = False) -> tuple[Record, dict[str, Tensor]]:
    """One problem; returns its record and, for images, rows of pictures from the same noise."""
    fit, test, iterations, descents = BUDGETS[name] if not quick else (64, 64, 5, 5)
    asked = linear() if name == "gaussian" else task(name)
    bench = Bench.of(asked, fit, test, seed, steps=50 if quick else 400)
    pictures: dict[str, Tensor] = {}
    counts = (3, 5) if quick else COUNTS
    for n in progress(counts, "budget"):
        bench.peers(n)
        for base in BASES:
            ends = bench.learned(base, n, kinds(base, BASES[1:], iterations, descents, 3, minibatch=128))
            if n == SHOWN and base == BASES[1] and len(asked.event) > 1:
                pictures = pick(bench, ends, n)
    data: dict[str, Any] = {"problem": name, "samples": fit, "held_out": test, "counts": list(counts)}
    data |= {"rows": bench.rows, "gains": gains(bench.rows, counts)}
    if name == "gaussian":
        data["population"] = population(asked, 64 if quick else 16384)
    if name == "digits":
        data["cost"] = cost(asked, 256)
    return Record(f"dode-{name}", data, seed), pictures


def gains(rows: list[dict[str, Any]], counts: Sequence[int]) -> dict[str, float]:
    """Per count the best untrained error over the best learned one."""
    out = {}
    for n in counts:
        learned, plain = ([r["rmse"] for r in rows if r["budget"] == n and (r["kind"] in KINDS[1:]) == side]
                          for side in (True, False))  # fmt: skip
        out[str(n)] = min(plain) / min(learned)
    return out


def population(task: Task, many: int) -> list[dict[str, float]]:
    """The fitted kappa of DDIM at 10 evaluations against the population's, by number of start states.

    On Gaussian data of mean 0 each mode of a state is a number times that of the start state, so that the
    expectations in the normal equations are sums over modes: one start state a mode has them exactly, among
    those that are fitted to and among those held out.
    """
    modes, problem = task.event[0], task.at(None)
    options: dict[str, Any] = {"steps": 10, "guard": False}
    each, one = torch.zeros(8 * modes, modes, dtype=task.dtype), torch.eye(modes, dtype=task.dtype)
    for part in held_out(len(each)):
        each[part] = task.schedule.sigma_max * one.repeat(len(part) // modes, 1)
    exact, _ = fs.distill_dode(problem, fs.DDIM(), noise=each, **options)
    out = []
    for n in (16, 64, 256, 1024, many):
        fitted, _ = fs.distill_dode(problem, fs.DDIM(), noise=task.noise(n, 5), **options)
        gap = (fitted.kappa - exact.kappa)[1:].abs() / exact.kappa[1:].abs()
        out.append({"start_states": n, "median": float(gap.median()), "largest": float(gap.max())})
    return out


def cost(asked: Task, samples: int) -> dict[str, Any]:
    """Seconds and peak memory of a ten-step table's fit, and of sampling as many start states."""
    noise, problem = asked.noise(samples, 3), asked.at(None)
    start = time.perf_counter()
    fs.distill_dode(problem, fs.DDIM(), noise=noise, steps=10)
    seconds = time.perf_counter() - start
    with PeakMemory() as fitting:
        fs.distill_dode(problem, fs.DDIM(), noise=noise, steps=10)
    peaks = {}
    for batch in (samples // 4, samples):
        with PeakMemory() as sampling, torch.no_grad():
            torch.cat([fs.sample(problem, fs.DDIM(), noise=x, steps=10) for x in noise.split(batch)])
        peaks[str(batch)] = sampling.peak
    return {"start_states": samples, "seconds": round(seconds, 2), "threads": torch.get_num_threads(),
            "fit_bytes": fitting.peak, "sampling_bytes_by_batch": peaks}  # fmt: skip


def pick(bench: Bench, ends: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """Rows of images of one noise: the base, the best learned table, the exact ODE."""
    shown = {f"{BASES[1]}, {n} evaluations": UNTRAINED, f"one number a step, {n}": GREEDY,
             f"grid and weights, {n}": GRID}  # fmt: skip
    return {label: ends[kind][:14] for label, kind in shown.items()} | {"the exact ODE": bench.exact[:14]}


def draw(records: list[Record], path: str | Path) -> Path:
    """A panel a problem: learned tables by kind, from DDIM thin, and the untrained families dotted."""
    figure, panels = canvas(4.1 * len(records), 4.4, ncols=len(records), squeeze=False)
    for axes, record in zip(panels[0], records):
        rows = record.data["rows"]
        for family in PEERS:
            points = [(r["budget"], r["rmse"]) for r in rows if r["base"] == family]
            axes.loglog(*zip(*points), ":", color=colour(PEER_SHADES[family]), marker="s", ms=3, lw=1,
                        label=f"{family}, untrained")  # fmt: skip
        for base, width in zip(BASES, (0.8, 1.8)):
            for kind, (shade, style) in STYLES.items():
                points = [(r["budget"], r["rmse"]) for r in rows if (r["base"], r["kind"]) == (base, kind)]
                if points and (kind != UNTRAINED or base == "DDIM"):
                    axes.loglog(*zip(*points), style, color=shade, marker="o", ms=3, lw=width,
                                label=f"{base}, {kind}")  # fmt: skip
        axes.set_title(record.data["problem"], fontsize=10)
        axes.set_xlabel("network evaluations")
        axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
        axes.set_xticks([], minor=True)
        axes.grid(True, which="major", alpha=0.3)
    panels[0][0].set_ylabel("RMSE to the exact ODE on held-out noise")
    handles, labels = panels[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7.5, ncols=4, loc="outside lower center")
    return write(figure, path)


def lines(record: Record) -> list[str]:
    """The tables of a record."""
    data = record.data
    peers = [r for r in data["rows"] if r["kind"] == "best untrained"]
    out = [
        record.kind,
        table(data["rows"], KINDS, data["counts"]),
        table(peers, ("best untrained",), data["counts"]),
    ]
    out += [f"best untrained / best learned: {data['gains']}"]
    return out + [f"{k}: {data[k]}" for k in ("population", "cost") if k in data]


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write a record for each problem, the figure and the pictures; returns the tables."""
    records, said = [], []
    for name in BUDGETS:
        record, pictures = study(name, seed, quick=budget == "smoke")
        record.save(out / "records" / f"dode-{name}.json")
        records.append(record)
        said += lines(record)
        if pictures:
            image_rows(pictures, out / "figures" / f"dode-{name}.png")
    draw(records, out / "figures" / "dode-problems.svg")
    return said
