"""The explicit order 1.5 strong scheme of Kloeden and Platen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..problem import SDE
from ..solver import Card, Step, StochasticSolver


class KloedenPlaten15(StochasticSolver):
    """The strong Taylor scheme of order 1.5 with differences in place of derivatives.

    Scalar noise in Itô's calculus; three drift and five diffusion evaluations a step, W and H. `SRID2`
    has the same order with fewer evaluations of g, and solves diagonal noise too; `Taylor15` takes the
    derivatives themselves.
    """

    card: Card = Card(
        summary="derivative-free strong Taylor scheme of order 1.5",
        reference="Kloeden & Platen 1992, Eq. (11.2.1); time as a component of the state",
        levy="H",
        sde_types=("ito",),
        strong_order={"scalar": 1.5},
        weak_order={"scalar": 2.0},
        deterministic_order=2.0,
        evaluations=3,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        h, root, W, Z = increment.h, increment.h**0.5, increment.W, increment.U
        f = sde.drift(t0, y)

        def g(t: Tensor, x: Tensor) -> Tensor:
            return sde.diffusion(t, x).squeeze(-1)

        g0 = g(t0, y)
        up, down = y + h * f + root * g0, y + h * f - root * g0
        f_up, f_down, g_up, g_down = sde.drift(t1, up), sde.drift(t1, down), g(t1, up), g(t1, down)
        y = y + g0 * W + (f_up - f_down) * (Z / (2 * root)) + h / 4 * (f_up + 2 * f + f_down)
        y = y + (g_up - g_down) * ((W**2 - h) / (4 * root))
        y = y + (g_up - 2 * g0 + g_down) * ((W * h - Z) / (2 * h))
        curve = g(t1, up + root * g_up) - g(t1, up - root * g_up) - g_up + g_down
        return Step(y + curve * ((W**2 / 3 - h) * W / (4 * h)))
