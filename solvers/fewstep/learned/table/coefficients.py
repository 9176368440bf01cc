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
LARGEST_RATIO = 10.0  # of the weights of the first state in two rows; beyond it the recursion loses digits


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
    def of(cls, plan: Plan, letters: int = 0) -> Coefficients:
        """Those of a plan, by running it on symbols, with columns for so many normals of each row's interval."""
        rows = plan.nfe
        symbols, inputs = torch.eye(1 + rows * (1 + letters), dtype=torch.float64), list[Tensor]()
        opened = iter(range(1 + rows, len(symbols), max(letters, 1)))

        def evaluate(i: int, x: Tensor, _: Any) -> Tensor:
            inputs.append(x)
            return evaluation_of(plan.prediction, x, float(plan.sigma[i]), symbols[1 + i].clone())

        def draw(tau0: float, tau1: float) -> tuple[Tensor, ...]:
            first = next(opened)
            return tuple(symbols[first : first + plan.letters])

        inputs.append(run(plan, symbols[0], evaluate, draw))
        return cls(torch.stack(inputs), plan.sigma.log())

    def plan(self, name: str, sigmas: Tensor, intervals: Tensor | None = None) -> Plan:
        """The plan on a grid; `intervals` (R, 2) are those whose normals the rows read.

        Its state is the input of the next row, or the first state where that recursion would cancel.
        """
        rows, scale, past = self.rows, self.weights[:, 0], self.weights[:, 1 : 1 + self.rows]
        ratio = scale[1:] / scale[:-1]
        columns: dict[str, Any] = {
            k: torch.zeros(rows, rows, dtype=torch.float64) for k in ("stage_eval", "update_eval")
        }
        letters = (self.weights.shape[1] - 1 - rows) // rows
        slots = torch.zeros(rows, rows, letters, dtype=torch.float64) if letters else torch.zeros(rows, 1, 1).double()
        columns |= {"stage_noise": slots, "update_noise": slots.clone()}
        if intervals is None and bool((ratio.abs() <= LARGEST_RATIO).all()):
            stage_x, update_x, changed = torch.ones_like(ratio), ratio, past[1:] - ratio[:, None] * past[:-1]
            for i in range(rows):
                columns["update_eval"][i, : i + 1] = changed[i, : i + 1].flip(0)
        else:
            stage_x, update_x = scale[:-1], torch.ones_like(ratio)
            update_x[-1] = scale[-1]
            random = self.weights[:, 1 + rows :].reshape(rows + 1, -1, max(letters, 1))
            for i in range(rows):  # newest first
                columns["stage_eval"][i, :i] = past[i, :i].flip(0)
                if letters:
                    columns["stage_noise"][i, : i + 1] = random[i, : i + 1].flip(0)
            columns["update_eval"][-1] = past[-1].flip(0)
            if letters:
                columns["update_noise"][-1] = random[-1].flip(0)
        noise = torch.tensor([NO_NOISE] * rows, dtype=torch.float64) if intervals is None else intervals
        return Plan(name, "data", sigmas, self.levels.exp(), stage_x=stage_x, update_x=update_x, noise=noise, **columns)
