"""What a fit is given: pairs of starts and ends, untrained samplers to start from, and how a table becomes a plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...plan import Plan
from .coefficients import Coefficients
from .objective import Pairs
from .starts import Start


@dataclass(frozen=True)
class Setting:
    """Pairs, starts and a teacher.

    Attributes:
        teacher: its name.
        teacher_rmse: distance of a deterministic teacher to itself with half as many steps.
        sigmas: the grid of a stochastic table; None for a deterministic one, whose grid follows from its weights.
        teacher_evaluations: of each pair, where they are not in the pairs' tally.
    """

    pairs: Pairs
    pool: list[Start]
    teacher: str
    teacher_rmse: float = 0.0
    sigmas: Tensor | None = None
    teacher_evaluations: int = 0

    def plan(self, table: Coefficients, base: Plan) -> Plan:
        """The plan of a table that was fitted instead of a base."""
        if self.sigmas is None:
            return table.plan("table", _grid(table, base))
        return table.plan("table", self.sigmas, intervals(self.sigmas))


def intervals(sigmas: Tensor) -> Tensor:
    """(steps, 2) the intervals of tau = 1/sigma^2 between the levels."""
    tau = sigmas**-2.0
    return torch.stack([tau[:-1], tau[1:]], 1)


def _grid(c: Coefficients, base: Plan) -> Tensor:
    """Nominal levels of the inputs, decreasing: the noise that is left of the first state."""
    first = float(base.sigmas[0])
    levels, above = [first], first
    for scale in c.weights[1:-1, 0].tolist():
        above = min(max(scale * first, 1e-3 * above), above * (1 - 1e-6))
        levels.append(above)
    return torch.tensor([*levels, 0.0], dtype=torch.float64)
