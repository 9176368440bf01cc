"""Sig-DEG by number of steps, depth of the signature and head, and where its errors accumulate.

On the mixture of `sigdeg_mixture` and on the shipped teacher of 8x8 digits. Each student is judged at every
knot of its grid: along the teacher's noise, step by step, and as a law on fresh noise.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from base import Experiment, Job, Record, Row, canvas, progress, rms, table, ticks, write
from fewstep.distances import median_distance, mmd, sliced_w2
from fewstep.learned.sigdeg.networks import HEADS
from fewstep.learned.trajectories import Trajectories, make_trajectories
from fewstep_analysis import teachers
from sigdeg_mixture import SCHEDULE, SHADES, levels, trained

NAME = "sigdeg-ablation"
COUNTS, FINEST = (3, 5, 10), 30  # all grids are parts of one of 30 steps
DEPTHS = "WHK"
UNTRAINED = "untrained"
SHOWN = {"mixture": "direct", "digits": "graded"}  # the head of the figure's curves: the better one
NUMBERS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)  # labels of logarithmic axes


@dataclass(frozen=True)
class Size:
    """What is spent on one problem.

    Attributes:
        trajectories, judged: of the teacher, to train on and to judge by.
        substeps: of the teacher in each of 30 steps.
        training: of each student.
        pairs: samples of each kind in an MMD.
    """

    trajectories: int
    judged: int
    substeps: int
    training: fs.TrainingOptions
    pairs: int


@dataclass(frozen=True)
class Budget:
    """Samples and iterations of the mixture's teacher, and the two sizes."""

    teacher_data: int
    teacher_iterations: int
    mixture: Size
    digits: Size


def size(trajectories: int, judged: int, substeps: int, *, pairs: int, **training: Any) -> Size:
    return Size(trajectories, judged, substeps, fs.TrainingOptions(**training), pairs)


