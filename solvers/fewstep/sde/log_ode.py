"""The log-ODE method of order 1, for noise that does not commute."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..problem import SDE
from ..solver import Card, Step, StochasticSolver
from .iterated import along_channels


class LogODE(StochasticSolver):
    """One midpoint step of dz/du = f h + sum_i g_i W_i + sum_{i<j} [g_i, g_j] A_ij over u in [0, 1].

    Strong order 1.0 for general noise on a path that knows its own space-space Lévy area A
    (`fewstep.AreaPath`); with an area of the right law that is not the path's the strong order is 0.5,
    as `EulerMaruyama` has for a third of the price. Two drift evaluations, three of the diffusion and a
    forward-mode derivative for each channel a step. Itô equations are taken with their drift corrected.
    """

    card: Card = Card(
        summary="the flow of the truncated log-signature, by the explicit midpoint rule",
        reference="Castell & Gaines 1996, Eq. (4); brackets as in arXiv 1902.09425",
        levy="A",
        sde_types=("ito", "stratonovich"),
        strong_order={"general": 1.0},
        weak_order={"general": 1.0},
        deterministic_order=2.0,
        evaluations=2,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        h, W, A = increment.h, increment.W.unsqueeze(-1), increment.A
        assert A is not None
        g = sde.diffusion(t0, y)
        # sum_{i<j} [g_i, g_j] A_ij = sum_j D g_j (sum_i g_i A_ij), for A is antisymmetric; Ito's
        # correction of the drift, -h/2 sum_j D g_j g_j, is of the same form
        directions = g @ A - (0.5 * h * g if sde.sde_type == "ito" else 0.0)
        bracket = along_channels(sde, t0, y, directions)
        half = y + 0.5 * (sde.drift(t0, y) * h + (g @ W).squeeze(-1))
        middle = t0 + 0.5 * h
        flow = sde.drift(middle, half) * h + (sde.diffusion(middle, half) @ W).squeeze(-1)
        return Step(y + flow + bracket)
