"""Global refinement of a fitted plan: descend the final state's error through all steps."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..._distributed import distributed, part, sum_over_processes
from ...errors import InputError
from ...plan import Plan
from ...problem import DiffusionModel
from ..training import Minibatch, fit
from .fitting_state import Teacher, Work, in_state, rmse, weight, widened
from .greedy import Fit


class Table(nn.Module):
    """The columns of a plan as functions of parameters."""

    plan: Plan

    @abstractmethod
    def columns(self) -> dict[str, Tensor]:
        """sigma, c, a (rows,), d, b (rows, window) in float64, with their graph."""

    def fixed(self) -> Plan:
        """The plan as it stands."""
        with torch.no_grad():
            columns: dict[str, Any] = {k: v.clone() for k, v in self.columns().items()}
            return replace(self.plan, **columns)


class KappaTable(Table):
    """One or more kappa a row on a fixed grid."""

    def __init__(self, base: Plan, kappa: Tensor) -> None:
        super().__init__()
        self.plan = base
        self.kappa: nn.Parameter = nn.Parameter(kappa.clone())
        self.weights: list[float] = [weight(base, i) for i in range(base.nfe)]
        self.in_state: list[bool] = [in_state(base, i) for i in range(base.nfe)]

    def columns(self) -> dict[str, Tensor]:
        plan, window = self.plan, self.plan.update_eval.shape[1]
        b, d = [*plan.update_eval], [*plan.stage_eval]
        for i, (w, state) in enumerate(zip(self.weights, self.in_state, strict=True)):
            k = self.kappa[i, : min(i, self.kappa.shape[1])]
            change = w * nn.functional.pad(torch.cat([k.sum()[None], -k]), (0, window - 1 - len(k)))
            if state:
                b[i] = b[i] + change
            else:
                d[i + 1] = d[i + 1] + change
        return {
            "sigma": plan.sigma,
            "c": plan.stage_x,
            "a": plan.update_x,
            "b": torch.stack(b),
            "d": torch.stack(d),
        }


class GridTable(Table):
    """Levels by softmax and cumulative sum in log sigma, and history weights whose rows sum to one.

    A plan of one evaluation a step, whose state is its next input. The first and the last level stay.
    The level that the network is told may part from the state's own (as in LD3, arXiv 2405.15506), within
    the range of the schedule.
    """

    def __init__(self, plan: Plan, smallest: float) -> None:
        super().__init__()
        rows = plan.nfe
        multistep = (
            rows == len(plan.sigmas) - 1
            and bool((plan.stage_x == 1).all())
            and not bool(plan.stage_eval.any())
        )
        if not multistep:
            raise InputError(
                f"learn_grid: got {plan.name!r}, expected a base of one evaluation a step whose state is its "
                "next input, such as DDIM() or DPMSolverPP(2)."
            )
        self.plan = plan
        self.data: bool = plan.prediction == "data"
        self.smallest = smallest
        self.to_zero: bool = float(plan.sigmas[-1]) == 0
        ends = plan.sigma if self.to_zero else plan.sigmas
        gaps = -ends.log().diff()
        if self.to_zero:  # the last positive level may move down to the smallest
            gaps = torch.cat([gaps, (ends[-1].log() - torch.tensor(smallest).log()).clamp(min=0.05)[None]])
        self.span: Tensor = gaps.sum()
        self.logits: nn.Parameter = nn.Parameter(gaps.log())
        weights = plan.update_eval / self._scale(plan.sigmas)[:, None]
        full = torch.zeros(rows, rows, dtype=torch.float64)
        full[:, : weights.shape[1]] = weights[:, :rows]
        self.older: nn.Parameter = nn.Parameter(full[:, 1:].tril(-1).clone())
        self.shift: nn.Parameter = nn.Parameter(torch.zeros(rows, dtype=torch.float64))

    def _scale(self, sigmas: Tensor) -> Tensor:
        """What one unit of weight moves the state by."""
        return 1 - sigmas[1:] / sigmas[:-1] if self.data else sigmas[1:] - sigmas[:-1]

    def _told(self, sigmas: Tensor) -> Tensor:
        """The levels that the network is told, none that it was not trained on."""
        low, high = min(self.smallest, float(self.plan.sigma[-1])), float(self.plan.sigmas[0])
        return (sigmas[:-1] * self.shift.exp()).clamp(low, high)

    def columns(self) -> dict[str, Tensor]:
        falls = self.span * self.logits.softmax(0).cumsum(0)
        inner = self.plan.sigmas[0] * torch.exp(-falls[: self.plan.nfe - 1])
        sigmas = torch.cat([self.plan.sigmas[:1], inner, self.plan.sigmas[-1:]])
        older = self.older.tril(-1)
        weights = torch.cat([1 - older.sum(1, keepdim=True), older], 1)
        a = sigmas[1:] / sigmas[:-1] if self.data else torch.ones_like(sigmas[1:])
        return {
            "sigmas": sigmas, "sigma": self._told(sigmas), "a": a, "c": torch.ones_like(a),
            "b": weights * self._scale(sigmas)[:, None], "d": torch.zeros_like(weights),
        }  # fmt: skip


def unroll(problem: DiffusionModel, columns: dict[str, Tensor], data: bool, x: Tensor) -> Tensor:
    """The final state, with a graph to the columns."""
    col = {k: v.to(x) for k, v in columns.items()}
    # weights that may be other than nought; a column with a graph may have any below its diagonal
    live = {
        k: [[columns[k].requires_grad or w != 0 for w in row] for row in columns[k].tolist()] for k in "bd"
    }
    history: list[Tensor] = []

    def combine(scale: Tensor, which: str, i: int) -> Tensor:
        out = x * scale
        for j, D in enumerate(history):
            if live[which][i][j]:
                out = out + col[which][i, j] * D
        return out

    for i in range(len(col["a"])):
        at = combine(col["c"][i], "d", i)
        D = problem.denoiser(at, col["sigma"][i])
        history = [D if data else (at - D) / col["sigma"][i], *history[: col["b"].shape[1] - 1]]
        x = combine(col["a"][i], "b", i)
    return x


def refine_plan(
    work: Work, start: Fit, teacher: Teacher, learn_grid: bool, *, iterations: int = 600, rate: float = 1e-2,
    minibatch: int = 512, seed: int = 0, progress: bool = False,
) -> Fit:  # fmt: skip
    """Go on from a greedy fit; returns the better of the two on the held-out noise.

    Of several processes each takes its part of every minibatch, and all make the same table. Gradients
    go through all rows, so that a minibatch takes the memory of `nfe` evaluations with their graphs.
    """
    plan, kappa, kept = start.plan, start.kappa, work.kept
    table: Table
    if learn_grid:
        table = GridTable(plan, work.model.schedule.sigma_min)
    else:
        table = KappaTable(widened(teacher.base, kappa.shape[1]), kappa)
    ends = _ends(work, teacher)
    data = plan.prediction == "data"

    def loss(batch: Minibatch) -> Tensor:
        index = batch.index
        columns, mine = shared(table.columns()), index[part()]
        work.spent[0] += len(mine) * plan.nfe  # forward; the backward passes come on top
        total = index.new_zeros((), dtype=ends.dtype, device=ends.device)
        if len(mine):
            x, target = (v[mine.to(v.device)] for v in (starts, ends))
            final = unroll(work.model.at(kept[mine]), columns, data, x)
            total = (final - target).square().sum()
        return over_processes(total, columns) / (len(index) * ends[0].numel())

    starts = work.x[kept.to(work.x.device)]
    size = min(minibatch, len(kept))
    fit(
        table, loss, len(kept), iterations=iterations, batch=size, rate=rate, seed=seed, progress=progress,
        split=False,  # it sums over processes itself, for the columns are few and the samples large
    )  # fmt: skip
    refined = table.fixed()
    after = rmse(work, refined, work.held, teacher)
    if not after < start.student_rmse:
        said = (
            f"greedy: the refined table ended {after:.3g} from the teacher, this one {start.student_rmse:.3g}"
        )
        return replace(start, made=said)
    new = table.kappa.detach() if isinstance(table, KappaTable) else torch.full_like(kappa, float("nan"))
    made = "grid and weights" if learn_grid else "global"
    return replace(start, plan=refined, kappa=new, student_rmse=after, made=made)


@torch.no_grad()
def _ends(work: Work, teacher: Teacher) -> Tensor:
    """The teacher's final states of all fitted start states, gathered from all processes."""
    kept = work.kept
    ends = torch.zeros((len(kept), *work.x.shape[1:]), dtype=work.x.dtype, device=work.x.device)
    for index in work.share(kept):
        at = torch.searchsorted(kept, index).to(ends.device)
        ends[at] = teacher.last(work.model.at(index), work.x[index.to(work.x.device)])
    return sum_over_processes(ends)


def shared(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns as they are; their gradients are summed over processes."""
    if not distributed():
        return columns
    sizes = [c.numel() for c in columns.values()]
    flat = _SumGradient.apply(torch.cat([c.flatten() for c in columns.values()]))  # type: ignore[no-untyped-call]
    parts = flat.split(sizes)
    return {k: part.reshape(c.shape) for part, (k, c) in zip(parts, columns.items(), strict=True)}


def over_processes(total: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """The sum of what each process has of a loss."""
    if not distributed():
        return total
    for column in columns.values():  # a process without a sample still has its part in the sum of gradients
        total = total + 0 * column.sum().to(total)
    value: Tensor = _SumValue.apply(total)  # type: ignore[no-untyped-call]
    return value


class _SumGradient(torch.autograd.Function):
    """x; its gradient summed over processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_processes(gradients[0])


class _SumValue(torch.autograd.Function):
    """The sum over processes; its gradient is each process's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_processes(x.detach().reshape(1))[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]
