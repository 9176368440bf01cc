"""Global refinement of a fitted plan: gradient descent on the error of the final states, through all rows."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..._distributed import sum_over_processes
from ..._validation import check_answer
from ...errors import InputError, NonFiniteError
from ...executor import State, evaluation_of, stage, update
from ...plan import Plan, Row
from ..start_states import Work
from ..training import Minibatch, TrainingOptions, fit
from .correction import corrected, is_plain
from .greedy import Candidate
from .teacher import Teacher, teacher_rmse

DEFAULTS = TrainingOptions(iterations=600, batch_size=512, learning_rate=1e-2)


class KappaTable(nn.Module):
    """A plan as a function of kappa (rows, terms), on a fixed grid."""

    def __init__(self, base: Plan, kappa: Tensor) -> None:
        super().__init__()
        self.base: Plan = base
        self.kappa: nn.Parameter = nn.Parameter(kappa.clone())

    def plan(self) -> Plan:
        """The plan, with a graph to the parameters."""
        return corrected(self.base, self.kappa)


class GridTable(nn.Module):
    """A plan as a function of its levels and of all its history weights, whose rows sum to one.

    The levels are a cumulative sum of a softmax in log sigma, with fixed ends. The level passed to the network may
    differ from that of the state (as in LD3, arXiv 2405.15506), within the range of the schedule.
    """

    def __init__(self, base: Plan, smallest: float) -> None:
        super().__init__()
        if not is_plain(base):
            raise InputError(
                f"learn_grid: got {base.name!r}, expected a base of one evaluation per step made at its state, such as "
                "DDIM() or DPMSolverPP(2)."
            )
        self.base: Plan = base
        self.smallest: float = smallest
        ends = base.sigma if float(base.sigmas[-1]) == 0 else base.sigmas
        gaps = -ends.log().diff()
        if float(base.sigmas[-1]) == 0:  # the last positive level may move down to the smallest
            gaps = torch.cat([gaps, (ends[-1].log() - torch.tensor(smallest).log()).clamp(min=0.05)[None]])
        self.span: Tensor = gaps.sum()
        self.logits: nn.Parameter = nn.Parameter(gaps.log())
        rows = base.nfe
        weights = (base.update_eval / self._scale(base.sigmas)[:, None])[:, :rows]
        weights = nn.functional.pad(weights, (0, rows - weights.shape[1]))
        self.older: nn.Parameter = nn.Parameter(weights[:, 1:].tril(-1).clone())
        self.shift: nn.Parameter = nn.Parameter(torch.zeros(rows, dtype=torch.float64))

    def _scale(self, sigmas: Tensor) -> Tensor:
        """How far one unit of weight moves the state."""
        return 1 - sigmas[1:] / sigmas[:-1] if self.base.prediction == "data" else sigmas.diff()

    def plan(self) -> Plan:
        """The plan, with a graph to the parameters."""
        base = self.base
        falls = self.span * self.logits.softmax(0).cumsum(0)
        inner = base.sigmas[0] * torch.exp(-falls[: base.nfe - 1])
        sigmas = torch.cat([base.sigmas[:1], inner, base.sigmas[-1:]])
        # none at which the network was not trained
        low, high = min(self.smallest, float(base.sigma[-1])), float(base.sigmas[0])
        sigma = (sigmas[:-1] * self.shift.exp()).clamp(low, high)
        older = self.older.tril(-1)
        weights = torch.cat([1 - older.sum(1, keepdim=True), older], 1)
        scale = sigmas[1:] / sigmas[:-1] if base.prediction == "data" else torch.ones_like(sigma)
        return replace(
            base, sigmas=sigmas, sigma=sigma, update_x=scale,
            update_eval=weights * self._scale(sigmas)[:, None], stage_eval=torch.zeros_like(weights),
        )  # fmt: skip


def refine_plan(
    work: Work, base: Plan, start: Candidate, teacher: Teacher, learn_grid: bool, options: TrainingOptions, *,
    seed: int, progress: bool,
) -> Candidate:  # fmt: skip
    """The greedy fit, or a plan refined from it where that one is better on the held-out noise.

    Gradients go through all rows, so a minibatch takes the memory of `nfe` evaluations with their graphs.
    """
    kept = work.kept
    smallest = work.model.schedule.sigma_min
    table: Any = GridTable(start.plan, smallest) if learn_grid else KappaTable(base, start.kappa)
    ends = _ends(work, teacher)
    table.plan()  # what it refuses before the first step is not divergence

    def loss(batch: Minibatch) -> Tensor:
        index = kept[batch.index]
        try:
            plan = table.plan()
        except InputError as error:
            message = f"The refinement diverged at iteration {batch.iteration}. Lower the learning_rate of training."
            raise NonFiniteError(message, step=batch.iteration, paths=0) from error
        denoiser, state = work.model.at(index).denoiser, State(work.start(index))
        work.spent[0] += len(index) * plan.nfe
        # not `run` and `evaluator_of`, whose levels are numbers without a graph
        for row, sigma in zip(_moved(plan.rows, state.x.device), plan.sigma.to(state.x).unbind()):
            x = stage(row, state)
            D = check_answer("denoiser", denoiser(x, sigma), x).clone()
            state = update(row, state, evaluation_of(plan.prediction, x, sigma, D))
        return (state.x - ends[batch.index.to(ends.device)]).square().mean()

    options = DEFAULTS.updated("training", options)
    options = replace(options, batch_size=min(options.batch_size or 1, len(kept)))
    fit(table, loss, len(kept), options, seed=seed, progress=progress)
    with torch.no_grad():
        refined = table.plan()
    after = teacher_rmse(work, refined, work.held, teacher)
    if not after < start.student_rmse:
        how = f"greedy: the refined table ended {after:.3g} from the teacher, this one {start.student_rmse:.3g}"
        return replace(start, how=how)
    kappa = torch.full_like(start.kappa, float("nan")) if learn_grid else table.kappa.detach()
    how = "grid and weights" if learn_grid else "global"
    return replace(start, plan=refined, kappa=kappa, student_rmse=after, how=how)


def _moved(rows: tuple[Row, ...], device: torch.device) -> Any:
    """The rows with the weights that have a graph on the device: one copy there, and one of the gradients back."""
    leaves, structure = tree_flatten(rows)
    places = [k for k, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
    for k, weight in zip(places, torch.stack([leaves[k] for k in places]).to(device).unbind()):
        leaves[k] = weight
    return tree_unflatten(leaves, structure)


@torch.no_grad()
def _ends(work: Work, teacher: Teacher) -> Tensor:
    """The teacher's final states of all fitted start states, gathered from all processes."""
    kept = work.kept
    ends = torch.zeros((len(kept), *work.x.shape[1:]), dtype=work.x.dtype, device=work.x.device)
    for index in work.share(kept):
        ends[torch.searchsorted(kept, index).to(ends.device)] = work.ends(teacher.plan, index)
    return sum_over_processes(ends)
