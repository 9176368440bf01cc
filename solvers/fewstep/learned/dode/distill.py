"""`distill_dode`: fit the table of a base solver to a finer one on a few hundred start states."""

import time
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ... import _validation
from ...errors import InputError, moved, named
from ...fingerprint import Fingerprint, Fit
from ...grid import MOST, Spacing
from ...plan import Plan
from ...problem import DiffusionModel
from ...resolve import resolve
from ...samplers.dpm import DPMSolverPP
from ...solver import DiffusionSolver
from ..labelled_model import Labelled, Model
from ..start_states import Work
from .greedy import greedy
from .teacher import Teacher


@dataclass(frozen=True)
class DODEReport:
    """Errors and cost of a fit.

    Attributes:
        r2: per row, the share of the squared distance to the teacher that the fit removed.
        kept: per row, whether the fit also helped on the held-out start states; else kappa is 0 there.
        base_rmse, student_rmse: distance to the teacher's final state on the held-out start states.
        fallback: why the table is the base's, else "".
        evaluations: network evaluations per start state, held-out ones included, without backward passes.
        seconds: wall time.
    """

    r2: list[float]
    kept: list[bool]
    base_rmse: float
    student_rmse: float
    fallback: str
    evaluations: int
    seconds: float


@moved(
    "To fit levels and weights on the final state, use fewstep.fit_table(...).",
    "refine", "learn_grid", "training", "seed",
)  # fmt: skip
@named
def distill_dode(
    problem: DiffusionModel | Labelled, base: DiffusionSolver, *, noise: Tensor, labels: Tensor | None = None,
    steps: int | None = None, sigmas: Tensor | None = None, spacing: Spacing = "logsnr", final: str = "x0",
    terms: int = 1, teacher: DiffusionSolver | None = None, teacher_substeps: int = 10, guard: bool = True,
    batch: int | None = None, progress: bool = False, notes: dict[str, Any] | None = None,
) -> tuple[Plan, DODEReport]:  # fmt: skip
    r"""Fit a few numbers per row of a deterministic solver's plan, by least squares and without training.

    The newest evaluation $d_i$ becomes $d_i + \sum_j \kappa_{ij} (d_i - d_{i-j})$ (arXiv 2309.16421, with one term).
    Takes seconds; needs a teacher that is much finer than the plan.

    Args:
        problem: the model; with `labels` a function `labels -> DiffusionModel` of one label per sample.
        base: the solver to start from; any whose plan draws no noise.
        noise: (n, *event) start states at the first level, n >= 16; one in eight is held out.
        labels: (n, ...) one for each start state, distributed as in sampling.
        steps, sigmas, spacing, final: the grid, as in `fewstep.sample`.
        terms: history terms per row; 1 is the paper's.
        teacher: a solver of one evaluation per step; by default `DPMSolverPP(2)`. The paper takes the base.
        teacher_substeps: teacher steps for each interval between the levels of the plan.
        guard: keep the fit of a row only if it helps on the held-out start states, and the table only if it ends
            closer to the teacher there than the base.
        batch: samples per network call; results do not depend on it. By default a quarter of the start states and at
            most 256. Under torch.distributed each process takes its share; all return the same table.
        progress: show a progress bar on a terminal, in a pipe a line every 30 seconds.
        notes: JSON values to keep in the table's notes, for instance `{"guidance": 3.0}`.

    Returns:
        the table, a `Plan` with `fit`, and a report.

    Raises:
        InputError: too few start states, labels that do not belong to them, a base that draws noise, a teacher with
            several evaluations per step, an unknown word, or notes that JSON cannot hold.
    """
    began = time.perf_counter()
    guard = _validation.check_flag("guard", guard)
    terms = _validation.check_int("terms", terms, 1, MOST)
    grid: dict[str, Any] = {"steps": steps, "sigmas": sigmas, "spacing": spacing, "final": final}
    work, plan, fine = prepare(problem, labels, noise, base, grid, teacher, teacher_substeps, batch)
    words: dict[str, Any] = {
        "solver": plan.name, **facts(plan, noise), "terms": terms, "fit": "greedy",
        "teacher": f"{fine.plan.name}, {teacher_substeps} steps per interval",
        "versions": {p: metadata.version(p) for p in ("fewstep", "torch")},
    }  # fmt: skip
    words = _validation.check_json("notes", {} if notes is None else notes, words)
    found = greedy(work, plan, fine, terms, guard, progress)
    fallback = why(found.student_rmse, found.base_rmse) if guard else ""
    if fallback:
        kappa, kept = torch.zeros_like(found.kappa), [False] * plan.nfe
        found = replace(found, plan=plan, kappa=kappa, kept=kept, student_rmse=found.base_rmse)
        words["fit"] = "none"
    rmses = found.base_rmse, found.student_rmse
    fingerprint = Fingerprint.of_model(work.model, work.x)
    table = fitted(found.plan, plan.name, found.kappa, fingerprint, words, *rmses, fallback)
    seconds = time.perf_counter() - began
    return table, DODEReport(found.r2, found.kept, *rmses, fallback, work.evaluations(), seconds)


def prepare(
    problem: DiffusionModel | Labelled, labels: Tensor | None, noise: Tensor, base: DiffusionSolver,
    grid: dict[str, Any], teacher: DiffusionSolver | None, substeps: int, batch: int | None,
) -> tuple[Work, Plan, Teacher]:  # fmt: skip
    """The start states, the plan of the base and the teacher, from a user's arguments."""
    teacher = DPMSolverPP(2) if teacher is None else teacher
    for name, solver in (("base", base), ("teacher", teacher)):
        _validation.check_instance(name, solver, DiffusionSolver, "a diffusion solver such as fewstep.DDIM()")
    _validation.check_int("teacher_substeps", substeps, 1, MOST)
    batch = _validation.check_int_or_none("batch", batch, 1, MOST)
    model = Model.of(problem, labels, noise)
    plan, _ = resolve(base, model.schedule, **grid)
    if plan.levy:
        raise InputError(f"base: got {plan.name!r}, which draws noise; expected a deterministic solver.")
    return Work.of(model, noise, float(plan.sigmas[0]), batch), plan, Teacher(model.schedule, teacher, plan, substeps)


def facts(plan: Plan, noise: Tensor) -> dict[str, Any]:
    """The notes on the grid and the start states."""
    ends = [float(plan.sigmas[0]), float(plan.sigmas[-1])]
    intervals = len(plan.sigmas) - 1
    return {"evaluations": plan.nfe, "intervals": intervals, "sigma": ends, "start states": len(noise)}


def why(student: float, base: float) -> str:
    """The reason for using the base instead of the table, or "" if the table is used."""
    if student < base:
        return ""
    return f"held-out distance to the teacher {student:.3g}, with the base {base:.3g}"


def fitted(
    plan: Plan, base: str, kappa: Tensor, fingerprint: Fingerprint, notes: dict[str, Any], base_rmse: float,
    student_rmse: float, fallback: str,
) -> Plan:  # fmt: skip
    """The plan with what it was fitted to."""
    notes = notes | {"rmse": student_rmse, "rmse of the base": base_rmse, "fallback": fallback}
    return replace(plan, name=f"DODE({base})", fit=Fit(fingerprint, notes, kappa))
