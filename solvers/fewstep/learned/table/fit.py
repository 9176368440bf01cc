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
from ..._progress import progress as progress_bar
from ...errors import InputError, NonFiniteError, named
from ...fingerprint import Fingerprint, Fit
from ...grid import MOST
from ...plan import Plan
from ...problem import DiffusionModel
from ...solver import DiffusionSolver
from ..labelled_model import Labelled, Model
from .coefficients import Coefficients
from .deterministic import deterministic
from .objective import LOSSES, Loss, Objective
from .report import Errors, Law, TableReport
from .search import FREE, Candidate, Search, searched
from .setting import Setting
from .starts import Start
from .stochastic import stochastic

DETERMINISTIC = 256  # start states of the deterministic table that a stochastic one is compared with
TOLERATED = 1.02  # of the base's median and 90 % quantile: both have sampling error


@named
def fit_table(
    problem: DiffusionModel | Labelled, *, nfe: int, noise: Tensor, labels: Tensor | None = None,
    levy: str | None = None, sigmas: Tensor | None = None, ahead: bool = True, free: str | Sequence[str] = "all",
    start: Plan | DiffusionSolver | Sequence[Plan | DiffusionSolver] | None = None, starts: int = 5,
    teacher: DiffusionSolver | None = None, teacher_steps: int | None = None, loss: str | Loss = "squared",
    decode: Callable[[Tensor], Tensor] | None = None, iterations: int = 100, directions: int | None = None,
    guard: bool = True, batch: int | None = None, seed: int = 0, progress: bool = False,
    notes: dict[str, Any] | None = None,
) -> tuple[Plan, TableReport]:  # fmt: skip
    r"""Fit all numbers of a sampler's table to a fine solver of the probability-flow ODE.

    The input of evaluation i, and the final state, become

    .. math:: z_i = A_i x_0 + \sum_{j<i} B_{ij} D_j, \qquad D_j = D(z_j, \sigma_j),

    with every :math:`A_i`, :math:`B_{ij}` and every level :math:`\sigma_j` that the network is given free. This holds
    all multistep and singlestep samplers and the tables of D-ODE, LD3, BNS and S4S. The distance of the final state to
    the teacher's is minimised by Levenberg-Marquardt, from the best untrained samplers of this many evaluations and
    from their formulas on fitted levels (LD3, arXiv 2405.15506).

    With `levy` the table is stochastic. Its rows also read the unit normals :math:`\xi` of the coarse intervals of the
    Brownian path that they have crossed, and are about to cross,

    .. math:: z_i = A_i x_0 + \sum_{j<i} B_{ij} D_j + \sum_{k \le i} M_{ik} \xi_k,

    with W, W and H, or W, H and K for each interval. It is fitted to the ends of a fine stochastic sampler on the same
    paths, and follows a given path: `sample(..., seed=...)` or `path=`.

    An iteration costs, per start state, `nfe` evaluations with 2 to 5 backward passes, and 4 `nfe`
    evaluations without; memory is that of one evaluation's graph for a batch.

    Args:
        problem: the model; with `labels` a function `labels -> DiffusionModel` of one label per sample.
        nfe: network evaluations of the table.
        noise: (n, *event) start states at the first level, n >= 16; one in eight is held out. A few hundred.
        labels: (n, ...) one for each start state, distributed as in sampling.
        levy: None for a table of the probability-flow ODE; "W", "H" or "K" for a stochastic one: the normals that its
            rows read. `noise` then sets the number of paths and the shape; 1,000 paths and more pay off.
        sigmas: (nfe + 1,) levels between which the normals are taken, with `levy`; by default from the schedule's
            largest to its smallest, by the variance of the data.
        ahead: with `levy`, let a row read the interval that it is about to cross.
        free: what is fitted: "all"; "levels" only (those of the grid, under the solver's formula, and those that the
            network is given); or some of "weights" (of the evaluations, with the sums of the start), "scale" (of the
            first state, and those sums), "given" (levels of the network) and, with
            `levy`, "noise".
        start: a solver or a plan to start from, or several, instead of the untrained samplers of this library.
        starts: the number of starts that are tried, the best of each solver.
        teacher: a deterministic solver, by default `UniPC(3)`; with `levy` a stochastic one, by default
            `EulerMaruyama()`.
        teacher_steps: its steps, even in log sigma; by default 100, with `levy` about 300.
        loss: of a sample: "squared", "robust" (a logarithm for samples far off), or a function `(student ends, teacher
            ends) -> (batch,)` with a gradient.
        decode: applied to the ends before the loss, for instance the decoder of latents.
        iterations: the most of the last candidate, after short fits of all and longer ones of the best three.
        directions: the most output directions per state and iteration through which the Gauss-Newton matrix is seen,
            by default 1 to 4, by the number of start states; the gradient is exact.
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
    nfe = _validation.check_int("nfe", nfe, 1, MOST)
    least = {"starts": (starts, 1), "iterations": (iterations, 0)}
    if directions is not None:
        least["directions"] = (directions, 1)
    if teacher_steps is not None:
        least["teacher_steps"] = (teacher_steps, 2)
    for name, (value, low) in least.items():
        _validation.check_int(name, value, low, MOST)
    if levy is None and sigmas is not None:
        raise InputError("sigmas: got levels without levy; a deterministic table fits its own. Omit them.")
    seed = _validation.check_seed(seed)
    names = _names(free, FREE if levy is None else (*FREE, "noise"))
    if not callable(loss) or isinstance(loss, type):
        _validation.check_choice("loss", loss, LOSSES)
    if decode is not None:
        _validation.check_callable("decode", decode, "a function of final states")
    words = _validation.check_json("notes", {} if notes is None else notes, {})
    model = Model.of(problem, labels, noise)
    batch = min(1024, max(16, (1 << 15) // max(1, noise[0].numel()))) if batch is None else batch
    batch = _validation.check_int("batch", batch, 1, MOST)
    if levy is None:
        setting = deterministic(model, noise, nfe, start, teacher, teacher_steps, batch)
    else:
        setting = stochastic(model, noise, nfe, start, teacher, teacher_steps, batch, levy, sigmas, seed)
    pairs, schedule = setting.pairs, model.schedule
    ranked, held = _ranked(setting, seed)
    base = ranked[0]
    bounds = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
    scale = float(_judge(setting, seed).squares(base.table, pairs.kept).median())
    search = Search(
        Objective(pairs, loss, decode, max(scale, 1e-30), directions, seed, pairs.kept), held, bounds, ahead
    )
    chosen = list({s.plan.name: s for s in reversed(ranked)}.values())[::-1][:starts]
    bar = progress_bar(chosen, "start", show=progress)
    found = searched(search, list(bar), schedule, names, iterations, lambda name: bar.set_postfix_str(name))
    made, report = _finished(setting, search, base, held, found, guard, words, began)
    if levy is None:
        return made, report
    options = dict(loss=loss, decode=decode, teacher_steps=teacher_steps, iterations=min(iterations, 20), seed=seed)
    return made, _with_laws(setting, made, base, report, options, began)


def _names(free: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    """What is fitted, from a user's argument."""
    if isinstance(free, str) and free == "all":
        return known
    alone = ("levels",) if "noise" not in known else ()
    listed = [free] if isinstance(free, str) else free
    words = known + (alone if isinstance(free, str) else ())
    expected = f"'all' or some of {known}"
    return tuple(
        _validation.check_choice("free", n, words) for n in _validation.check_sequence("free", listed, expected)
    )


