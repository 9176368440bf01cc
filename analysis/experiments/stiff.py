"""Solvers for stiff and superlinear drifts: mean-square stability, and error against drift evaluations."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import fewstep as fs
from base import F64, Experiment, Job, Record, canvas, colour, progress, rms, single_threaded, table, write

CELLS, SPREAD = 32, 0.05  # of the stiff problem: grid points on a line, coefficient of the Laplacian


@dataclass(frozen=True)
class Budget:
    """Points of the stability curves; paths, levels of steps (powers of two) and the level of the references."""

    points: int
    paths: int
    levels: tuple[int, ...]
    fine: int


BUDGETS = {"smoke": Budget(20, 4, (4, 8), 10), "paper": Budget(1001, 100, tuple(range(2, 11)), 13)}
LINES = {
    "EulerMaruyama": colour("EulerMaruyama"), "SKROCK": "#B8860B", "SKROCK(20)": "#7A4FA3",
    "ImplicitEuler": colour("Milstein"), "ExponentialEuler": colour("SigStep"),
    "TamedEuler": "#B8860B", "TamedMilstein": "#7A4FA3", "TruncatedEuler": colour("SigStep"),
}  # fmt: skip
MARKS = dict(zip(LINES, "osv^DPX<"))


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """The borders of stability, and the errors on one stiff and one superlinear problem."""
    single_threaded()
    data = {"stability": stability(budget.points), "stiff": stiff(budget, job.seed), "cubic": cubic(budget, job.seed)}
    return {"stiff": Record("stiff solvers", data, job.seed)}


def stability(points: int) -> dict[str, list[list[float]]]:
    """For h |a| the largest h b^2 at which a step of dy = a y dt + b y dW does not increase E y^2; those above 0.

    The steps of these solvers are linear in W, so two values of W give E y^2.
    """
    found: dict[str, list[list[float]]] = {}
    times = torch.tensor([0.0, 1.0], dtype=F64)
    for name in ("EulerMaruyama", "SKROCK(5)", "SKROCK(20)", "ImplicitEuler", "ExponentialEuler"):
        for size in torch.logspace(-1, 4, points, dtype=F64).tolist():
            solver: fs.StochasticSolver = {
                "EulerMaruyama": fs.EulerMaruyama(), "SKROCK(5)": fs.SKROCK(5), "SKROCK(20)": fs.SKROCK(20),
                "ImplicitEuler": fs.ImplicitEuler(event_dims=0), "ExponentialEuler": fs.ExponentialEuler(-size),
            }[name]  # fmt: skip
            sde = fs.SDE(lambda t, y, size=size: -size * y, lambda t, y: y)
            one = torch.ones(1, dtype=F64)
            rest, moved = (
                float(solver.step(sde, times[0], times[1], one, fs.Increment(1.0, w * one), None).y) for w in (0, 1)
            )
            border = (1 - rest**2) / max((moved - rest) ** 2, 1e-300)
            if border > 0:
                found.setdefault(name, []).append([size, border])
    return found


def laplacian() -> torch.Tensor:
    """SPREAD times second differences on [0, 1] with the value 0 at both ends."""
    ones = torch.ones(CELLS - 1, dtype=F64)
    second = torch.diag(ones, 1) + torch.diag(ones, -1) - 2 * torch.eye(CELLS, dtype=F64)
    return SPREAD * (CELLS + 1) ** 2 * second


def stiff(budget: Budget, seed: int) -> dict[str, list[list[float]]]:
    """A reaction-diffusion equation with additive noise on each of its cells, over [0, 1]."""
    A = laplacian()
    sde = fs.SDE(lambda t, y: y @ A + 4 * (y - y**3), lambda t, y: torch.full_like(y, 0.3), "additive")
    largest = 4 * SPREAD * (CELLS + 1) ** 2

    def solver(name: str, steps: int) -> fs.StochasticSolver:
        return {
            "EulerMaruyama": fs.EulerMaruyama(), "ImplicitEuler": fs.ImplicitEuler(iterations=1),
            "ExponentialEuler": fs.ExponentialEuler(A),
            "SKROCK": fs.SKROCK(max(2, math.ceil(math.sqrt((largest + 8) / steps / 1.9)))),
        }[name]  # fmt: skip

    y0 = torch.zeros(budget.paths, CELLS, dtype=F64)
    names = ("EulerMaruyama", "SKROCK", "ImplicitEuler", "ExponentialEuler")
    return errors(sde, solver, names, fs.ShARK(), y0, 1.0, budget, seed)


def cubic(budget: Budget, seed: int) -> dict[str, list[list[float]]]:
    """A cubic drift that pulls back from a far start, with multiplicative noise, over [0, 2]."""
    sde = fs.SDE(lambda t, y: y - y**3, lambda t, y: 0.5 * y)
    made: dict[str, fs.StochasticSolver] = {
        "EulerMaruyama": fs.EulerMaruyama(), "TamedEuler": fs.TamedEuler(), "TamedMilstein": fs.TamedMilstein(),
        "TruncatedEuler": fs.TruncatedEuler(radius=2.0, growth=3), "ImplicitEuler": fs.ImplicitEuler(event_dims=0),
    }  # fmt: skip
    y0 = torch.full((10 * budget.paths, 1), 6.0, dtype=F64)
    return errors(sde, lambda name, steps: made[name], tuple(made), fs.Milstein(), y0, 2.0, budget, seed)


def errors(sde, solver, names, reference, y0, end, budget, seed) -> dict[str, list[list[float]]]:  # type: ignore[no-untyped-def]
    """Evaluations and RMSE at the end to a fine solution along the same paths; steps that run away have none."""
    path = fs.BrownianPath(tuple(y0.shape), 0.0, end, seed=seed, levy="H", dtype=F64)
    grid = lambda level: torch.linspace(0, end, 2**level + 1, dtype=F64)  # noqa: E731
    fine = fs.solve(sde, reference, y0, grid(budget.fine), path=path).y
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for level in progress(budget.levels, "level"):
        for name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    sol = fs.solve(sde, solver(name, 2**level / end), y0, grid(level), path=path)
                except fs.NonFiniteError:
                    continue
            if (error := rms(sol.y - fine)) < 10:
                found[name].append([sol.nfe, error])
    return found


def tables(records: dict[str, Record]) -> dict[str, str]:
    """The longest stable step, without noise and with the strongest noise for which the solution decays."""
    rows = []
    for name, points in records["stiff"].data["stability"].items():
        ends = [size for size, _ in points], [size for size, border in points if border >= 2 * size * (1 - 1e-9)]
        longest = [max(sizes, default=0.0) for sizes in ends]
        rows.append([f"`{name}`", *("any" if size > 9e3 else f"{size:.3g}" if size else "none" for size in longest)])
    head = ["solver", "largest step times slope, without noise", "with any noise for which the solution decays"]
    return {"stiff": table(head, rows)}


def draw(records: dict[str, Record], folder: Path) -> None:
    """The borders of stability, each the least within a factor of 1.5, and error against evaluations."""
    data = records["stiff"].data
    drawing, (left, middle, right) = canvas(13.5, 4.2, ncols=3)
    sizes = [0.1, 1e4]
    left.fill_between(sizes, [1e-2, 1e-2], [2 * s for s in sizes], color="0.9", lw=0, label="the solution decays")
    for name, points in data["stability"].items():
        xs, ratios = [size for size, _ in points], [border / (2 * size) for size, border in points]
        # oscillations between zeros of the stability function: the least nearby, where all of the region is covered
        near = [min(ratios[max(i - 35, 0) : i + 36]) if r > 1 else r for i, r in enumerate(ratios)]
        ys = [2 * size * r for size, r in zip(xs, near)]
        if xs[-1] < 9e3:
            xs, ys = [*xs, xs[-1]], [*ys, 1e-3]
        left.loglog(xs, ys, color=LINES[name.replace("(5)", "")], lw=1.8, label=name)
    left.set(xlabel="step times slope, $h|a|$", ylabel="stable below this noise, $h b^2$", xlim=(0.1, 1e4))
    left.set(ylim=(0.05, 1e6), title="$dy = a y\\,dt + b y\\,dW$")
    left.legend(frameon=False, loc="upper left", fontsize=8)
    for axes, key, title in (
        (middle, "stiff", "Reaction and diffusion, slope -218"), (right, "cubic", "Cubic drift, $y_0 = 6$"),
    ):  # fmt: skip
        for name, points in data[key].items():
            if points:
                axes.loglog(*zip(*points), MARKS[name] + "-", color=LINES[name], ms=4, label=name)
        axes.set(xlabel="drift evaluations", ylabel="RMSE at the end", title=title)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(True, which="major", alpha=0.3)
    write(drawing, folder / "stiff.svg")


EXPERIMENT = Experiment("stiff", __doc__, 3, BUDGETS, measure, tables, draw, ("stiff",), ("stiff.svg",))

if __name__ == "__main__":
    EXPERIMENT.main()
