"""`distill_dode`: from a base solver and a few hundred start states to a fitted table."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ... import _validation
from ...errors import InputError, named, one_of
from ...fingerprint import Fingerprint
from ...grid import MOST, check_sigmas, sigma_grid
from ...plan import Plan
from ...problem import DiffusionModel
from ...samplers.dpm_solver_pp import DPMSolverPP
from ...schedule import Schedule
from ...solver import DiffusionSolver
from ..labelled_model import Labelled, Model
from ..training import check_options
from .fitting_state import Teacher, Work
from .greedy import Fit, greedy
from .refine import refine_plan
from .student import DODE

ALIGNMENTS = ("exact", "official")


@dataclass(frozen=True)
class DODEReport:
    """How a fit went.

    Attributes:
        r2: per row, the share of the squared distance to the teacher that the fit took away on its batch.
        kept: per row, whether the fit also helped on the held-out noise; else kappa is 0 there.
        base_rmse, student_rmse: distance to the teacher's final state on held-out noise.
        fallback: why the whole table is the base's, else "".
        evaluations: of the network for each start state: student, teacher, the held-out ones and the final
            comparisons included, backward passes not.
        seconds: wall time.
    """

    r2: list[float]
    kept: list[bool]
    base_rmse: float
    student_rmse: float
    fallback: str
    evaluations: int
    seconds: float


@named
def distill_dode(
    problem: DiffusionModel | Labelled, base: DiffusionSolver, *, noise: Tensor, labels: Tensor | None = None,
    steps: int | None = None, sigmas: Tensor | None = None, spacing: str = "logsnr", final: str = "x0",
    terms: int = 1, teacher: DiffusionSolver | None = None, teacher_substeps: int = 10,
    alignment: str = "exact", guard: bool = True, batch: int | None = None, refine: str | None = None,
    iterations: int | None = None, rate: float | None = None, minibatch: int | None = None,
    seed: int | None = None, learn_grid: bool = False, progress: bool = False,
    note: dict[str, Any] | None = None,
) -> tuple[DODE, DODEReport]:  # fmt: skip
    """Fit a few numbers a row to any deterministic solver's plan, in seconds and without training.

    Args:
        problem: the model; with `labels` a function `labels -> DiffusionModel` whose denoiser holds one label
            a sample, guidance included.
        base: the solver to start from; any whose plan draws no noise.
        noise: (n, *event) start states at the first level; one in eight is held out, and n >= 16. They
            are sent through the denoiser in batches of other sizes and orders.
        labels: (n, ...) one for each start state, as sampling will draw them.
        steps, sigmas, spacing, final: the grid, as in `fewstep.sample`.
        terms: history terms a row; 1 is the paper's.
        teacher: a one-evaluation solver; by default `DPMSolverPP(2)`. The paper takes the base itself.
        teacher_substeps: teacher steps for each interval between the plan's levels.
        alignment: `"exact"` compares states at the same level; `"official"` takes the released code's
            targets, which are up to one student step noisier, for reproduction only.
        guard: keep a row's fit only if it helps on the held-out noise, and the table only if it ends
            closer to the teacher there than the base.
        batch: samples in a network call; results do not depend on it. By default a quarter of the start
            states and at most 256, so that a fit takes less memory than sampling them in one call. Under
            torch.distributed each process takes its share of the batches; all end with the same table.
        refine: `"global"` goes on from the greedy table by gradient descent on the final state's error,
            through all steps. Its memory is that of the graph of a minibatch's evaluations, all rows: small
            for networks.
        iterations, rate, minibatch, seed: of refine; by default 600, 0.01, 512 and 0.
        learn_grid: with refine, train levels, the levels the network is told, and all history weights
            together. Thousands of iterations and a rate of 0.03 pay here.
        progress: a bar on a terminal.
        note: words to keep in the table's file beside its own, for instance `{"guidance": 3.0}`.

    Returns:
        the student and a `DODEReport`.

    Raises:
        InputError: too little noise, labels that do not fit it, a base that draws noise, a teacher of
            several evaluations a step, an unknown word, a note that is not JSON.
    """
    began = time.perf_counter()
    asked = {"iterations": iterations, "rate": rate, "minibatch": minibatch, "seed": seed}
    training: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    _check(alignment, refine, learn_grid, training)
    numbers = {"terms": terms, "batch": 1 if batch is None else batch, "teacher_substeps": teacher_substeps}
    check_kinds(base, teacher, numbers)
    model = Model.of(problem, labels, noise)
    plan = base_plan(model.schedule, base, steps, sigmas, spacing, final)
    work = Work.of(model, noise, plan.sigmas[:1], batch)
    fine = Teacher(model.schedule, teacher or DPMSolverPP(2), plan, teacher_substeps, alignment, work.spent)
    words = _words(plan, fine, terms, teacher_substeps, len(noise), training, note)
    fit = greedy(work, plan, fine, terms, guard, progress)
    if refine:
        fit = refine_plan(work, fit, fine, learn_grid, progress=progress, **training)
    fit, fallback = _guarded(fit, plan) if guard else (fit, "")
    rmses = fit.base_rmse, fit.student_rmse
    words |= {"fit": fit.made, "rmse": rmses[1], "rmse of the base": rmses[0], "fallback": fallback}
    made = fit.plan.renamed(f"DODE({plan.name})")
    student = DODE(made, fit.kappa, Fingerprint.of_model(model, work.x), words)
    spent, seconds = work.evaluations(), time.perf_counter() - began
    return student, DODEReport(fit.r2, fit.kept, *rmses, fallback, spent, seconds)


def _check(alignment: str, refine: str | None, learn_grid: bool, training: dict[str, Any]) -> None:
    _validation.check_choice("alignment", alignment, ALIGNMENTS)
    if refine not in (None, "global") or (refine is None and (learn_grid or training)):
        raise one_of(f"refine (with {', '.join(['learn_grid', *training])})", refine, ("global",))
    check_options(training)
    _validation.check_seed(training.get("seed", 0))
    _validation.check_int("minibatch", training.get("minibatch", 1))


def check_kinds(base: Any, teacher: Any, numbers: dict[str, Any]) -> None:
    """Two diffusion solvers, and whole numbers of at least 1."""
    for name, solver in (("base", base), ("teacher", base if teacher is None else teacher)):
        if not isinstance(solver, DiffusionSolver):
            came = solver.__name__ if isinstance(solver, type) else type(solver).__name__
            raise InputError(f"{name}: got {came}, expected a diffusion solver such as fewstep.DDIM().")
    for name, value in numbers.items():
        _validation.check_int(name, value, 1, MOST)


def _words(
    plan: Plan, teacher: Teacher, terms: int, substeps: int, states: int, training: dict[str, Any],
    note: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """What a reader of the file wants to know, as JSON has it."""
    words = {
        "solver": plan.name, "evaluations": plan.nfe, "intervals": len(plan.sigmas) - 1,
        "sigma": [float(plan.sigmas[0]), float(plan.sigmas[-1])], "terms": terms,
        "teacher": f"{teacher.plan.name}, {substeps} steps an interval, {teacher.alignment} alignment",
        "fit": "",
        "start states": states,
        "versions": {p: metadata.version(p) for p in ("fewstep", "torch")},
    } | ({"training": training} if training else {})  # fmt: skip
    try:
        return dict(json.loads(json.dumps(words | dict({} if note is None else note))))
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise InputError(f"note: got {_validation.describe(note)}, which JSON cannot hold ({error}); expected plain "
                         "words and numbers by name.") from error  # fmt: skip


def _guarded(fit: Fit, base: Plan) -> tuple[Fit, str]:
    """The base where the fit ends further from the teacher than it, and the reason."""
    if fit.student_rmse < fit.base_rmse:
        return fit, ""
    nought: dict[str, Any] = {
        "kappa": torch.zeros_like(fit.kappa),
        "kept": [False] * base.nfe,
        "made": "none",
    }
    return replace(fit, plan=base, student_rmse=fit.base_rmse, **nought), why(fit.student_rmse, fit.base_rmse)


def why(student: float, base: float) -> str:
    """The reason of a fall-back."""
    return f"held-out distance to the teacher {student:.3g}, with the base {base:.3g}"


def base_plan(
    schedule: Schedule,
    base: DiffusionSolver,
    steps: int | None,
    sigmas: Tensor | None,
    spacing: str,
    final: str,
) -> Plan:
    """The base on the grid that was asked for."""
    if sigmas is None:
        if steps is None:
            raise InputError("steps: got None; expected steps=... or sigmas=... for the grid.")
        sigmas = sigma_grid(schedule, steps, spacing, final)
    plan = base.plan(check_sigmas(sigmas), schedule)
    if plan.levy:
        raise InputError(f"base: got {plan.name!r}, which draws noise; expected a deterministic solver.")
    return plan
