"""The sequential fit: closed-form least squares on the student's own states, row after row.

Row i of a plan ends in an outcome, the input of row i + 1 or the final state. With the newest evaluation d_i replaced
by d_i + sum_j kappa_j (d_i - d_{i-j}) the outcome moves by sum_j kappa_j g_j, where g_j = w (d_i - d_{i-j}) and w is
the weight of d_i in it. Least squares against the teacher's state at the same level, over samples and elements, has
the normal equations <g_a, g_b> kappa_b = <g_a, r>.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._distributed import sum_over_processes
from ..._progress import progress as progress_bar
from ...errors import InputError
from ...executor import Evaluate, State, stage, update
from ...plan import Plan
from ..start_states import Work
from .correction import corrected, outcome_weights
from .teacher import Teacher, lookback, teacher_rmse

CUT = 1e-12  # relative to the largest eigenvalue: directions that float64 sums cannot tell from dependent ones


@dataclass(frozen=True)
class Candidate:
    """A fitted plan with its distances to the teacher on held-out noise; fields as in `DODEReport`."""

    plan: Plan
    kappa: Tensor
    r2: list[float]
    kept: list[bool]
    base_rmse: float
    student_rmse: float


@dataclass
class _Batch:
    """A batch of start states during the fit: their current state, and the targets of the remaining rows."""

    state: State
    evaluate: Evaluate
    targets: Iterator[Tensor]
    evaluation: Tensor | None = None  # of the row that is being fitted


@torch.no_grad()
def greedy(work: Work, base: Plan, teacher: Teacher, terms: int, guard: bool, progress: bool) -> Candidate:
    """Fit row after row, each at the states that the fitted rows before it lead to."""
    kappa = torch.zeros(base.nfe, terms, dtype=torch.float64)
    plan, weights, held_after = corrected(base, kappa), outcome_weights(base).tolist(), lookback(base, terms)
    fitted, held = (
        [_Batch(State(work.start(i)), work.evaluator(plan, i), teacher.states(work, i)) for i in work.share(which)]
        for which in (work.kept, work.held)
    )
    r2, kept = [0.0] * plan.nfe, [False] * plan.nfe
    for i in progress_bar(range(plan.nfe), "row", show=progress):
        both = [_products(group, plan, i, min(terms, i), weights[i], work.x.device) for group in (fitted, held)]
        products, test = torch.stack(both).cpu()  # the row's only read from the device
        if not math.isfinite(rest := float(products[-1, -1])):
            raise InputError("problem: its model gives values that are not finite for these start states.")
        solution = _solve(products)
        if len(solution) and (not guard or _gain(test, solution) > 0):
            kappa[i, : len(solution)] = solution
            r2[i], kept[i] = _gain(products, solution) / max(rest, 1e-300), True
            plan = corrected(base, kappa)
        for batch in [*fitted, *held]:
            assert batch.evaluation is not None
            state = update(plan.rows[i], batch.state, batch.evaluation)
            # many batches wait here: release what no later row needs
            batch.state = state._replace(evaluations=state.evaluations[: held_after[i]])
            batch.evaluation = None
    del fitted, held  # their states, before the plan is measured
    base_rmse, student_rmse = (teacher_rmse(work, p, work.held, teacher) for p in (base, plan))
    return Candidate(plan, kappa, r2, kept, base_rmse, student_rmse)


def _products(
    group: list[_Batch], plan: Plan, i: int, terms: int, weight: float, device: torch.device
) -> Tensor:  # fmt: skip
    """(terms + 1, terms + 1) inner products of row i's directions g_1, g_2, ... and its residual r."""
    total = torch.zeros(terms + 1, terms + 1, dtype=torch.float64, device=device)
    for batch in group:
        batch.evaluation = batch.evaluate(i, stage(plan.rows[i], batch.state), ())
        after = update(plan.rows[i], batch.state, batch.evaluation)
        outcome = after.x if i + 1 == plan.nfe else stage(plan.rows[i + 1], after)
        new, *old = after.evaluations
        vectors = [(new - D).flatten().double() * weight for D in old[:terms]]
        vectors.append((next(batch.targets) - outcome).flatten().double())
        for a, u in enumerate(vectors):
            for b, v in enumerate(vectors[: a + 1]):
                total[a, b] += u @ v
    total = sum_over_processes(total)
    return total.tril() + total.tril(-1).T


def _solve(products: Tensor) -> Tensor:
    """kappa; empty where the evaluations did not change or are not finite."""
    G, g = products[:-1, :-1], products[:-1, -1]
    if not 0 < float(G.trace()) < math.inf:
        return g[:0]
    values, vectors = torch.linalg.eigh(G)
    # the shortest solution where directions are dependent; a ridge would change the other directions too
    inverse = torch.where(values > CUT * values[-1], 1 / values, 0.0)
    kappa: Tensor = vectors @ (inverse * (vectors.T @ g))
    return kappa


def _gain(products: Tensor, kappa: Tensor) -> float:
    """The decrease of the squared distance by kappa."""
    return float(2 * kappa @ products[:-1, -1] - kappa @ products[:-1, :-1] @ kappa)
