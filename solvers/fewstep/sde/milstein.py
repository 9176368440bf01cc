from typing import Any

import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import CONSTANT, SDE, added, diffuse, plus
from ..solver import Card, Step, StochasticSolver
from .iterated import along_channels, iterated, pairs

ORDERS = {"diagonal": 1.0, "scalar": 1.0, "commutative": 1.0, "additive": 1.0}
FACTS: dict[str, Any] = {
    "levy": "W", "sde_types": ("ito", "stratonovich"), "strong_order": ORDERS, "weak_order": ORDERS,
    "deterministic_order": 1.0,
}  # fmt: skip


class Milstein(StochasticSolver):
    r"""The Milstein step, with derivatives by automatic differentiation.

    .. math:: y_{n+1} = y_n + h f + g W + \tfrac12 g' g (W^2 - h),

    without the last h in Stratonovich's calculus.

    - Strong order: 1.0 for diagonal, scalar, commutative and additive noise.
    - Cost per step: 1 drift and 1 diffusion evaluation with its forward-mode derivative (scalar noise:
      2 diffusion evaluations; commutative noise: 1 + m). Lévy data: W. Calculus: both.
    - `DerivativeFreeMilstein` needs no derivative, `GeneralMilstein` solves general noise given the area.
      For additive noise `EulerMaruyama` is the same step at lower cost.
    - Source: Kloeden & Platen 1992, Eqs. (10.3.1), (10.3.16).
    """

    card: Card = Card(
        summary="Euler-Maruyama with the iterated integral of the noise, derivative by autograd",
        reference="Kloeden & Platen 1992, Eqs. (10.3.1), (10.3.16)",
        **FACTS,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        if sde.noise_type == "diagonal":
            # the Jacobian is diagonal: one derivative along ones gives g and all of its derivatives
            both = torch.func.jvp(lambda x: sde.diffusion(t0, x), (y,), (torch.ones_like(y),))
            noise = both[0] * torch.addcmul(increment.W, both[1], iterated(increment, sde))
            return Step(added(plus(y, increment.h, sde.drift(t0, y)), noise))
        g = sde.diffusion(t0, y)
        new = plus(y, increment.h, sde.drift(t0, y)) + diffuse(g, increment.W)
        if sde.noise_type in CONSTANT:
            return Step(new)
        return Step(new + along_channels(sde, t0, y, g @ pairs(increment, sde)))
