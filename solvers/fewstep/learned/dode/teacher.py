"""What the D-ODE fits share: start states in batches, and a teacher's states at the levels of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._distributed import part, sum_over_processes
from ...errors import InputError
from ...executor import Evaluate, State, run, stage, update
from ...plan import Plan
from ...resolve import evaluator_of, resolve
from ...schedule import Schedule
from ...solver import DiffusionSolver
from ..labelled_model import Model
from ..training import HELD_OUT, held_out
from .correction import in_state, is_plain


@dataclass(frozen=True)
class Work:
    """Start states x (n, *event) in x0 + sigma n, split into fitted and held-out ones.

    Attributes:
        kept, held: indices of the start states that are fitted to, and of those that judge the fit.
        batch: samples per network call.
        spent: a tally of network evaluations of one sample.
    """

    model: Model
    x: Tensor
    kept: Tensor
    held: Tensor
    batch: int
    spent: list[int] = field(default_factory=lambda: [0])

    @classmethod
    def of(cls, model: Model, noise: Tensor, first: float, batch: int | None) -> Work:
        """Start states from the user's noise, alpha x0 + sigma_t n at the first level."""
        if len(noise) < 2 * HELD_OUT:
            raise InputError(f"noise: got {len(noise)} start states, expected at least 16: two of them are held out.")
        if not bool(noise.isfinite().all()):
            raise InputError("noise: got values that are not finite, expected normals.")
        noise = noise.float() if noise.dtype in (torch.float16, torch.bfloat16) else noise
        alpha = model.schedule.alpha(torch.tensor([first], dtype=torch.float64)).item()
        size = float(noise.double().square().mean().sqrt())
        if first > 10 and size > 3 * alpha * first:  # levels at which the noise dominates the state
            raise InputError(
                f"noise: got states of size {size:.3g}, expected alpha x0 + sigma_t n of the first level, of size "
                f"{alpha * first:.3g}: normals for a VP process, sigma_max times normals for EDM and VE."
            )
        batch = batch or min(256, -(-len(noise) // 4))
        return cls(model, noise if alpha == 1 else noise / alpha, *held_out(len(noise)), batch)

    def share(self, which: Tensor) -> list[Tensor]:
        """Split indices into batches; under torch.distributed, return only this process's batches."""
        return list(torch.split(which, self.batch)[part()])

    def start(self, index: Tensor) -> Tensor:
        """These start states."""
        return self.x[index.to(self.x.device)]

    def evaluator(self, plan: Plan, index: Tensor) -> Evaluate:
        """Return a function that evaluates the plan's rows for these start states and counts evaluations."""
        evaluate = evaluator_of(self.model.at(index), plan, self.start(index))

        def counted(i: int, x: Tensor, normals: Any) -> Tensor:
            self.spent[0] += len(x)
            return evaluate(i, x, normals)

        return counted

    def ends(self, plan: Plan, index: Tensor) -> Tensor:
        """The final states of a deterministic plan from these start states."""
        return run(plan, self.start(index), self.evaluator(plan, index), lambda *_: ())

    def evaluations(self) -> int:
        """Network evaluations so far per start state, those on held-out states included."""
        return -(-round(float(sum_over_processes(torch.tensor(float(self.spent[0]))))) // len(self.x))


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
