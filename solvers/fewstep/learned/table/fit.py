"""`fit_table`: every number of a plan, fitted to a fine teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ... import _validation
from ..._distributed import sum_over_processes
from ..._progress import progress as progress_bar
from ...errors import InputError, named
from ...fingerprint import Fingerprint, Fit
from ...grid import MOST, sigma_grid
from ...plan import Plan
from ...problem import DiffusionModel
from ...resolve import resolve
from ...samplers.unipc import UniPC
from ...schedule import Schedule
from ...solver import DiffusionSolver
from ..labelled_model import Labelled, Model
from ..start_states import Work
from .coefficients import Coefficients
from .objective import LOSSES, Loss, Objective, Pairs
from .report import Errors, TableReport
from .search import FREE, Candidate, Search, searched
from .starts import Start, given, untrained

TOLERATED = 1.02  # of the base's median and 90 % quantile: both have sampling error


@named
def fit_table(
    problem: DiffusionModel | Labelled, *, nfe: int, noise: Tensor, labels: Tensor | None = None,
    free: str | Sequence[str] = "all", start: Plan | DiffusionSolver | Sequence[Plan | DiffusionSolver] | None = None,
    starts: int = 5, teacher: DiffusionSolver | None = None, teacher_steps: int = 100, loss: str | Loss = "squared",
    decode: Callable[[Tensor], Tensor] | None = None, iterations: int = 100, directions: int = 4, guard: bool = True,
    batch: int | None = None, seed: int = 0, progress: bool = False, notes: dict[str, Any] | None = None,
) -> tuple[Plan, TableReport]:  # fmt: skip
    r"""Fit all numbers of a sampler's table to a fine solver of the probability-flow ODE.

    The input of evaluation i, and the final state, become

    .. math:: z_i = A_i x_0 + \sum_{j<i} B_{ij} D_j, \qquad D_j = D(z_j, \sigma_j),

    with every :math:`A_i`, :math:`B_{ij}` and every level :math:`\sigma_j` that the network is given free. This holds
    all multistep and singlestep samplers and the tables of D-ODE, LD3, BNS and S4S. The distance of the final state to
    the teacher's is minimised by Levenberg-Marquardt, from the best untrained samplers of this many evaluations and
    from their formulas on fitted levels (LD3, arXiv 2405.15506).

    An iteration costs, per start state, `nfe` evaluations with about `directions` backward passes, and 4 `nfe`
    evaluations without; memory is that of one evaluation's graph for a batch.

    Args:
        problem: the model; with `labels` a function `labels -> DiffusionModel` of one label per sample.
        nfe: network evaluations of the table.
        noise: (n, *event) start states at the first level, n >= 16; one in eight is held out. A few hundred.
        labels: (n, ...) one for each start state, distributed as in sampling.
        free: what is fitted: "all"; "levels" only (those of the grid, under the solver's formula, and those that the
            network is given); or some of "weights" (of the evaluations, with the sums of the start), "scale" (of the
            first state, and those sums) and "given" (levels of the network).
        start: a solver or a plan to start from, or several, instead of the untrained samplers of this library.
        starts: the number of starts that are tried, the best of each solver.
        teacher: a deterministic solver; by default `UniPC(3)`.
        teacher_steps: its steps, even in log sigma.
        loss: of a sample: "squared", "robust" (a logarithm for samples far off), or a function `(student ends, teacher
            ends) -> (batch,)` with a gradient.
        decode: applied to the ends before the loss, for instance the decoder of latents.
        iterations: the most for each of the last three candidates.
        directions: the most output directions per state and iteration through which the Gauss-Newton matrix is seen;
            the gradient is exact.
        guard: return the best untrained sampler unless the fit is closer to the teacher on the held-out states, in
            RMSE without harm to the median and the 90 % quantile. With a function as loss that loss decides, and
            distances that became larger are remarks of the report.
        batch: samples per network call; by default few enough for 32,768 numbers, and at least 16.
        seed: of the random directions.
        progress: show a progress bar on a terminal, in a pipe a line every 30 seconds.
        notes: JSON values to keep in the table's notes, for instance `{"guidance": 3.0}`.

    Returns:
        the table, a `Plan` with `fit`, and a report.

    Raises:
        InputError: arguments out of range, start states that do not belong to the schedule, starts of another number of
            evaluations, a teacher that draws noise, a loss that is not one number per sample.
    """
    began = time.perf_counter()
    _validation.check_int("nfe", nfe, 1, MOST)
    least = {"starts": 1, "teacher_steps": 2, "iterations": 0, "directions": 1}
    for (name, low), value in zip(least.items(), (starts, teacher_steps, iterations, directions), strict=True):
        _validation.check_int(name, value, low, MOST)
    _validation.check_seed(seed)
    names = _names(free)
    if not callable(loss) or isinstance(loss, type):
        _validation.check_choice("loss", loss, LOSSES)
    if decode is not None:
        _validation.check_callable("decode", decode, "a function of final states")
    words = _validation.check_json("notes", {} if notes is None else notes, {})
    model = Model.of(problem, labels, noise)
    schedule = model.schedule
    pool = untrained(schedule, nfe) if start is None else given(start, schedule, nfe)
    fine = _teacher(UniPC(3) if teacher is None else teacher, schedule, teacher_steps)
    batch = min(1024, max(16, (1 << 15) // max(1, noise[0].numel()))) if batch is None else batch
    work = Work.of(model, noise, float(fine[0].sigmas[0]), _validation.check_int("batch", batch, 1, MOST))
    pairs, teacher_rmse = _pairs(work, *fine)
    ranked, base, held = _ranked(pairs, pool, seed)
    bounds = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
    scale = float(
        Objective(pairs, "squared", None, 1.0, 1, seed).squares(Coefficients.of(base.plan), pairs.kept).median()
    )
    search = Search(Objective(pairs, loss, decode, max(scale, 1e-30), directions, seed), held, bounds)
    chosen = list({s.plan.name: s for s in reversed(ranked)}.values())[::-1][:starts]
    bar = progress_bar(chosen, "start", show=progress)
    found = searched(search, list(bar), schedule, names, iterations, lambda name: bar.set_postfix_str(name))
    return _finished(work, pairs, search, base, held, found, fine[0], teacher_rmse, guard, words, began)


def _names(free: Any) -> tuple[str, ...]:
    """What is fitted, from a user's argument."""
    if isinstance(free, str) and free in ("all", "levels"):
        return FREE if free == "all" else ("levels",)
    listed = [free] if isinstance(free, str) else free
    return tuple(_validation.check_choice("free", n, FREE if len(listed) > 1 else (*FREE, "all", "levels"))
                 for n in _validation.check_sequence("free", listed, f"'all', 'levels' or some of {FREE}"))  # fmt: skip


