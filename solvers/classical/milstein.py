"""The Milstein method, by automatic differentiation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, StochasticSolver
from .iterated import along_channels, channel, iterated, pairs

ORDERS = {"diagonal": 1.0, "scalar": 1.0, "commutative": 1.0, "additive": 1.0}


class Milstein(StochasticSolver):
    """y' = y + f h + g W + g'g (W^2 - h)/2, without the h in Stratonovich's calculus.

    Strong order 1.0 where noise commutes; one drift evaluation, two of the diffusion and one forward-mode
    derivative a step (commutative noise: one for each channel). `DerivativeFreeMilstein` asks for no
    derivative, `GeneralMilstein` solves general noise given the area; where noise is additive the
    correction is nought and `EulerMaruyama` is the same at less cost.
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

    def step(
        self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any
    ) -> tuple[Tensor, Any]:
        g = sde.diffusion(t0, y)
        new = torch.add(y, sde.drift(t0, y), alpha=increment.h)
        new = new + diffuse(g, increment.W)
        if sde.noise_type == "additive":
            return new, carry
        if sde.noise_type == "commutative":
            return new + along_channels(sde, t0, y, g @ pairs(increment, sde)), carry
        # D g [g m] with m the iterated integral: one directional derivative for diagonal noise (whose
        # Jacobian is diagonal) and for one channel alike
        direction = channel(g, sde) * iterated(increment, sde)
        slope = torch.func.jvp(lambda x: channel(sde.diffusion(t0, x), sde), (y,), (direction,))[1]
        return new.add_(slope), carry
