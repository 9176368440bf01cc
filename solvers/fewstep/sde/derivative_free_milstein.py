"""Milstein's method with a difference in place of the derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .iterated import channel, iterated, pairs
from .milstein import ORDERS


class DerivativeFreeMilstein(StochasticSolver):
    """Milstein's correction from g at a supporting point y + f h + g sqrt(h); Stratonovich's at y + g W.

    Strong order 1.0 where noise commutes; one drift and two diffusion evaluations a step (commutative
    noise: one more for each channel), no derivative: for diffusions that autograd cannot see through.
    `Milstein` has the smaller error constant.
    """

    card: Card = Card(
        summary="Milstein with a finite difference along the noise",
        reference="Kloeden & Platen 1992, Eqs. (11.1.3), (11.1.7); Stratonovich's after (4.9.15)",
        levy="W",
        sde_types=("ito", "stratonovich"),
        strong_order=ORDERS,
        weak_order=ORDERS,
        deterministic_order=1.0,
        evaluations=1,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        root = increment.h**0.5
        g = sde.diffusion(t0, y)
        drifted = torch.add(y, sde.drift(t0, y), alpha=increment.h)
        noise = diffuse(g, increment.W)
        new = drifted + noise
        if sde.noise_type == "additive":
            return Step(new)
        if sde.sde_type == "stratonovich":
            # a support sqrt(h) away has an error of h^1.5 whose mean is not nought, for W^2 has none that
            # cancels it: order 0.5. The support at W has an odd error
            return Step(new + 0.5 * diffuse(sde.diffusion(t0, y + noise) - g, increment.W))
        if sde.noise_type == "commutative":
            weights = pairs(increment, sde) / root
            for i in range(g.shape[-1]):
                ahead = sde.diffusion(t0, torch.add(drifted, g[..., i], alpha=root))
                new = new + diffuse(ahead - g, weights[..., i, :])
            return Step(new)
        vector = channel(g, sde)
        support = torch.add(drifted, vector, alpha=root)
        slope = (channel(sde.diffusion(t0, support), sde) - vector) / root
        return Step(new.add_(slope * iterated(increment, sde)))
