"""A teacher's states at the levels of a plan."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..._distributed import sum_over_processes
from ...errors import InputError
from ...executor import State, stage, update
from ...plan import Plan
from ...resolve import resolve
from ...schedule import Schedule
from ...solver import DiffusionSolver
from ..start_states import Work
from .correction import in_state, is_plain


def lookback(plan: Plan, terms: int = 0) -> list[int]:
    """How many evaluations must be held after each row, for later rows and for a fit of `terms` columns of kappa."""
    out, oldest = [0] * plan.nfe, plan.nfe
    for i, row in reversed(list(enumerate(plan.rows))):
        # a stage that the fit edits has the newest evaluation in addition to the older ones
        fitted = terms and terms + (not in_state(plan, i))
        out[i] = max(fitted, i + 1 - oldest)
        asked = [i - 1 - j for _, j in row.stage.evaluations] + [i - j for _, j in row.update.evaluations]
        oldest = min([oldest, *asked])
    return out


class Teacher:
    """A fine solver that stops at the levels of a plan's outcomes, `substeps` steps after one another.

    Raises:
        InputError: a solver that draws noise, or whose evaluations are not made at its states.
    """

    def __init__(self, schedule: Schedule, solver: DiffusionSolver, base: Plan, substeps: int) -> None:
        levels = [*base.sigma.tolist(), float(base.sigmas[-1])]
        nodes = levels[:1]
        self.stops: list[int] = [0] * base.nfe
        aligned = getattr(solver, "aligned", True)  # see compat.MisalignedTeacher
        for k in sorted(range(1, len(levels)), key=lambda k: -levels[k]):
            start, end, first = nodes[-1], levels[k], len(nodes)
            if end < start:
                nodes += _between(start, end, substeps, schedule.sigma_min)
            early = not aligned and end < start and end > float(base.sigmas[-1])
            self.stops[k - 1] = first if early else len(nodes) - 1
        self.plan: Plan = resolve(solver, schedule, sigmas=torch.tensor(nodes, dtype=torch.float64))[0]
        if not is_plain(self.plan) or self.plan.levy:
            raise InputError(
                f"teacher: got {self.plan.name!r}, expected a deterministic solver of one evaluation per step made at "
                "its state, such as DDIM() or DPMSolverPP(2)."
            )
        self.lookback: list[int] = lookback(self.plan)

    def states(self, work: Work, index: Tensor) -> Iterator[Tensor]:
        """The states at the levels of the outcomes, in the order of the rows, computed when asked for."""
        evaluate, state, done = work.evaluator(self.plan, index), State(work.start(index)), 0
        held = {0: state.x}
        for k, stop in enumerate(self.stops):
            while done < stop:
                row = self.plan.rows[done]
                state = update(row, state, evaluate(done, stage(row, state), ()))
                state = state._replace(evaluations=state.evaluations[: self.lookback[done]])
                done += 1
                if done in self.stops[k:]:
                    held[done] = state.x
            x = held[stop]
            held = {s: y for s, y in held.items() if s in self.stops[k + 1 :]}
            yield x


def _between(start: float, end: float, substeps: int, smallest: float) -> list[float]:
    """Levels after start down to end, even in log sigma; on the way to 0 none below the smallest."""
    if end > 0:
        return [start * (end / start) ** (k / substeps) for k in range(1, substeps)] + [end]
    low = min(start, smallest)
    inner = [] if low >= start * (1 - 1e-9) else _between(start, low, substeps - 1 or 1, smallest)
    return [*inner, 0.0]


@torch.no_grad()
def teacher_rmse(work: Work, plan: Plan, which: Tensor, teacher: Teacher) -> float:
    """Root mean square distance to the teacher's final states, per element."""
    sums = torch.zeros(2, dtype=torch.float64, device=work.x.device)  # of squares, and of ones
    for index in work.share(which):
        gap = work.ends(plan, index) - work.ends(teacher.plan, index)
        sums[0] += gap.double().square().sum()
        sums[1] += gap.numel()
    total, count = sum_over_processes(sums).tolist()
    return float((total / count) ** 0.5)
