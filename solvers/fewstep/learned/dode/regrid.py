"""A D-ODE table taken to another grid: kappa interpolated, then measured before it is believed."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...plan import Plan
from ...problem import DiffusionModel
from ...samplers.dpm_solver_pp import DPMSolverPP
from ...solver import DiffusionSolver
from ..labelled_model import Labelled, Model
from .distill import base_plan, check_kinds, distill_dode, why
from .fitting_state import Teacher, Work, apply, in_state, rmse, widened
from .student import DODE


@dataclass(frozen=True)
class GridReport:
    """What became of a table on another grid.

    Attributes:
        base_rmse, student_rmse: distance to the teacher's final state of the base there and of the
            interpolated table, on all start states (with refit: on the held-out ones).
        refit_rmse: of a table fitted on the new grid, where that was asked for.
        fallback: why the result is the base, else "".
        evaluations: of the network, in units of the start states; the refit's are its own.
        seconds: wall time.
    """

    base_rmse: float
    student_rmse: float
    refit_rmse: float | None
    fallback: str
    evaluations: int
    seconds: float


def regrid(
    student: DODE, problem: DiffusionModel | Labelled, base: DiffusionSolver, *, noise: Tensor,
    labels: Tensor | None = None, steps: int | None = None, sigmas: Tensor | None = None,
    spacing: str = "logsnr", final: str = "x0", teacher: DiffusionSolver | None = None,
    teacher_substeps: int = 10, batch: int | None = None, refit: bool = False,
) -> tuple[DODE, GridReport]:  # fmt: skip
    """The student's kappa on another grid of its base solver, or the base where they do not help there.

    kappa_ij is interpolated over log sigma. What is interpolated is kappa_ij over h_i / (lambda_i -
    lambda_{i-j}), which for Adams weights is smooth in sigma whatever the grid (1/2 for DPM-Solver++(2M))
    and on logSNR grids is kappa itself. Rows of stages within a step are taken stage by stage, and the
    row that ends at 0 from the row that did.

    Args:
        problem, labels: the model that the student was fitted to; another is refused.
        base: the solver that it was fitted from.
        noise: (n, *event) start states, n >= 16, other than those of the fit.
        steps, sigmas, spacing, final: the new grid.
        teacher, teacher_substeps, batch: as in `distill_dode`.
        refit: also fit a table on the new grid and say how far that one ends, for comparison.

    Returns:
        the table on the new grid and a `GridReport`.

    Raises:
        InputError: another model or base, or a table with refined weights, which has no kappa.
    """
    began = time.perf_counter()
    check_kinds(base, teacher, {"teacher_substeps": teacher_substeps, "batch": 1 if batch is None else batch})
    model = Model.of(problem, labels, noise)
    old = _own_base(student, model, base)
    plan = base_plan(model.schedule, base, steps, sigmas, spacing, final)
    work = Work.of(model, noise, plan.sigmas[:1], batch)
    some = torch.arange(work.batch if student.fitted_to.labelled else 1)
    student.check(model.at(some), work.x[some.to(work.x.device)])
    fine = Teacher(model.schedule, teacher or DPMSolverPP(2), plan, teacher_substeps, "exact", work.spent)
    table = widened(plan, (kappa := _interpolated(student.kappa, old, plan)).shape[1])
    for i in range(plan.nfe):
        apply(table, i, kappa[i, : min(i, kappa.shape[1])])
    which = work.held if refit else torch.arange(len(noise))
    of_base, of_student = (rmse(work, p, which, fine) for p in (plan, table))
    again = distill_dode(
        problem, base, noise=noise, labels=labels, steps=steps, sigmas=sigmas, terms=kappa.shape[1],
        spacing=spacing, final=final, teacher=teacher, teacher_substeps=teacher_substeps, batch=batch,
    )[1] if refit else None  # fmt: skip
    fallback = "" if of_student < of_base else why(of_student, of_base)
    if fallback:
        table, kappa = plan, torch.zeros_like(kappa)
    words = student.words | {
        "evaluations": plan.nfe, "intervals": len(plan.sigmas) - 1,
        "sigma": [float(plan.sigmas[0]), float(plan.sigmas[-1])],
        "fit": f"interpolated from {student.plan.nfe} evaluations", "start states": len(noise),
        "rmse": of_student, "rmse of the base": of_base, "fallback": fallback,
    }  # fmt: skip
    made = DODE(table.renamed(student.plan.name), kappa, student.fitted_to, words)
    spent = work.evaluations() + (again.evaluations if again else 0)
    rmses = of_base, of_student, again.student_rmse if again else None
    return made, GridReport(*rmses, fallback, spent, time.perf_counter() - began)


def _own_base(student: DODE, model: Model, base: DiffusionSolver) -> Plan:
    """The base's plan on the student's grid; refuses a base or a table that has no kappa to take along."""
    plan = base.plan(student.plan.sigmas, model.schedule)
    if f"DODE({plan.name})" != student.plan.name or plan.nfe != student.plan.nfe:
        raise InputError(
            f"base: got {plan.name!r} of {plan.nfe} evaluations, expected the solver of {student.plan.name!r} "
            f"of {student.plan.nfe}."
        )
    if bool(student.kappa.isnan().any()):
        raise InputError(
            "student: got a table whose levels and weights were refined, which has no kappa to interpolate. "
            "Fit one on the new grid with fewstep.distill_dode."
        )
    return plan


def _interpolated(kappa: Tensor, old: Plan, new: Plan) -> Tensor:
    """(rows of new, terms): linear in log sigma, the ends held."""
    terms = kappa.shape[1]
    out = torch.zeros(new.nfe, terms, dtype=torch.float64)
    stages, expected = _stages(old), _stages(new)
    shape, scale = _shape(old, terms), _shape(new, terms)
    for j in range(terms):
        for i in range(j + 1, new.nfe):
            like = [k for k in range(j + 1, old.nfe) if stages[k] == expected[i]]
            if like:
                at = -old.sigma[like].log()
                out[i, j] = _linear(-new.sigma[i].log(), at, kappa[like, j] / shape[like, j]) * scale[i, j]
    return out


def _stages(plan: Plan) -> list[int]:
    """Which evaluation of its step each row is; -1 for the one that ends at 0."""
    out = [0] * plan.nfe
    if plan.nfe > len(plan.sigmas) - 1:
        for i in range(1, plan.nfe):
            out[i] = 0 if in_state(plan, i - 1) else out[i - 1] + 1
    if plan.sigmas[-1] == 0:
        out[-1] = -1
    return out


def _shape(plan: Plan, terms: int) -> Tensor:
    """(rows, terms) h_i / (lambda_i - lambda_{i-j}) where a row is a step; 1 elsewhere."""
    out = torch.ones(plan.nfe, terms, dtype=torch.float64)
    if plan.nfe == len(plan.sigmas) - 1:
        at = -plan.sigmas[plan.sigmas > 0].log()
        for i in range(1, len(at) - 1):
            for j in range(1, min(i, terms) + 1):
                out[i, j - 1] = (at[i + 1] - at[i]) / (at[i] - at[i - j]) * j
    return out


def _linear(x: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation at increasing places, constant beyond them."""
    k = int(torch.searchsorted(at, x).clamp(1, max(len(at) - 1, 1)))
    if len(at) == 1:
        return values[0]
    share = ((x - at[k - 1]) / (at[k] - at[k - 1])).clamp(0, 1)
    return torch.lerp(values[k - 1], values[k], share)
