"""A D-ODE table on another grid: kappa is interpolated, and used only where it measurably helps."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import _validation
from ...errors import InputError, named
from ...fingerprint import Fit
from ...grid import Spacing
from ...plan import Plan
from ...problem import DiffusionModel
from ...resolve import resolve
from ...solver import DiffusionSolver
from ..labelled_model import Labelled, Model
from .correction import corrected, in_state
from .distill import distill_dode, facts, fitted, prepare, why
from .teacher import teacher_rmse


@dataclass(frozen=True)
class GridReport:
    """The result of interpolating a table to another grid.

    Attributes:
        base_rmse, student_rmse: distance to the teacher's final state of the base there and of the interpolated
            table, on all start states (with refit: on the held-out ones).
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


@named
def regrid(
    table: Plan, problem: DiffusionModel | Labelled, base: DiffusionSolver, *, noise: Tensor,
    labels: Tensor | None = None, steps: int | None = None, sigmas: Tensor | None = None, spacing: Spacing = "logsnr",
    final: str = "x0", teacher: DiffusionSolver | None = None, teacher_substeps: int = 10, batch: int | None = None,
    refit: bool = False,
) -> tuple[Plan, GridReport]:  # fmt: skip
    """A D-ODE table interpolated to another grid of its base solver, or the base where that is no better.

    kappa_ij is interpolated over log sigma, after division by h_i / (lambda_i - lambda_{i-j}). For Adams weights the
    quotient is smooth in sigma on every grid (1/2 for DPM-Solver++(2M)); on logSNR grids it is proportional to kappa.
    Stages within a step are interpolated one by one, and so is the row that ends at 0.

    Args:
        table: a result of `distill_dode`.
        problem, labels: the model that the table was fitted to; another one is refused.
        base: the solver that it was fitted from.
        noise: (n, *event) start states, n >= 16, other than those of the fit.
        steps, sigmas, spacing, final: the new grid.
        teacher, teacher_substeps, batch: as in `distill_dode`.
        refit: also fit a table on the new grid and report its distance, for comparison.

    Returns:
        the table on the new grid and a `GridReport`.

    Raises:
        InputError: another model or base, or a table without kappa.
    """
    began = time.perf_counter()
    grid: dict[str, Any] = {"steps": steps, "sigmas": sigmas, "spacing": spacing, "final": final}
    work, plan, fine = prepare(problem, labels, noise, base, grid, teacher, teacher_substeps, batch)
    fit, old = _checked(table, work.model, base)
    some = torch.arange(work.batch if fit.fingerprint.labelled else 1)
    fit.check(work.model.at(some), work.start(some), table.name)
    assert fit.kappa is not None
    kappa = _interpolated(fit.kappa, old, plan)
    made = corrected(plan, kappa)
    which = work.held if _validation.check_flag("refit", refit) else torch.arange(len(noise))
    base_rmse, student_rmse = (teacher_rmse(work, p, which, fine) for p in (plan, made))
    again = distill_dode(
        problem, base, noise=noise, labels=labels, terms=kappa.shape[1], teacher=teacher,
        teacher_substeps=teacher_substeps, batch=batch, **grid,
    )[1] if refit else None  # fmt: skip
    fallback = why(student_rmse, base_rmse)
    if fallback:
        made, kappa = plan, torch.zeros_like(kappa)
    notes = fit.notes | facts(plan, noise) | {"fit": f"interpolated from {table.nfe} evaluations"}
    made = fitted(made, plan.name, kappa, fit.fingerprint, notes, base_rmse, student_rmse, fallback)
    spent = work.evaluations() + (again.evaluations if again else 0)
    rmses = base_rmse, student_rmse, again.student_rmse if again else None
    return made, GridReport(*rmses, fallback, spent, time.perf_counter() - began)


def _checked(table: Plan, model: Model, base: DiffusionSolver) -> tuple[Fit, Plan]:
    """The fit of a table with kappa, and the plan of its base on its own grid."""
    fit = table.fit if isinstance(table, Plan) else None
    if fit is None or fit.kappa is None or bool(fit.kappa.isnan().any()):
        raise InputError(
            f"table: got {_validation.describe(table)}, which has no kappa to interpolate; expected a result of "
            "fewstep.distill_dode. Fit one on the new grid instead."
        )
    plan, _ = resolve(base, model.schedule, sigmas=table.sigmas, repeat=True)
    if f"DODE({plan.name})" != table.name or plan.nfe != table.nfe:
        raise InputError(
            f"base: got {plan.name!r} of {plan.nfe} evaluations, expected the solver of {table.name!r} of {table.nfe}."
        )
    return fit, plan


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
                smooth = np.interp(-new.sigma[i].log(), at, kappa[like, j] / shape[like, j])
                out[i, j] = float(smooth) * scale[i, j]
    return out


def _stages(plan: Plan) -> list[int]:
    """The index of each row's evaluation within its step; -1 for the row that ends at 0."""
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
