"""Sig-DEG taken apart: steps, depth of the signature, head and feedback, and where the errors accumulate.

On the mixture of `sigdeg_mixture` and on the shipped teacher of 8x8 digits. Each student is judged at every
knot of its grid: along the teacher's noise, step by step, and as a law on fresh noise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep.distances import median_distance, mmd, sliced_w2
from fewstep.learned.sigdeg.networks import HEADS
from fewstep.learned.trajectories import Batch, Trajectories, make_trajectories
from fewstep_analysis import teachers
from fewstep_analysis.figures import canvas, write
from fewstep_analysis.parallel import progress
from fewstep_analysis.records import Record
from sigdeg_mixture import SCHEDULE, SHADES, levels, trained

TAKES = "10 min"
COUNTS, FINEST = (3, 5, 10), 30  # all grids are parts of one of 30 steps
DEPTHS = "WHK"
UNTRAINED = "untrained"
SHOWN = {"mixture": "direct", "digits": "graded"}  # the head of the figure's curves: the nearer one
FEEDBACK: dict[str, Any] = {
    "steps": 5,
    "levy": "H",
    "head": "direct",
}  # the one setting that is also tried with feedback


@dataclass(frozen=True)
class Budget:
    """How much for one problem.

    Attributes:
        trajectories, judged: of the teacher, to train on and to judge by.
        substeps: of the teacher in each of 30 steps.
        iterations, batch, rate: of training.
        pairs: samples of each kind in an MMD.
    """

    trajectories: int
    judged: int
    substeps: int
    iterations: int
    batch: int
    rate: float
    pairs: int


PAPER = {
    "mixture": Budget(8192, 8192, 10, 800, 256, 2e-3, 2048),
    "digits": Budget(3072, 1024, 10, 200, 128, 1e-3, 1024),
}  # fmt: skip
SMOKE = {"mixture": Budget(128, 128, 1, 2, 32, 2e-3, 64), "digits": Budget(64, 64, 1, 1, 16, 1e-3, 64)}
TEACHER_DATA = {"paper": (1 << 18, 4000), "smoke": (2048, 30)}  # samples and iterations of the mixture's


@dataclass(frozen=True)
class Task:
    """A model with three independent sets of its teacher's trajectories, on the finest grid.

    Attributes:
        train: what students learn from.
        noise: whose noise they are led along.
        law: whose knots their own samples are held against.
    """

    name: str
    problem: fs.DiffusionModel
    train: Trajectories
    noise: Trajectories
    law: Trajectories

    @classmethod
    def of(
        cls, name: str, problem: fs.DiffusionModel, event: tuple[int, ...], schedule: fs.EDM, budget: Budget,
        seed: int,
    ) -> Task:  # fmt: skip
        """Three runs of the teacher."""
        counts = (budget.trajectories, budget.judged, budget.judged)
        made = [
            make_trajectories(problem, levels(FINEST, schedule), count=n, event_shape=event, levy="K",
                              substeps=budget.substeps, seed=seed + k) for k, n in enumerate(counts)
        ]  # fmt: skip
        return cls(name, problem, *made)

    def coarse(self, steps: int) -> Task:
        """The same trajectories for a student of so many steps."""
        parts = (d.coarsen(FINEST // steps) for d in (self.train, self.noise, self.law))
        return Task(self.name, self.problem, *parts)


class Replay:
    """A noise source that gives the signatures of trajectories again: xi (steps, n, letters, *event)."""

    levy = "K"

    def __init__(self, xi: Tensor) -> None:
        self._next = iter(xi)

    def increment(self, t0: float, t1: float, /) -> fs.Increment:
        return fs.Increment.from_coordinates(t1 - t0, *next(self._next).unbind(1))


def part(solver: Any, sigmas: Tensor) -> Any:
    """The student, or the plan of Euler and Maruyama, on a part of its grid."""
    plan = fs.EulerMaruyama().plan(sigmas)
    if isinstance(solver, fs.SigSampler):
        return fs.SigSampler(plan, solver.network, solver.levy, solver.residual)
    return plan


def states(problem: fs.DiffusionModel, solver: Any, **start: Any) -> list[Tensor]:
    """The states at the knots that a sampler passes, without the first."""
    out: list[Tensor] = []
    with torch.no_grad():
        fs.sample(problem, solver, callback=lambda i, x, D: out.append(x), **start)
    return out


def errors(task: Task, solver: Any, feedback: bool) -> dict[str, list[float]]:
    """Root mean square errors along the teacher's noise, each in units of its knot's standard deviation.

    Returns:
        knots: at each knot, of the sampler alone.
        local: at each knot, of one step from the teacher's knot before.
        takeover: at the end, of the sampler that takes over from the teacher at knot 0, 1, ...
        shares: of the squared error at the end, by the step that made it: what is gained by taking over one
            knot later. Their sum is 1.
        With feedback the first alone, since a step needs the value of the step before.
    """
    sigmas, some = task.noise.sigmas, task.noise.pick(torch.arange(len(task.noise)))
    n, scale = len(sigmas) - 1, [_rms(x - x.mean(0)) for x in some.knots]
    whole = states(task.problem, solver, noise=some.knots[0], path=Replay(some.xi))
    out = {"knots": [_rms(a - b) / s for a, b, s in zip(whole, some.knots[1:], scale[1:])]}
    if feedback:
        return out

    def end(first: int, last: int) -> float:
        solver_part = part(solver, sigmas[first : last + 1])
        passed = states(task.problem, solver_part, noise=some.knots[first], path=Replay(some.xi[first:]))
        return _rms(passed[-1] - some.knots[last]) / scale[last]

    out["local"] = [end(k, k + 1) for k in range(n)]
    out["takeover"] = [end(k, n) for k in range(n)]
    squares = [e * e for e in out["takeover"]] + [0.0]
    out["shares"] = [(a - b) / squares[0] for a, b in zip(squares, squares[1:])]
    return out


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def laws(task: Task, solver: Any, budget: Budget, seed: int) -> dict[str, list[float]]:
    """Distances of the laws at each knot: samples on fresh noise against the teacher's own, independent."""
    plan = getattr(solver, "plan", solver)
    shape = (len(task.law), *task.law.event)
    source = fs.FreshIncrements(shape, levy=plan.levy, seed=seed)
    return distances(task, states(task.problem, solver, shape=shape, seed=seed, path=source), budget)