def _judge(setting: Setting, seed: int) -> Objective:
    return Objective(setting.pairs, "squared", None, 1.0, None, seed, setting.pairs.kept)


def _ranked(setting: Setting, seed: int) -> tuple[list[Start], Errors]:
    """The starts by their distance on the fitted states, and the errors of the best on the held-out ones."""
    judge, some = _judge(setting, seed), setting.pairs.kept[: setting.pairs.batch]
    distances = {s.name: float(judge.squares(s.table, some).mean()) for s in setting.pool}
    ranked = sorted(setting.pool, key=lambda s: (not math.isfinite(distances[s.name]), distances[s.name]))
    return ranked, Errors.of(judge.squares(ranked[0].table, setting.pairs.held))


def _finished(
    setting: Setting, search: Search, base: Start, held: Errors, found: list[Candidate], guard: bool,
    words: dict[str, Any], began: float,
) -> tuple[Plan, TableReport]:  # fmt: skip
    """The best candidate, or the base with the reason."""
    best, pairs, teacher_rmse = found[0], setting.pairs, setting.teacher_rmse
    errors = Errors.of(search.objective.squares(best.table, pairs.held))
    worse = [f"{name} {mine:.3g}, untrained {theirs:.3g}" for name, mine, theirs, most in (
        ("RMSE", errors.rmse, held.rmse, 1.0), ("median", errors.median, held.median, TOLERATED),
        ("90 % quantile", errors.q90, held.q90, TOLERATED)) if not mine < most * theirs]  # fmt: skip
    reasons = worse
    if callable(search.objective.loss):  # what the user asked for decides, the distances are reported
        before = float(search.objective.losses(base.table, pairs.held).mean())
        reasons = [] if best.run.score < before else [f"loss {best.run.score:.3g}, untrained {before:.3g}"]
    fallback = "on held-out states " + "; ".join(reasons) if reasons and guard else ""
    remarks = [] if fallback else [f"worse than the untrained sampler: {r}" for r in worse]
    if teacher_rmse > errors.rmse:
        remarks.append(
            f"the teacher differs from itself with half its steps by {teacher_rmse:.3g}: raise teacher_steps"
        )
    plan = replace(base.plan, fit=None) if fallback else setting.plan(best.table, base.plan)
    errors = held if fallback else errors
    candidates = {c.name: c.run.score for c in found}
    report = TableReport(
        base.name, held, errors, setting.teacher, teacher_rmse, candidates, "" if fallback else best.name,
        0 if fallback else best.run.iterations, fallback, {}, tuple(remarks),
        pairs.evaluations() + setting.teacher_evaluations, time.perf_counter() - began,
    )  # fmt: skip
    facts = {
        "start": report.start or base.name, "evaluations": plan.nfe, "start states": len(pairs.x),
        "sigma": list(base.plan.ends), "teacher": setting.teacher,
        "rmse": errors.rmse, "rmse of the base": held.rmse, "fallback": fallback,
        "versions": {p: metadata.version(p) for p in ("fewstep", "torch")},
    }  # fmt: skip
    fingerprint = Fingerprint.of_model(pairs.model, pairs.x)
    name = f"Table({base.plan.name if fallback else best.name})"
    return replace(plan, name=name, fit=Fit(fingerprint, facts | words)), report


