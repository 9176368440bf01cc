"""Milstein's method with a difference in place of the derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, StochasticSolver
from .milstein import ORDERS, channel, iterated


class DerivativeFreeMilstein(StochasticSolver):
    """Milstein's correction from g at a supporting point y + f h + g sqrt(h).

    Strong order 1.0 for diagonal, scalar and additive noise; one drift and two diffusion evaluations a
    step, no derivative: for diffusions that autograd cannot see through. `Milstein` has the smaller
    error constant.
    """

    card = Card(
        summary="Milstein with a finite difference along the noise",
        reference="Kloeden & Platen 1992, Eqs. (11.1.3), (11.1.7)",
        levy="W",
        sde_types=("ito", "stratonovich"),
        strong_order=ORDERS,
        weak_order=ORDERS,
        deterministic_order=1.0,
        evaluations=1,
    )

    def step(
        self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any
    ) -> tuple[Tensor, Any]:
        root = increment.h**0.5
        g = sde.diffusion(t0, y)
        drifted = torch.add(y, sde.drift(t0, y), alpha=increment.h)
        new = drifted + diffuse(g, increment.W)
        if sde.noise_type == "additive":
            return new, carry
        vector = channel(g, sde)
        # Ito's support point carries the drift; Stratonovich's must not (Kloeden & Platen, Section 11.1)
        support = torch.add(drifted if sde.sde_type == "ito" else y, vector, alpha=root)
        slope = (channel(sde.diffusion(t0, support), sde) - vector) / root
        return new.add_(slope * iterated(increment, sde)), carry
