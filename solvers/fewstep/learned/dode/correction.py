"""Plans whose newest evaluation d_i is replaced by d_i + sum_j kappa_ij (d_i - d_{i-j})."""

from dataclasses import replace

import torch
from torch import Tensor

from ...plan import Plan


def in_state(plan: Plan, i: int) -> bool:
    """Whether the outcome of row i is the state itself, not a stage that is formed from it."""
    return i + 1 == plan.nfe or (float(plan.stage_x[i + 1]) == 1 and not bool(plan.stage_eval[i + 1].any()))


def is_plain(plan: Plan) -> bool:
    """Whether a plan has one evaluation per step, made at the state."""
    return plan.nfe == len(plan.sigmas) - 1 and all(in_state(plan, i) for i in range(-1, plan.nfe))


def outcome_weights(plan: Plan) -> Tensor:
    """(rows,) weight of the newest evaluation in each row's outcome, the next input or the final state."""
    update, stage = plan.update_eval[:, 0], plan.stage_eval[:, 0].roll(-1)
    return torch.where(torch.tensor([in_state(plan, i) for i in range(plan.nfe)]), update, stage)


def corrected(plan: Plan, kappa: Tensor) -> Plan:
    """The plan with kappa (rows, terms) written into its weights.

    Terms that look back beyond the first evaluation are ignored.
    """
    terms = kappa.shape[1]
    window = max(terms + 1, plan.update_eval.shape[1])
    kappa = kappa.tril(-1)
    change = outcome_weights(plan)[:, None] * torch.cat([kappa.sum(1, keepdim=True), -kappa], 1)
    change = torch.nn.functional.pad(change, (0, window - 1 - terms))
    grow = (0, window - plan.update_eval.shape[1])
    update, stage = (torch.nn.functional.pad(c, grow) for c in (plan.update_eval, plan.stage_eval))
    state = torch.tensor([[in_state(plan, i)] for i in range(plan.nfe)])
    update = update + change * state
    if not bool(state.all()):
        stage = stage + (change * ~state).roll(1, 0)
    return replace(plan, update_eval=update, stage_eval=stage, fit=None)