def distances(task: Task, found: list[Tensor], budget: Budget) -> dict[str, list[float]]:
    """At each knot MMD, sliced W2 in units of the knot's standard deviation, and the ratio of variances."""
    out: dict[str, list[float]] = {"mmd": [], "sliced_w2": [], "variance_ratio": []}
    knots = task.law.pick(torch.arange(len(task.law))).knots[1:]
    for mine, theirs in zip(found, knots, strict=True):
        a, b = mine[: budget.pairs], theirs[: budget.pairs]
        out["mmd"].append(mmd(a, b, bandwidth=median_distance(b)))
        out["sliced_w2"].append(sliced_w2(mine, theirs, projections=128) / _rms(theirs - theirs.mean(0)))
        out["variance_ratio"].append(float(mine.double().var(0).mean() / theirs.double().var(0).mean()))
    return out


def kinds() -> Iterator[dict[str, Any]]:
    """What students are tried."""
    for steps in COUNTS:
        for levy in DEPTHS:
            for head in HEADS:
                yield {"steps": steps, "levy": levy, "head": head, "feedback": False}
    yield FEEDBACK | {"feedback": True}


def measure(task: Task, budget: Budget, seed: int) -> list[dict[str, Any]]:
    """A row for each student, and for the untrained parent of each number of steps."""
    rows: list[dict[str, Any]] = []
    for steps in COUNTS:
        mine = task.coarse(steps)
        plan = fs.EulerMaruyama().plan(mine.train.sigmas)
        rows.append({"steps": steps, "levy": "", "head": UNTRAINED, "feedback": False, "seconds": 0.0}
                    | errors(mine, plan, False) | laws(mine, plan, budget, seed + 10))  # fmt: skip
    for kind in progress(list(kinds()), "student"):
        mine = task.coarse(kind["steps"])
        student, report = fs.distill_sigdeg(
            mine.problem, data=mine.train, levy=kind["levy"], head=kind["head"], feedback=kind["feedback"],
            iterations=budget.iterations, batch=budget.batch, rate=budget.rate, seed=seed,
        )  # fmt: skip
        rows.append(kind | {"seconds": report.seconds["training"]} | errors(mine, student, kind["feedback"])
                    | laws(mine, student, budget, seed + 10))  # fmt: skip
    return rows


