"""The Milstein method for noise that does not commute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .iterated import along_channels, pairs


class GeneralMilstein(StochasticSolver):
    """y' = y + f h + g W + sum_ij D g_j g_i I_ij, with I_ij = W_i W_j / 2 + A_ij, less h/2 on Itô's diagonal.

    Strong order 1.0 for general noise on a path that knows its own space-space Lévy area A
    (`fewstep.AreaPath`). One drift and m + 1 diffusion evaluations, a forward-mode derivative for each
    of the m channels a step. `LogODE` is of the same order with a second-order drift.
    """

    card: Card = Card(
        summary="Milstein with the iterated integrals of all pairs of channels",
        reference="Kloeden & Platen 1992, Eq. (10.3.3)",
        levy="A",
        sde_types=("ito", "stratonovich"),
        strong_order={"general": 1.0},
        weak_order={"general": 1.0},
        deterministic_order=1.0,
        evaluations=1,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        assert increment.A is not None
        g = sde.diffusion(t0, y)
        new = torch.add(y, sde.drift(t0, y), alpha=increment.h) + diffuse(g, increment.W)
        return Step(new + along_channels(sde, t0, y, g @ (pairs(increment, sde) + increment.A)))
