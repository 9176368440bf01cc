"""`compare`: solvers and spacings, measured on a user's own model against a fine solution."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _validation
from ._figures import canvas, check_figure
from ._figures import write as write_figure
from ._progress import progress as progress_bar
from ._serialization import write_json
from .errors import InputError, named
from .executor import run
from .grid import MOST, Spacing, check_spacing, sigma_grid
from .learned.labelled_model import Labelled, Model
from .learned.start_states import Work
from .learned.table.report import Errors
from .plan import Plan
from .problem import DiffusionModel
from .sampler_names import diffusion_solver_named
from .samplers.unipc import UniPC
from .schedule import Schedule
from .solver import DiffusionSolver
from .untrained import SPACINGS, untrained

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FINE_STEPS, MOST_FINE = 64, 1024
OWN = "its own"  # the spacing of a plan
MARKERS = "osD^vPX*<>"
EXPECTED = "deterministic diffusion solvers such as UniPC(3), or their names"


@dataclass(frozen=True, eq=False)
class Measured:
    """One sampler of a comparison.

    Attributes:
        solver: the solver, or the plan itself where a plan was compared.
        spacing: of its grid.
        plan: its table; `plan.nfe` evaluations, `plan.sigmas` its grid.
        errors: distances to the fine solution: RMSE, median and 90 % quantile with their standard errors.
        tied: whether its mean squared error exceeds the best by at most two standard errors of the paired difference.
    """

    solver: DiffusionSolver | Plan
    spacing: str
    plan: Plan
    errors: Errors
    tied: bool


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` measured.

    Attributes:
        rows: the samplers, in the order of their RMSE.
        nfe: the evaluations asked for.
        samples: the number of start states.
        fine: the fine solution, in words.
        fine_rmse: its distance to itself with half as many steps, an upper estimate of its own error.
        evaluations: network evaluations made, per start state.
        seconds: wall time.
    """

    rows: tuple[Measured, ...]
    nfe: int
    samples: int
    fine: str
    fine_rmse: float
    evaluations: int
    seconds: float

    @property
    def plan(self) -> Plan:
        """The table of the best sampler, for `fewstep.sample(model, best.plan, ...)`."""
        return self.rows[0].plan

    @property
    def solver(self) -> DiffusionSolver | Plan:
        """The best solver, for `fewstep.sample(model, best.solver, sigmas=best.grid, ...)`; a plan if that is best."""
        return self.rows[0].solver

    @property
    def grid(self) -> Tensor:
        """(n,) float64, the decreasing levels of the best sampler."""
        return self.plan.sigmas

    def table(self, most: int = 10) -> str:
        """The first rows as text of at most 80 columns, with what they were compared with.

        Args:
            most: number of rows; those of the same error up to sampling ("=") may differ in order on other states.
        """
        most = _validation.check_int("most", most)
        shown = self.rows[:most]
        names = [_shortened(r.plan.name, 20) for r in shown]
        width, spaced = max(6, *map(len, names)), max(7, *(len(r.spacing) for r in shown))
        lines = [f"{'solver':<{width}} {'spacing':<{spaced}} nfe     RMSE ± error   median     90 %"]
        for name, r in zip(names, shown, strict=True):
            e = r.errors
            numbers = f"{r.plan.nfe:3} {e.rmse:8.3g} ± {e.rmse_se:<5.1g} {e.median:8.3g} {e.q90:8.3g}"
            lines.append(f"{name:<{width}} {r.spacing:<{spaced}} {numbers}{' =' * (r.tied and r is not shown[0])}")
        lines += [f"... and {len(self.rows) - most} more"] if len(self.rows) > most else []
        lines += [
            f"Distance per element to {self.fine}, over {self.samples} start states.",
            f"Fine solution with half as many steps: {self.fine_rmse:.2g} away. = ties with the best.",
            f"{self.evaluations} evaluations per start state, {self.seconds:.1f} s.",
        ]
        if self.fine_rmse > 0.5 * shown[0].errors.rmse:
            lines.append("The fine solution is too coarse to order the first rows.")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def document(self) -> dict[str, Any]:
        """All numbers as JSON values; errors that are not finite are None."""
        facts = {k: getattr(self, k) for k in ("nfe", "samples", "fine", "fine_rmse", "evaluations", "seconds")}
        rows = [
            {"name": r.plan.name, "solver": repr(r.solver), "spacing": r.spacing, "nfe": r.plan.nfe, "tied": r.tied}
            | {name: v if math.isfinite(v) else None for name, v in vars(r.errors).items()}
            | {"sigmas": r.plan.sigmas.tolist()}
            for r in self.rows
        ]
        return facts | {"rows": rows}

    def save(self, path: str | Path) -> None:
        """Write all numbers as JSON. `best.plan.save(path)` writes the best sampler, for `fewstep.load`."""
        write_json(path, {"format": "fewstep-comparison-1"} | self.document(), parents=True)

    def plot(self, path: str | Path = "compare.svg") -> Path:
        """Draw the RMSE of each solver on each spacing, with two standard errors; returns the file.

        Args:
            path: a file that ends in .svg, .png or .pdf.
        """
        check_figure(path)
        document = self.document()
        solvers = len({r["name"] for r in document["rows"]})
        figure, axes = canvas(6.4, 1.4 + 0.26 * solvers)
        draw(axes, document)
        return write_figure(figure, path)