def study(seed: int = 0, budget: str = "paper") -> Record:
    """Both problems."""
    began, data = time.process_time(), dict[str, Any]()
    budgets = SMOKE if budget == "smoke" else PAPER
    models = {
        "mixture": (trained(*TEACHER_DATA[budget], seed), (1,), SCHEDULE),
        "digits": (teachers.digits(), (1, 8, 8), teachers.DIGITS),
    }
    for name, (problem, event, schedule) in models.items():
        task = Task.of(name, problem, event, schedule, budgets[name], seed)
        grids, floors = dict[str, list[float]](), dict[str, Any]()
        for steps in COUNTS:
            mine = task.coarse(steps)
            every: Batch = mine.noise.pick(torch.arange(len(mine.noise)))
            grids[str(steps)] = mine.train.sigmas.tolist()
            floors[str(steps)] = distances(mine, list(every.knots[1:]), budgets[name])
        rows = measure(task, budgets[name], seed)
        data[name] = {"levels": grids, "floor": floors, "rows": rows, "budget": vars(budgets[name])}
    return Record("sigdeg-ablation", data | {"cpu_seconds": round(time.process_time() - began)}, seed)


def row_of(rows: list[dict[str, Any]], steps: int, levy: str, head: str, feedback: bool = False) -> Any:
    """The row of a student."""
    expected = (steps, levy, head, feedback)
    return next(r for r in rows if (r["steps"], r["levy"], r["head"], r["feedback"]) == expected)


