"""D-ODE on the MNIST U-Net: distance to the exact ODE, and pictures."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fewstep as fs
from base import Experiment, Job, Record, Row, canvas, images_figure, packed, progress, table, write
from dode_bench import (  # fmt: skip
    ANY,
    BEST,
    GREEDY,
    PEER_SHADES,
    SPACINGS,
    TABLE,
    TERMS,
    Bench,
    cell,
    draw_errors,
    gains,
    peak_bytes,
)
from fewstep_analysis.distillation import Task, mnist

NAME = "dode-mnist"
MAIN = "IPNDM(2)"
# even in the model's time from the largest noise level, then to 0: no evaluation at the smallest level
SPACING = "trailing"
EVEN = "best untrained, even grids"  # over SPACINGS alone; BEST is over these and SPACING
GUIDANCE = 3.0


@dataclass(frozen=True)
class Budget:
    """What a run computes.

    Attributes:
        fit, test, scout: initial states to fit to, to judge on, and to choose untrained samplers by.
        iterations: of fitted tables.
        reference_steps: of the ODE that is taken as exact.
        counts: network evaluations.
        shown: those of the pictures.
    """

    fit: int
    test: int
    scout: int
    iterations: int
    reference_steps: int
    counts: tuple[int, ...]
    shown: tuple[int, ...]


BUDGETS = {
    "smoke": Budget(
        fit=16, test=16, scout=2, iterations=1, reference_steps=3, counts=(5,), shown=(5,)
    ),
    "paper": Budget(
        fit=64, test=128, scout=16, iterations=8, reference_steps=80, counts=(5, 8, 10),
        shown=(5, 8),
    ),
}  # fmt: skip


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Fit and judge, with one class per sample; the guided model at five evaluations alone."""
    start, seed, steps, task = time.process_time(), job.seed, budget.reference_steps, mnist()
    bench = Bench.of(task, budget.fit, budget.test, seed, steps)
    scout = Bench.of(task, budget.fit, budget.scout, seed + 1, steps)
    check = bench.rmse(bench.sample(fs.IPNDM(4), steps=3 * steps // 4))
    for n in progress(budget.counts, "evaluations"):
        untrained(bench, scout, n)
        for base in ("DDIM", "DPMSolverPP(2)", MAIN):
            bench.learned(base, n, ways(base, n), SPACING)
        if n in budget.shown:
            bench.table(n, starts=1, iterations=budget.iterations, batch=16)
    data: Row = {
        "samples": budget.fit, "held_out": budget.test, "counts": list(budget.counts), "spacing": SPACING,
        "rows": bench.rows, "reference": f"UniPC(3), {steps} steps", "reference_against_IPNDM(4)": check,
        "gains": {kind: gains(bench.rows, budget.counts, (kind,)) for kind in (BEST, EVEN)},
        "pictures": packed(pictures(bench, budget.shown)),
        "guided": guided(budget, seed), "cost": cost(task, budget.fit),
    }  # fmt: skip
    return {NAME: Record(NAME, data | {"seconds": round(time.process_time() - start)}, seed)}


def ways(base: str, n: int) -> dict[str, Row]:
    """The options of each way of fitting a base at this count; the teacher takes 30 to 40 steps."""
    quick: Row = {"teacher": fs.IPNDM(4), "teacher_substeps": {5: 6, 8: 4}.get(n, 3)}
    return {GREEDY: quick} | ({TERMS: quick | {"terms": 3}} if base == MAIN else {})


def untrained(bench: Bench, scout: Bench, n: int) -> None:
    """Each family's best over the even grids, and over these and the trailing one."""
    bench.peers(n, SPACINGS, scout, EVEN)
    bench.peers(n, (SPACING,), scout, BEST)
    for family in PEER_SHADES:
        even, trailing = (bench.row(family, kind, n) for kind in (EVEN, BEST))
        if even["rmse"] < trailing["rmse"]:
            trailing |= {k: even[k] for k in ("rmse", "which")}
            bench.made[family, BEST, n] = bench.made[family, EVEN, n]


def shown(bench: Bench, n: int) -> dict[str, Any]:
    """The solvers of the pictures: the best untrained one and two fits."""
    family = min(PEER_SHADES, key=lambda f: float(bench.row(f, BEST, n)["rmse"]))
    return {
        f"{bench.row(family, BEST, n)['which']}, {n} evaluations": bench.made[family, BEST, n],
        f"one number per step, {n}": bench.made[MAIN, GREEDY, n],
        f"{TABLE}, {n}": bench.made[ANY, TABLE, n],
    }


def pictures(bench: Bench, counts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Images of the same noise, one row per sampler, one column per digit."""
    assert bench.test_labels is not None
    which = [int((bench.test_labels == k).nonzero()[0]) for k in range(10)]
    rows = {"fine ODE": bench.exact[which]}
    for n in counts:
        rows |= {label: bench.sample(solver)[which] for label, solver in shown(bench, n).items()}
    return rows


def guided(budget: Budget, seed: int) -> list[Row]:
    """The model with classifier-free guidance, fitted by the closed form alone."""
    bench = Bench.of(mnist(guidance=GUIDANCE), budget.fit, budget.test // 4, seed, budget.reference_steps // 2)
    bench.learned(MAIN, 5, {TERMS: {"terms": 3, "teacher": fs.IPNDM(4), "teacher_substeps": 6}}, SPACING)
    return bench.rows


def cost(task: Task, samples: int) -> Row:
    """Peak memory of a three-step fit, and of sampling the same initial states in the fit's batches."""
    noise, labels = task.noise(samples, 3), task.labels(samples, 3)
    assert labels is not None
    fit = partial(fs.distill_dode, task.problem, fs.DDIM(), steps=3, teacher_substeps=2)
    fitting = peak_bytes(lambda: fit(noise=noise, labels=labels))
    parts = list(zip(noise.split(samples // 4), labels.split(samples // 4)))
    sampling = peak_bytes(lambda: torch.cat([fs.sample(task.at(y), fs.DDIM(), noise=x, steps=3) for x, y in parts]))
    return {"start_states": samples, "fit_bytes": fitting, "sampling_bytes": sampling}


def tables(records: dict[str, Record]) -> dict[str, str]:
    """RMSE of the untrained families and of the fits, best against best."""
    data = records[NAME].data
    counts, words = data["counts"], {EVEN: "best of log sigma, Karras, time", BEST: "and trailing"}
    found = {(r["base"], r["kind"], r["budget"]): r for r in data["rows"]}
    solvers = dict.fromkeys(key[:2] for key in found)
    rows: list[list[Any]] = []
    for base, kind in sorted(solvers, key=lambda s: list(words).index(s[1]) if s[1] in words else 2):
        which = [found.get((base, kind, n), {}).get("which") for n in counts]
        cells = [cell(found, base, kind, n) + (f" ({w})" if w else "") for n, w in zip(counts, which)]
        rows.append([f"{base}, {words.get(kind, f'trailing: {kind}')}", *cells])
    for kind, name in ((EVEN, "best untrained on even grids"), (BEST, BEST)):
        rows.append([f"*{name} / best learned*", *(f"{data['gains'][kind][str(n)]:.2f}" for n in counts)])
    spent = " / ".join(f"{found[MAIN, GREEDY, n]['seconds']:.0f}" for n in counts)
    used = data["cost"]
    note = (
        f"One number per step took {spent} CPU seconds to fit. A three-step fit with "
        f"{used['start_states']} initial states takes {used['fit_bytes'] / 1e6:.1f} MB of tensors, "
        f"sampling them in the same batches {used['sampling_bytes'] / 1e6:.1f} MB, most of it activations."
    )
    head = ["solver", *map(str, counts)]
    return {NAME: f"{table(head, rows)}\n\n{note}"}


def draw(records: dict[str, Record], folder: Path) -> None:
    """Distance to the exact ODE against evaluations, and pictures."""
    figure, axes = canvas(6.4, 4.8)
    data = records[NAME].data
    draw_errors(axes, data["rows"], data["counts"], {"DPMSolverPP(2)": 0.8, MAIN: 1.8})
    axes.set_ylabel("RMSE to the exact ODE on held-out noise")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7.5, ncols=3, loc="outside lower center")
    write(figure, folder / f"{NAME}.svg")
    images_figure(records[NAME], folder / f"{NAME}.png")


EXPERIMENT = Experiment(
    NAME, __doc__, 18, BUDGETS, measure, tables, draw, figures=(f"{NAME}.svg", f"{NAME}.png"),
    needs="diffusers",
)  # fmt: skip

if __name__ == "__main__":
    EXPERIMENT.main()