BUDGETS = {
    "smoke": Budget(
        teacher_data=2048, teacher_iterations=30,
        mixture=size(128, 128, 1, iterations=2, batch_size=32, learning_rate=2e-3, pairs=64),
        digits=size(64, 64, 1, iterations=1, batch_size=16, learning_rate=1e-3, pairs=64),
    ),
    "paper": Budget(
        teacher_data=1 << 18, teacher_iterations=4000,
        mixture=size(8192, 8192, 10, iterations=800, batch_size=256, learning_rate=2e-3, pairs=2048),
        digits=size(3072, 1024, 10, iterations=200, batch_size=128, learning_rate=1e-3, pairs=1024),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A model with three independent sets of its teacher's trajectories.

    Attributes:
        train: what students learn from.
        noise: the noise that students are led along.
        law: the knots that their own samples are compared with.
    """

    problem: fs.DiffusionModel
    train: Trajectories
    noise: Trajectories
    law: Trajectories

    @classmethod
    def of(cls, problem: fs.DiffusionModel, event: tuple[int, ...], schedule: fs.EDM, size: Size, seed: int) -> Task:
        """Three runs of the teacher on the finest grid."""
        counts = (size.trajectories, size.judged, size.judged)
        made = [
            make_trajectories(problem, levels(FINEST, schedule), count=n, event_shape=event, levy="K",
                              substeps=size.substeps, seed=seed + k)
            for k, n in enumerate(counts)
        ]  # fmt: skip
        return cls(problem, *made)

    def coarse(self, steps: int) -> Task:
        """The same trajectories for a student of so many steps."""
        return Task(self.problem, *(d.coarsen(FINEST // steps) for d in (self.train, self.noise, self.law)))


class Replay:
    """A noise source that returns the signatures of trajectories: xi (steps, n, letters, *event)."""

    levy = "K"

    def __init__(self, xi: Tensor) -> None:
        self._next = iter(xi)

    def increment(self, t0: float, t1: float, /) -> fs.Increment:
        return fs.Increment.from_coordinates(t1 - t0, *next(self._next).unbind(1))


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Both problems."""
    start, seed, data = time.process_time(), job.seed, dict[str, Any]()
    models = {
        "mixture": (trained(budget.teacher_data, budget.teacher_iterations, seed), (1,), SCHEDULE),
        "digits": (teachers.digits(), (1, 8, 8), teachers.DIGITS),
    }
    for name, (problem, event, schedule) in models.items():
        size: Size = getattr(budget, name)
        task = Task.of(problem, event, schedule, size, seed)
        grids, floors = dict[str, list[float]](), dict[str, Row]()
        for steps in COUNTS:
            mine = task.coarse(steps)
            grids[str(steps)] = mine.train.sigmas.tolist()
            floors[str(steps)] = distances(mine, list(everything(mine.noise).knots[1:]), size.pairs)
        rows = measure_students(task, size, seed)
        data[name] = {"levels": grids, "floor": floors, "rows": rows, "budget": spent(size)}
    return {NAME: Record(NAME, data | {"cpu_seconds": round(time.process_time() - start)}, seed)}


def measure_students(task: Task, size: Size, seed: int) -> list[Row]:
    """One row per student, and one per number of steps for the untrained parent."""
    rows: list[Row] = []

    def judge(mine: Task, solver: Any, facts: Row) -> None:
        rows.append(facts | errors(mine, solver) | laws(mine, solver, size.pairs, seed + 10))

    for steps in COUNTS:
        mine = task.coarse(steps)
        plan = fs.EulerMaruyama().plan(mine.train.sigmas)
        judge(mine, plan, {"steps": steps, "levy": "", "head": UNTRAINED, "seconds": 0.0})
    kinds = [(steps, levy, head) for steps in COUNTS for levy in DEPTHS for head in HEADS]
    for steps, levy, head in progress(kinds, "student"):
        mine = task.coarse(steps)
        student, report = fs.distill_sigdeg(
            mine.problem, data=mine.train, levy=levy, head=head, forcing=0.0, seed=seed,
            training=size.training,
        )  # fmt: skip
        judge(mine, student, {"steps": steps, "levy": levy, "head": head, "seconds": report.seconds["training"]})
    return rows


def spent(size: Size) -> Row:
    """The size as the record has it."""
    training = size.training
    facts = {"iterations": training.iterations, "batch": training.batch_size, "rate": training.learning_rate}
    return {k: v for k, v in vars(size).items() if k != "training"} | facts


def everything(data: Trajectories) -> Any:
    """All trajectories in one batch."""
    return data.pick(torch.arange(len(data)))


def part(solver: Any, sigmas: Tensor) -> Any:
    """The student, or Euler-Maruyama's plan, on a part of its grid."""
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


def errors(task: Task, solver: Any) -> dict[str, list[float]]:
    """Root mean square errors along the teacher's noise, in units of the knot's standard deviation.

    Returns:
        knots: at each knot, of the sampler alone.
        local: at each knot, of one step from the teacher's knot before.
        takeover: at the end, of the sampler that takes over from the teacher at knot 0, 1, ...
        shares: of the squared error at the end, by the step that made it: the gain of taking over one knot
            later. They sum to 1.
    """
    sigmas, some = task.noise.sigmas, everything(task.noise)
    n, scale = len(sigmas) - 1, [rms(x - x.mean(0)) for x in some.knots]

    def run(first: int, last: int) -> list[Tensor]:
        source = Replay(some.xi[first:])
        return states(task.problem, part(solver, sigmas[first : last + 1]), noise=some.knots[first], path=source)

    def end(first: int, last: int) -> float:
        return rms(run(first, last)[-1] - some.knots[last]) / scale[last]

    knots = [rms(a - b) / s for a, b, s in zip(run(0, n), some.knots[1:], scale[1:])]
    takeover = [end(k, n) for k in range(n)]
    squares = [e * e for e in takeover] + [0.0]
    shares = [(a - b) / squares[0] for a, b in zip(squares, squares[1:])]
    local = [end(k, k + 1) for k in range(n)]
    return {"knots": knots, "local": local, "takeover": takeover, "shares": shares}


def laws(task: Task, solver: Any, pairs: int, seed: int) -> dict[str, list[float]]:
    """Distances of the laws at each knot: samples on fresh noise against the teacher's own, independent."""
    plan, shape = getattr(solver, "plan", solver), (len(task.law), *task.law.event)
    source = fs.FreshIncrements(shape, levy=plan.levy, seed=seed)
    return distances(task, states(task.problem, solver, shape=shape, seed=seed, path=source), pairs)


def distances(task: Task, found: list[Tensor], pairs: int) -> dict[str, list[float]]:
    """At each knot MMD, sliced W2 in units of the knot's standard deviation, and the ratio of variances."""
    out: dict[str, list[float]] = {"mmd": [], "sliced_w2": [], "variance_ratio": []}
    for mine, theirs in zip(found, everything(task.law).knots[1:], strict=True):
        a, b = mine[:pairs], theirs[:pairs]
        out["mmd"].append(mmd(a, b, bandwidth=median_distance(b)))
        out["sliced_w2"].append(sliced_w2(mine, theirs, projections=128) / rms(theirs - theirs.mean(0)))
        out["variance_ratio"].append(float(mine.double().var(0).mean() / theirs.double().var(0).mean()))
    return out


def tables(records: dict[str, Record]) -> dict[str, str]:
    """Per problem: error at the end along the teacher's noise, distances of laws, shares of the error."""
    head = ["steps", "depth", "head", "RMSE", "sliced W2", "MMD", "variance ratio",
            "share of the error by step, %"]  # fmt: skip
    made = {}
    for name in SHOWN:
        data = records[NAME].data[name]
        rows = [
            [r["steps"], r["levy"], r["head"] + (", feedback" if r.get("feedback") else ""),
             *(f"{r[k][-1]:.3f}" for k in ("knots", "sliced_w2", "mmd", "variance_ratio")),
             " ".join(f"{100 * s:.0f}" for s in r.get("shares", []))]
            for steps in COUNTS for r in data["rows"] if r["steps"] == steps
        ]  # fmt: skip
        floor = data["floor"][str(COUNTS[0])]
        last = [f"{floor[k][-1]:.3f}" for k in ("sliced_w2", "mmd", "variance_ratio")]
        rows.append([None, None, "two runs of the teacher", None, *last, None])
        made[f"{NAME}-{name}"] = table(head, rows)
    return made


def row_of(rows: list[Row], steps: int, levy: str, head: str) -> Row:
    """The row of a student; records of version 0.1 have one more with feedback."""
    return next(r for r in rows if (r["steps"], r["levy"], r["head"], r.get("feedback", False)) ==
                (steps, levy, head, False))  # fmt: skip


def draw(records: dict[str, Record], folder: Path) -> None:
    """Per problem: error against steps; errors at the knots; which step made the error at the end."""
    figure, panels = canvas(11.4, 7.0, nrows=2, ncols=3)
    for line, (name, head) in zip(panels, SHOWN.items()):
        data = records[NAME].data[name]
        draw_steps(line[0], data["rows"])
        draw_knots(line[1], data, head)
        draw_shares(line[2], data, head)
        line[0].set_ylabel(f"{name}: RMSE at the end / std")
        line[1].set_title(f"10 steps, {head}: at the knots, / std", fontsize=10)
        line[2].set_title(f"10 steps, {head}: error at the end", fontsize=10)
    panels[0][0].set_title("error along the teacher's noise", fontsize=10)
    for axes in panels[0]:
        axes.set_xlabel("")
    write(figure, folder / f"{NAME}.svg")


def finish(axes: Any, room: float, xs: Any = NUMBERS) -> None:
    """Plain numbers on both axes, and room for the legend below the curves."""
    left, right = axes.get_xlim()
    low, high = axes.get_ylim()
    low *= (low / high) ** room
    ticks(axes, [v for v in xs if min(left, right) <= v <= max(left, right)])
    ticks(axes, [v for v in NUMBERS if low <= v <= high], "y")
    axes.set_ylim(low, high)
    axes.legend(fontsize=7.5, ncols=2, frameon=False, loc="lower left")


def draw_steps(axes: Any, rows: list[Row]) -> None:
    for levy in DEPTHS:
        for head, style in zip(HEADS, ("o-", "s--")):
            ends = [row_of(rows, n, levy, head)["knots"][-1] for n in COUNTS]
            axes.loglog(COUNTS, ends, style, color=SHADES[levy], ms=4, lw=1.2, label=f"{levy}, {head}")
    ends = [row_of(rows, n, "", UNTRAINED)["knots"][-1] for n in COUNTS]
    axes.loglog(COUNTS, ends, "o:", color="0.5", ms=4, lw=1.2, label=UNTRAINED)
    axes.set_xlabel("steps")
    finish(axes, 0.45, COUNTS)


def draw_knots(axes: Any, data: Row, head: str) -> None:
    """Accumulated errors thick, of one step from the teacher's knot thin, the laws' distance dotted."""
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
    axes.invert_xaxis()
    axes.set_xlabel("sigma of the knot")
    finish(axes, 0.5)


def draw_shares(axes: Any, data: Row, head: str) -> None:
    for k, levy in enumerate(DEPTHS):
        shares = row_of(data["rows"], 10, levy, head)["shares"]
        axes.bar([i + 0.27 * (k - 1) for i in range(1, 11)], [100 * s for s in shares], 0.25,
                 color=SHADES[levy], label=levy)  # fmt: skip
    axes.axhline(0, color="0.4", lw=0.8)
    axes.set_xticks(range(1, 11), [f"{s:.2g}" for s in data["levels"]["10"][1:]], fontsize=8, rotation=45)
    axes.set_xlabel("sigma that the step ends at")
    axes.set_ylabel("share made by the step, %")
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


EXPERIMENT = Experiment(
    NAME, __doc__, 10, BUDGETS, measure, tables, draw, figures=(f"{NAME}.svg",), needs="scikit-learn"
)

if __name__ == "__main__":
    EXPERIMENT.main()
