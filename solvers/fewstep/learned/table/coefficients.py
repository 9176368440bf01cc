"""A plan with its recursion unrolled: what each evaluation's input is made of.

Row i < R is the input of evaluation i, row R the final state. With x_0 the first state, D_j the evaluations and xi_k
the unit normals,

    z_i = A_i x_0 + sum_{j<i} B_ij D_j + sum_k M_ik xi_k,    D_i = denoiser(z_i, level_i).

Columns are kept together as weights (R + 1, 1 + R + normals), so a row is a combination of one list of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...executor import evaluation_of, run
from ...plan import Plan

NO_NOISE = (float("nan"), float("nan"))


@dataclass(frozen=True)
class Coefficients:
    """Weights (R + 1, 1 + R + normals) and the logarithms of the levels that the network is given (R,); CPU float64.

    Normals are ordered by interval, then by letter.
    """

    weights: Tensor
    levels: Tensor

    @property
    def rows(self) -> int:
        """Evaluations R."""
        return len(self.levels)

    @property
    def flat(self) -> Tensor:
        """All numbers in one vector: the weights row by row, then the levels."""
        return torch.cat([self.weights.flatten(), self.levels])

    def like(self, flat: Tensor) -> Coefficients:
        """Coefficients of this shape from such a vector."""
        return replace(self, weights=flat[: -self.rows].reshape(self.weights.shape), levels=flat[-self.rows :])

    @classmethod
    def of(cls, plan: Plan, normals: int = 0) -> Coefficients:
        """Those of a plan, by running it on symbols; `normals` is the number of columns for its intervals' normals."""
        rows, letters = plan.nfe, plan.stage_noise.shape[-1]
        symbols, inputs, opened = torch.eye(1 + rows + normals, dtype=torch.float64), list[Tensor](), iter(range(rows))

        def evaluate(i: int, x: Tensor, _: Any) -> Tensor:
            inputs.append(x)
            return evaluation_of(plan.prediction, x, float(plan.sigma[i]), symbols[1 + i].clone())

        def draw(tau0: float, tau1: float) -> tuple[Tensor, ...]:
            first = 1 + rows + next(opened) * letters
            return tuple(symbols[first : first + letters])

        inputs.append(run(plan, symbols[0], evaluate, draw))
        return cls(torch.stack(inputs), plan.sigma.log())

    def plan(self, name: str, sigmas: Tensor, noise: Tensor | None = None, letters: int = 1) -> Plan:
        """The plan whose state after a row is the next input; `noise` (R, 2) are the intervals of the rows."""
        rows = self.rows
        noise = torch.tensor([NO_NOISE] * rows, dtype=torch.float64) if noise is None else noise
        scale, past = self.weights[:, 0], self.weights[:, 1 : 1 + rows]
        random = self.weights[:, 1 + rows :].reshape(rows + 1, -1, letters)
        slots = max(1, random.shape[1])
        ratio = scale[1:] / scale[:-1]
        update, stage = torch.zeros(rows, rows), torch.zeros(rows, rows)
        update, stage = update.double(), stage.double()
        changed = past[1:] - ratio[:, None] * past[:-1]
        update_noise, stage_noise = (torch.zeros(rows, slots, letters, dtype=torch.float64) for _ in range(2))
        for i in range(rows):
            update[i, : i + 1] = changed[i, : i + 1].flip(0)
        return Plan(name, "data", sigmas, self.levels.exp(), torch.ones_like(ratio), stage, stage_noise, ratio, update,
                    update_noise, noise)  # fmt: skip