def _with_laws(
    setting: Setting, made: Plan, base: Start, report: TableReport, options: dict[str, Any], began: float
) -> TableReport:
    """The report of a stochastic table with the laws of its samples and of those of a deterministic table."""
    pairs, schedule, spent = setting.pairs, setting.pairs.model.schedule, 0
    plans, remarks = {"fitted": made, "untrained": base.plan}, list(report.remarks)
    if math.isclose(made.ends[0], schedule.sigma_max, rel_tol=1e-3):
        alpha = schedule.alpha(torch.tensor([schedule.sigma_max], dtype=torch.float64)).item()
        few = slice(0, DETERMINISTIC)
        labels = None if pairs.model.labels is None else pairs.model.labels[few]
        noise = alpha * pairs.x[few]
        try:
            plans["deterministic"], its_report = fit_table(
                pairs.model.problem, nfe=made.nfe, noise=noise, labels=labels, starts=1, batch=pairs.batch, **options
            )
        except (InputError, NonFiniteError) as error:  # the stochastic table is done and stays
            remarks.append(f"no deterministic table to compare with: {error}")
        else:
            remarks += [f"deterministic table: fallback {its_report.fallback}"] if its_report.fallback else []
            spent = -(-its_report.evaluations * len(noise) // len(pairs.x))
    else:
        remarks.append("no deterministic table to compare with: sigmas do not begin at the schedule's largest level")
    letters = len(pairs.normals) // made.nfe
    laws = {n: Law.of(pairs.finals(Coefficients.of(p, letters)), pairs.ends) for n, p in plans.items()}
    laws["teacher"] = Law.of(pairs.ends, pairs.ends)
    spent += pairs.evaluations() + setting.teacher_evaluations
    return replace(
        report, laws=laws, remarks=tuple(remarks), evaluations=spent, seconds=time.perf_counter() - began
    )  # fmt: skip