@named
@torch.no_grad()
def compare(
    problem: DiffusionModel | Labelled, nfe: int = 8, *, noise: Tensor, labels: Tensor | None = None,
    solvers: Sequence[DiffusionSolver | str] | None = None, spacings: Sequence[Spacing] | None = None,
    plans: Sequence[Plan] | None = None, tol: float = 0.1, batch: int | None = None, progress: bool = False,
) -> Comparison:  # fmt: skip
    """Measure deterministic solvers on several spacings on this very model.

    From each start state every sampler and a fine solution of the probability-flow ODE run to sigma = 0; the error is
    the distance of their ends, root mean square per element. The fine solution is `UniPC(3)` on levels even in log
    sigma. Its steps, 64 or more, are doubled, on the first batch, until the ends of n and n/2 steps differ by less
    than `tol` times the smallest error, at most to 1,024.

    A sampler has nfe evaluations, or the next fewer that its steps can take: 8 of them are 7 for `EDMHeun`. The first
    evaluation, which all samplers share, is made once. By default these are 13 solvers on 4 spacings, some 450
    evaluations per start state with the fine solution. 32 to 128 start states are enough.

    Samplers that draw noise are no part of it: they do not follow the ODE, and their ends are not paired.

    Args:
        problem: the model; with `labels` a function `labels -> DiffusionModel` of one label per sample.
        nfe: the most network evaluations of a sampler.
        noise: (n, *event) start states at the schedule's largest level, n >= 2, alpha x0 + sigma_t n there: normals
            for VP and flows, sigma_max times normals for EDM and VE. Of flows that start at t = 1 in float64.
        labels: (n, ...) one for each start state.
        solvers: deterministic diffusion solvers, or their names such as "unipc:3"; by default `DDIM`, and `IPNDM`,
            `DEIS`, `DPMSolverPP`, `UniPC`, `DPMSolver` and `EDMHeun` of several orders.
        spacings: names of `fewstep.sigma_grid`, or levels such as `fit_grid` returns; by default "logsnr", "karras",
            "trailing" and "uniform".
        plans: plans to compare in addition, such as fitted tables, of at most nfe evaluations.
        tol: the error of the fine solution relative to the smallest error.
        batch: samples per network call, by default a quarter of the start states and at most 256.
        progress: show a progress bar on a terminal, in a pipe a line every 30 seconds.

    Returns:
        the samplers in the order of their RMSE. The first of many is chosen by chance among those that tie with it.

    Raises:
        InputError: a solver or plan that draws noise, that starts at another level than the schedule's largest or has
            too many evaluations; a model whose fine solution is not finite.
    """
    began = time.perf_counter()
    nfe = _validation.check_int("nfe", nfe, 1, MOST)
    if not _validation.check_float("tol", tol) > 0:
        raise InputError(f"tol: got {tol!r}, expected a number above 0.")
    batch = _validation.check_int_or_none("batch", batch, 1, MOST)
    model = Model.of(problem, labels, _validation.check_state("noise", noise))
    schedule = model.schedule
    chosen = _candidates(schedule, nfe, solvers, spacings, plans)
    work = Work.of(model, noise, chosen[0][2].ends[0], batch, fit=False)
    squares, gaps, steps = list[Tensor](), list[Tensor](), max(FINE_STEPS, 4 * nfe)
    batches = torch.split(torch.arange(len(work.x)), work.batch)
    for index in progress_bar(batches, "batch", show=progress):
        ends = _ends(work, index)
        found = [ends(plan) for *_, plan in chosen]
        half, fine = (ends(_fine(schedule, n)) for n in (-(-steps // 2), steps))
        while not squares and steps < MOST_FINE and not _close(half, fine, found, tol):
            steps, half, fine = 2 * steps, fine, ends(_fine(schedule, 2 * steps))
        if not bool(fine.isfinite().all()):
            raise InputError("problem: its model gives values that are not finite for these start states.")
        squares.append(torch.stack([_squares(x, fine) for x in found]))
        gaps.append(_squares(half, fine))
    gap, evaluations = float(torch.cat(gaps).mean().sqrt()), -(-work.spent[0] // len(work.x))
    rows, name = _rows(chosen, torch.cat(squares, 1)), f"{_fine(schedule, 2).name} with {steps} steps"
    return Comparison(rows, nfe, len(work.x), name, gap, evaluations, time.perf_counter() - began)


Candidate = tuple[DiffusionSolver | Plan, str, Plan]


def _candidates(schedule: Schedule, nfe: int, solvers: Any, spacings: Any, plans: Any) -> Sequence[Candidate]:
    """The samplers to compare, checked to be deterministic and to start from one state."""
    grids = SPACINGS if spacings is None else _validation.check_sequence("spacings", spacings, "names or levels")
    for spacing in grids:
        check_spacing("spacings", spacing)
    own = None if solvers is None else [_solver(s) for s in _validation.check_sequence("solvers", solvers, EXPECTED)]
    found: list[Candidate] = [*untrained(schedule, nfe, own, grids)]
    for plan in () if plans is None else _validation.check_sequence("plans", plans, "plans such as fitted tables"):
        _validation.check_instance("plans", plan, Plan, "plans such as fitted tables")
        found.append((plan, OWN, plan))
    first = sigma_grid(schedule, 1).tolist()
    for solver, spacing, plan in found:
        argument = "plans" if solver is plan else "solvers"
        if plan.levy:
            raise InputError(
                f"{argument}: got {plan.name!r}, which draws noise; expected deterministic samplers: ends that are not "
                "paired have no distance. Compare their samples with fewstep.distances."
            )
        if max(abs(plan.ends[0] - first[0]), plan.ends[1]) > 1e-9 * first[0] or plan.nfe > nfe:
            raise InputError(
                f"{argument if solver is plan else 'spacings'}: got {plan.name!r} on {spacing!r}, {plan.nfe} "
                f"evaluations from {plan.ends[0]:.4g} to {plan.ends[1]:.4g}; expected at most {nfe}, from the "
                f"schedule's {first[0]:.4g} to 0."
            )
    if not found:
        raise InputError(f"nfe: got {nfe}, at which none of the solvers has a grid. Choose a larger one.")
    return found


def _solver(solver: Any) -> DiffusionSolver:
    found: Any = solver
    if isinstance(solver, str):
        found = diffusion_solver_named(solver, "solvers", lambda known: not known.card.levy)
    _validation.check_instance("solvers", found, DiffusionSolver, EXPECTED)
    return found  # type: ignore[no-any-return]


def _fine(schedule: Schedule, steps: int) -> Plan:
    return UniPC(3).plan(sigma_grid(schedule, steps), schedule)


def _ends(work: Work, index: Tensor) -> Callable[[Plan], Tensor]:
    """The function from plans to ends of these start states; evaluations of the states themselves are made once."""
    start, known = work.start(index), dict[tuple[str, float], Tensor]()

    def ends(plan: Plan) -> Tensor:
        evaluate = work.evaluator(plan, index)

        def shared(i: int, x: Tensor, normals: Any) -> Tensor:
            if x is not start:
                return evaluate(i, x, normals)
            key = plan.prediction, plan.rows[i].sigma
            if key not in known:
                known[key] = evaluate(i, x, normals)
            return known[key]

        return run(plan, start, shared, lambda *_: ())

    return ends


def _squares(x: Tensor, fine: Tensor) -> Tensor:
    """(n,) float64 mean squared distance per element on the CPU, infinite where x is not finite."""
    return (x - fine).double().square().flatten(1).mean(1).nan_to_num(math.inf, math.inf).cpu()


def _close(half: Tensor, fine: Tensor, found: list[Tensor], tol: float) -> bool:
    """Whether the gap of the fine solutions is below tol times the smallest error."""
    least = min(float(_squares(x, fine).mean()) for x in found)
    return float(_squares(half, fine).mean()) <= tol**2 * least


def _rows(chosen: Sequence[Candidate], squares: Tensor) -> tuple[Measured, ...]:
    """The samplers in the order of their RMSE, from squared errors (samplers, n)."""
    means = squares.mean(1)
    order = means.argsort(stable=True).tolist()
    best, rows = squares[order[0]], []
    for k in order:
        finite, more = bool(squares[k].isfinite().all()), squares[k] - best
        errors = Errors.of(squares[k]) if finite else Errors(math.inf, math.inf, math.inf)
        tied = finite and float(more.mean()) <= 2 * float(more.std()) / math.sqrt(len(more))
        solver, spacing, plan = chosen[k]
        rows.append(Measured(solver, spacing, plan, errors, tied))
    return tuple(rows)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def draw(axes: Axes, document: dict[str, Any]) -> None:
    """The errors of a comparison's document: a line per solver, a marker per spacing, the fine solution's error."""
    rows = [r for r in document["rows"] if r["rmse"] is not None]
    names = list(dict.fromkeys(r["name"] for r in rows))
    spacings = sorted({r["spacing"] for r in rows})
    for marker, spacing in zip(itertools.cycle(MARKERS), spacings, strict=False):
        mine = [r for r in rows if r["spacing"] == spacing]
        at = [names.index(r["name"]) for r in mine]
        error = [r["rmse"] for r in mine], [2 * r["rmse_se"] for r in mine]
        axes.errorbar(error[0], at, xerr=error[1], fmt=marker, ms=5, lw=0.8, alpha=0.85, label=spacing)
    axes.axvline(document["fine_rmse"], color="0.6", ls=":", lw=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), [_shortened(n, 28) for n in names], fontsize=8)
    axes.invert_yaxis()
    axes.grid(True, which="major", axis="x", alpha=0.3)
    axes.set_xlabel(f"RMSE at {document['nfe']} evaluations; dotted: that of the fine solution")
    axes.legend(fontsize=7)