def _teacher(solver: Any, schedule: Schedule, steps: int) -> tuple[Plan, Plan]:
    """The teacher's plan, and the one of half as many steps."""
    _validation.check_instance("teacher", solver, DiffusionSolver, "a diffusion solver such as fewstep.UniPC(3)")
    plans = [resolve(solver, schedule, sigmas=sigma_grid(schedule, n))[0] for n in (steps, -(-steps // 2))]
    if plans[0].levy:
        raise InputError(f"teacher: got {plans[0].name!r}, which draws noise; expected a deterministic solver.")
    return plans[0], plans[1]


@torch.no_grad()
def _pairs(work: Work, fine: Plan, half: Plan) -> tuple[Pairs, float]:
    """The teacher's ends of all start states, and the distance of the half as fine teacher on held-out ones."""

    def ends(plan: Plan, which: Tensor) -> Tensor:
        out = torch.zeros_like(work.x)
        for index in work.share(which):
            out[index.to(out.device)] = work.ends(plan, index)
        return sum_over_processes(out)

    end = ends(fine, torch.arange(len(work.x)))
    if not bool(end.isfinite().all()):
        raise InputError("problem: its model gives values that are not finite for these start states.")
    at = work.held.to(end.device)
    gap = (ends(half, work.held)[at] - end[at]).double().square().mean().sqrt()
    normals = work.x.new_zeros(0, *work.x.shape)
    return Pairs(work.model, work.x, end, normals, work.kept, work.held, work.batch, work.spent), float(gap)


def _ranked(pairs: Pairs, pool: list[Start], seed: int) -> tuple[list[Start], Start, Errors]:
    """The starts by their distance on the fitted states, the best, and its errors on the held-out ones."""
    judge = Objective(pairs, "squared", None, 1.0, 1, seed)
    distances = {s.name: float(judge.squares(Coefficients.of(s.plan), pairs.kept).mean()) for s in pool}
    ranked = sorted(pool, key=lambda s: (not math.isfinite(distances[s.name]), distances[s.name]))
    return ranked, ranked[0], Errors.of(judge.squares(Coefficients.of(ranked[0].plan), pairs.held))


def _finished(
    work: Work, pairs: Pairs, search: Search, base: Start, held: Errors, found: list[Candidate], fine: Plan,
    teacher_rmse: float, guard: bool, words: dict[str, Any], began: float,
) -> tuple[Plan, TableReport]:  # fmt: skip
    """The best candidate, or the base with the reason."""
    best = found[0]
    errors = Errors.of(search.objective.squares(best.table, pairs.held))
    worse = [f"{name} {mine:.3g}, untrained {theirs:.3g}" for name, mine, theirs, most in (
        ("RMSE", errors.rmse, held.rmse, 1.0), ("median", errors.median, held.median, TOLERATED),
        ("90 % quantile", errors.q90, held.q90, TOLERATED)) if not mine < most * theirs]  # fmt: skip
    reasons = worse
    if callable(search.objective.loss):  # what the user asked for decides, the distances are reported
        before = float(search.objective.losses(Coefficients.of(base.plan), pairs.held).mean())
        reasons = [] if best.run.score < before else [f"loss {best.run.score:.3g}, untrained {before:.3g}"]
    fallback = "on held-out states " + "; ".join(reasons) if reasons and guard else ""
    remarks = [] if fallback else [f"worse than the untrained sampler: {r}" for r in worse]
    if teacher_rmse > errors.rmse:
        remarks.append(
            f"the teacher differs from itself with half its steps by {teacher_rmse:.3g}: raise teacher_steps"
        )
    plan = replace(base.plan, fit=None) if fallback else best.table.plan("table", _grid(best.table, base.plan))
    errors = held if fallback else errors
    candidates = {c.name: c.run.score for c in found}
    report = TableReport(
        base.name, held, errors, fine.name, teacher_rmse, candidates, "" if fallback else best.name,
        0 if fallback else best.run.iterations, fallback, tuple(remarks), work.evaluations(),
        time.perf_counter() - began,
    )  # fmt: skip
    facts = {
        "start": report.start or base.name, "evaluations": plan.nfe, "start states": len(work.x),
        "sigma": [float(base.plan.sigmas[0]), float(base.plan.sigmas[-1])], "teacher": f"{fine.name}, {fine.nfe} steps",
        "rmse": errors.rmse, "rmse of the base": held.rmse, "fallback": fallback,
        "versions": {p: metadata.version(p) for p in ("fewstep", "torch")},
    }  # fmt: skip
    fingerprint = Fingerprint.of_model(work.model, work.x)
    name = f"Table({base.plan.name if fallback else best.name})"
    return replace(plan, name=name, fit=Fit(fingerprint, facts | words)), report


def _grid(c: Coefficients, base: Plan) -> Tensor:
    """Nominal levels of the inputs, decreasing: the noise that is left of the first state."""
    first = float(base.sigmas[0])
    levels, above = [first], first
    for scale in c.weights[1:-1, 0].tolist():
        above = min(max(scale * first, 1e-3 * above), above * (1 - 1e-6))
        levels.append(above)
    return torch.tensor([*levels, 0.0], dtype=torch.float64)
