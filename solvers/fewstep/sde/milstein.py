"""The Milstein method, by automatic differentiation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .iterated import along_channels, iterated, pairs

ORDERS = {"diagonal": 1.0, "scalar": 1.0, "commutative": 1.0, "additive": 1.0}


class Milstein(StochasticSolver):
    """y' = y + f h + g W + g'g (W^2 - h)/2, without the h in Stratonovich's calculus.

    Strong order 1.0 where noise commutes; one drift evaluation and one of the diffusion with its
    forward-mode derivative a step (scalar noise: two; commutative: one for each channel and one).
    `DerivativeFreeMilstein` asks for no derivative, `GeneralMilstein` solves general noise given the
    area; where noise is additive the correction is nought and `EulerMaruyama` is the same at less cost.
    """

    card: Card = Card(
        summary="Euler-Maruyama with the iterated integral of the noise, derivative by autograd",
        reference="Kloeden & Platen 1992, Eqs. (10.3.1), (10.3.16)",
        levy="W",
        sde_types=("ito", "stratonovich"),
        strong_order=ORDERS,
        weak_order=ORDERS,
        deterministic_order=1.0,
        evaluations=1,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        if sde.noise_type == "diagonal":
            # its Jacobian is diagonal: one sweep along ones gives g and all of its derivatives
            both = torch.func.jvp(lambda x: sde.diffusion(t0, x), (y,), (torch.ones_like(y),))
            noise = both[0] * torch.addcmul(increment.W, both[1], iterated(increment, sde))
            return Step(torch.add(y, sde.drift(t0, y), alpha=increment.h).add_(noise))
        g = sde.diffusion(t0, y)
        new = torch.add(y, sde.drift(t0, y), alpha=increment.h) + diffuse(g, increment.W)
        if sde.noise_type == "additive":
            return Step(new)
        if sde.noise_type == "commutative":
            return Step(new + along_channels(sde, t0, y, g @ pairs(increment, sde)))
        # one channel: D g [g m] with m the iterated integral is one directional derivative
        direction = g.squeeze(-1) * iterated(increment, sde)
        slope = torch.func.jvp(lambda x: sde.diffusion(t0, x).squeeze(-1), (y,), (direction,))[1]
        return Step(new.add_(slope))