def table(record: Path, problem: str) -> str:
    """In Markdown: error at the end along the teacher's noise, distances of laws, shares of the error."""
    data = Record.load(record).data[problem]
    lines = [
        "| steps | depth | head | RMSE | sliced W2 | MMD | variance ratio | share of the error by step, % |"
    ]
    lines += ["| --- " * 8 + "|"]
    for steps in COUNTS:
        for r in (r for r in data["rows"] if r["steps"] == steps):
            cells = [steps, r["levy"] or "-", r["head"] + (", feedback" if r["feedback"] else "")]
            cells += [f"{r[k][-1]:.3f}" for k in ("knots", "sliced_w2", "mmd", "variance_ratio")]
            cells += [" ".join(f"{100 * s:.0f}" for s in r.get("shares", [])) or "-"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    floor = data["floor"][str(COUNTS[0])]
    cells = ["-", "-", "two runs of the teacher", "-"]
    cells += [f"{floor[k][-1]:.3f}" for k in ("sliced_w2", "mmd", "variance_ratio")]
    return "\n".join([*lines, "| " + " | ".join([*cells, "-"]) + " |"])


def draw(record: Record, path: str | Path) -> Path:
    """A row a problem: error against steps; errors along the knots; who made the error at the end."""
    figure, panels = canvas(11.4, 7.0, nrows=2, ncols=3)
    for line, (name, head) in zip(panels, SHOWN.items()):
        data = record.data[name]
        _steps(line[0], data["rows"])
        _knots(line[1], data, head)
        _shares(line[2], data, head)
        line[0].set_ylabel(f"{name}: RMSE at the end / std")
        line[1].set_title(f"10 steps, {head}: at the knots, / std", fontsize=10)
        line[2].set_title(f"10 steps, {head}: error at the end", fontsize=10)
    panels[0][0].set_title("error along the teacher's noise", fontsize=10)
    for axes in panels[0]:
        axes.set_xlabel("")
    return write(figure, path)


def _plain(axis: Any) -> None:
    """Ticks as plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_locator(NullLocator())


def _steps(axes: Any, rows: list[dict[str, Any]]) -> None:
    for levy in DEPTHS:
        for head, style in zip(HEADS, ("o-", "s--")):
            ends = [row_of(rows, n, levy, head)["knots"][-1] for n in COUNTS]
            axes.loglog(COUNTS, ends, style, color=SHADES[levy], ms=4, lw=1.2, label=f"{levy}, {head}")
    ends = [row_of(rows, n, "", UNTRAINED)["knots"][-1] for n in COUNTS]
    axes.loglog(COUNTS, ends, "o:", color="0.5", ms=4, lw=1.2, label=UNTRAINED)
    last = row_of(rows, **FEEDBACK, feedback=True)
    axes.loglog([last["steps"]], last["knots"][-1:], "*", color=SHADES["H"], ms=10, mec="k", mew=0.6,
                label="H, direct, feedback")  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(low * (low / high) ** 0.45, high)
    _plain(axes.yaxis)
    axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("steps")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=7.5, ncols=2, frameon=False, loc="lower left")


def _knots(axes: Any, data: dict[str, Any], head: str) -> None:
    """Accumulated thick, of one step from the teacher's knot thin, the laws' distance dotted."""
    sigmas = data["levels"]["10"][1:]
    for levy in DEPTHS:
        row, shade = row_of(data["rows"], 10, levy, head), SHADES[levy]
        axes.loglog(sigmas, row["knots"], "o-", color=shade, ms=4, lw=1.8, label=levy)
        axes.loglog(sigmas, row["local"], "-", color=shade, lw=0.8)
        axes.loglog(sigmas, row["sliced_w2"], ":", color=shade, lw=1.2)
    axes.loglog(sigmas, data["floor"]["10"]["sliced_w2"], ":", color="0.5", lw=1.2)
    for style, width, label, shade in (
        ("o-", 1.8, "RMSE, accumulated", "0.2"), ("-", 0.8, "RMSE of one step", "0.2"),
        (":", 1.2, "sliced W2 of the laws", "0.2"), (":", 1.2, "of two teachers", "0.5"),
    ):  # fmt: skip
        axes.plot([], [], style, color=shade, lw=width, ms=4, label=label)
    low, high = axes.get_ylim()
    axes.set_ylim(low * (low / high) ** 0.5, high)
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    axes.invert_xaxis()
    axes.set_xlabel("sigma of the knot")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=7.5, ncols=2, frameon=False, loc="lower left")


def _shares(axes: Any, data: dict[str, Any], head: str) -> None:
    places = range(1, 11)
    for k, levy in enumerate(DEPTHS):
        shares = row_of(data["rows"], 10, levy, head)["shares"]
        axes.bar([i + 0.27 * (k - 1) for i in places], [100 * s for s in shares], 0.25, color=SHADES[levy],
                 label=levy)  # fmt: skip
    axes.axhline(0, color="0.4", lw=0.8)
    axes.set_xticks(places, [f"{s:.2g}" for s in data["levels"]["10"][1:]], fontsize=8, rotation=45)
    axes.set_xlabel("sigma that the step ends at")
    axes.set_ylabel("share made by the step, %")
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record and the figure; returns a table for each problem."""
    record = study(seed, budget)
    file = record.save(out / "records" / "sigdeg-ablation.json")
    draw(record, out / "figures" / "sigdeg-ablation.svg")
    return [line for name in PAPER for line in (name, table(file, name))]
