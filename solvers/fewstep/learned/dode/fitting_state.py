"""What the D-ODE fits share: a model with its labels, batches of start states on their way, a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._distributed import part, sum_over_processes
from ...errors import InputError
from ...plan import Plan
from ...problem import DiffusionModel
from ...schedule import Schedule
from ...solver import DiffusionSolver
from ..labelled_model import Model
from ..training import HELD_OUT, held_out


@dataclass(frozen=True)
class Work:
    """Start states (n, *event) in variance-exploding coordinates, split into fitted and held-out ones."""

    model: Model
    x: Tensor
    batch: int
    spent: list[int] = field(default_factory=lambda: [0])

    @classmethod
    def of(cls, model: Model, noise: Tensor, first: Tensor, batch: int | None) -> Work:
        if len(noise) < 2 * HELD_OUT:
            raise InputError(
                f"noise: got {len(noise)} start states, expected at least 16: two of them are held out."
            )
        if not bool(noise.isfinite().all()):
            raise InputError("noise: got values that are not finite, expected normals.")
        noise = noise.float() if noise.dtype in (torch.float16, torch.bfloat16) else noise
        alpha, sigma = model.schedule.alpha(first).item(), first.item()
        came = float(noise.double().square().mean().sqrt())
        if sigma > 10 and came > 3 * alpha * sigma:  # where noise is all but everything
            raise InputError(
                f"noise: got states of size {came:.3g}, expected alpha x0 + sigma_t n of the first level, of "
                f"size {alpha * sigma:.3g} for {model.schedule}. Give the state as the model knows it: "
                "normals for a VP process, sigma_max times normals for EDM and VE."
            )
        return cls(model, noise if alpha == 1 else noise / alpha, batch or min(256, -(-len(noise) // 4)))

    @property
    def kept(self) -> Tensor:
        """(k,) the start states that are fitted to."""
        return held_out(len(self.x))[0]

    @property
    def held(self) -> Tensor:
        """The start states that judge the fit."""
        return held_out(len(self.x))[1]

    def share(self, which: Tensor) -> list[Tensor]:
        """These start states in batches; of several processes, this one's."""
        return list(torch.split(which, self.batch)[part()])

    def walk(self, plan: Plan, index: Tensor, keep: int = 0) -> Walk:
        return Walk(self.model.at(index), plan, self.x[index.to(self.x.device)], keep, self.spent)

    def evaluations(self) -> int:
        """Network evaluations so far, those on held-out states with them, for each start state."""
        return -(-round(float(sum_over_processes(torch.tensor(float(self.spent[0]))))) // len(self.x))


class Walk:
    """One batch on its way through a plan's rows; the table may be edited ahead of it.

    keep: history terms that a fit may write into the table, whose evaluations must be there.
    spent: a tally of network evaluations of one sample, shared by walks.
    """

    def __init__(
        self, problem: DiffusionModel, plan: Plan, x: Tensor, keep: int = 0, spent: list[int] | None = None
    ) -> None:
        self.problem = problem
        self.plan = plan
        self.x: Tensor = x
        self.spent: list[int] = [0] if spent is None else spent
        self.history: list[Tensor] = []
        # an input that is formed apart from the state has the newest evaluation and so many older ones
        apart = [keep > 0 and not in_state(plan, i) for i in range(plan.nfe)]
        self.spans: list[int] = [
            max(keep + more, span) for more, span in zip(apart, spans(plan), strict=True)
        ]

    def look(self, i: int) -> Tensor:
        """The input of row i, or the final state behind the last row."""
        if i == self.plan.nfe:
            return self.x
        return self._combine(float(self.plan.stage_x[i]), self.plan.stage_eval[i])

    def evaluate(self, i: int) -> None:
        """The network at row i's input, pushed on the history."""
        at, sigma = self.look(i), self.plan.sigma[i]
        D = self.problem.denoiser(at, sigma.to(at))
        self.spent[0] += len(at)
        self.history.insert(0, D if self.plan.prediction == "data" else (at - D) / float(sigma))
        del self.history[self.plan.update_eval.shape[1] :]

    def go(self, i: int) -> None:
        """The state after row i."""
        self.x = self._combine(float(self.plan.update_x[i]), self.plan.update_eval[i])

    def forget(self, i: int) -> None:
        """Let go of evaluations that no row after i asks for: a fit holds many batches half way."""
        del self.history[self.spans[i] :]

    def row(self, i: int) -> None:
        """Row i whole."""
        self.evaluate(i)
        self.go(i)
        self.forget(i)

    def _combine(self, scale: float, weights: Tensor) -> Tensor:
        out = self.x * scale if scale != 0 else torch.zeros_like(self.x)
        numbers = weights.tolist()
        assert not any(numbers[len(self.history) :]), "an evaluation that the table asks for was let go"
        for weight, D in zip(numbers, self.history):
            if weight != 0:
                out = out.add_(D, alpha=weight)
        return out


def spans(plan: Plan) -> list[int]:
    """How many evaluations must be held behind each row for the rows after it."""
    out, oldest = [0] * plan.nfe, plan.nfe
    for i in range(plan.nfe - 1, -1, -1):
        out[i] = max(0, i + 1 - oldest)
        # row i's input asks for evaluations i - 1 - j, its update for i - j
        for weights, newest in ((plan.stage_eval[i], i - 1), (plan.update_eval[i], i)):
            asked = [newest - j for j, w in enumerate(weights.tolist()) if w != 0]
            oldest = min([oldest, *asked])
    return out


class Teacher:
    """A fine solver that stops at the levels of a plan's outcomes.

    Args:
        base: the plan whose outcomes are to be reached.
        substeps: of the teacher, for each interval between the plan's levels.
        alignment: see `distill_dode`.
        spent: the tally of `Walk`.
    """

    def __init__(
        self, schedule: Schedule, solver: DiffusionSolver, base: Plan, substeps: int, alignment: str,
        spent: list[int] | None = None,
    ) -> None:  # fmt: skip
        self.base = base
        self.alignment = alignment
        self.spent: list[int] = [0] if spent is None else spent
        levels = [*base.sigma.tolist(), float(base.sigmas[-1])]
        nodes = levels[:1]
        self.stops: list[int] = [0] * base.nfe
        order = sorted(range(1, len(levels)), key=lambda k: -levels[k])
        for k in order:
            start, end = nodes[-1], levels[k]
            if end < start:
                before = len(nodes)
                nodes += _between(start, end, substeps, schedule.sigma_min)
                first = alignment == "official" and end > float(base.sigmas[-1])
                self.stops[k - 1] = before if first else len(nodes) - 1
            else:
                self.stops[k - 1] = len(nodes) - 1
        self.plan: Plan = solver.plan(torch.tensor(nodes, dtype=torch.float64), schedule)
        plain = bool((self.plan.stage_x == 1).all()) and not bool(self.plan.stage_eval.any())
        if not plain or self.plan.nfe != len(nodes) - 1 or self.plan.levy:
            raise InputError(
                f"teacher: got {self.plan.name!r}, expected a deterministic solver of one evaluation a step "
                "whose state is its next input, such as DDIM() or DPMSolverPP(2)."
            )

    def walk(self, problem: DiffusionModel, x: Tensor) -> Iterator[Tensor]:
        """The states at the outcomes' levels, in the rows' order, each once asked for."""
        walk, seen = Walk(problem, self.plan, x, spent=self.spent), 0
        states = {0: x}
        for k, stop in enumerate(self.stops):
            while seen < stop:
                walk.row(seen)
                seen += 1
                if seen in self.stops[k:]:
                    states[seen] = walk.x
            x = states[stop]
            states = {s: state for s, state in states.items() if s in self.stops[k + 1 :]}
            yield x

    def last(self, problem: DiffusionModel, x: Tensor) -> Tensor:
        """The final states."""
        *_, x = self.walk(problem, x)
        return x


def _between(start: float, end: float, substeps: int, smallest: float) -> list[float]:
    """Levels after start down to end, even in log sigma; on the way to 0 not below the smallest."""
    if end > 0:
        return [start * (end / start) ** (k / substeps) for k in range(1, substeps)] + [end]
    low = min(start, smallest)
    inner = [] if low >= start * (1 - 1e-9) else _between(start, low, substeps - 1 or 1, smallest)
    return [*inner, 0.0]


@torch.no_grad()
def rmse(work: Work, plan: Plan, which: Tensor, teacher: Teacher) -> float:
    """Root mean square distance to the teacher's final state, per element."""
    total, count = 0.0, 0
    for index in work.share(which):
        walk = work.walk(plan, index)
        for i in range(plan.nfe):
            walk.row(i)
        target = teacher.last(walk.problem, work.x[index.to(work.x.device)])
        total += float((walk.x - target).double().square().sum())
        count += target.numel()
    total, count = sum_over_processes(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return float((total / count) ** 0.5)


def weight(plan: Plan, i: int) -> float:
    """The newest evaluation's weight in row i's outcome."""
    return float(plan.update_eval[i, 0] if in_state(plan, i) else plan.stage_eval[i + 1, 0])


def in_state(plan: Plan, i: int) -> bool:
    """Whether row i's outcome is the state itself; else the next input is formed apart from it."""
    return i + 1 == plan.nfe or (float(plan.stage_x[i + 1]) == 1 and not bool(plan.stage_eval[i + 1].any()))


def apply(plan: Plan, i: int, kappa: Tensor) -> None:
    """Write O_i = d_i + sum_j kappa_j (d_i - d_{i-j}) into the table, in place."""
    row, w = (plan.update_eval[i] if in_state(plan, i) else plan.stage_eval[i + 1]), weight(plan, i)
    row[0] += w * kappa.sum()
    row[1 : len(kappa) + 1] -= w * kappa


def widened(plan: Plan, terms: int) -> Plan:
    """Copies of the columns with room for so many history terms."""
    from dataclasses import replace

    grow: Any = (0, max(0, terms + 1 - plan.update_eval.shape[1]))
    pad = torch.nn.functional.pad
    return replace(
        plan, update_eval=pad(plan.update_eval, grow).clone(), stage_eval=pad(plan.stage_eval, grow).clone()
    )
