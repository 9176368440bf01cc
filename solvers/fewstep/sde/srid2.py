"""SRID2, Rößler's stochastic Runge-Kutta method of order 1.5 for Itô's calculus."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver


class SRID2(StochasticSolver):
    """Three drift and four diffusion evaluations a step; torchsde's `srk`.

    Strong order 1.5 for diagonal and scalar (and additive) noise in Itô's calculus, from W and H. For
    additive noise `ShARK` has that order for two evaluations; `SlowRK` is its counterpart for
    Stratonovich's calculus. The weights of stages five and more are nought and left out.
    """

    card: Card = Card(
        summary="four-stage stochastic Runge-Kutta for diagonal noise",
        reference="Rößler 2010 (SIAM J. Numer. Anal. 48), Eqs. (6.6)-(6.7), Table 6.2 (SRI2)",
        levy="H",
        sde_types=("ito",),
        strong_order={"diagonal": 1.5, "scalar": 1.5, "additive": 1.5},
        weak_order={"diagonal": 1.5, "scalar": 1.5, "additive": 2.0},
        deterministic_order=3.0,
        evaluations=3,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        f, g, h, W = sde.drift, sde.diffusion, increment.h, increment.W
        root = h**0.5
        I10, I11, I111 = increment.U / h, (W**2 - h) / (2 * root), (W**3 - 3 * h * W) / (6 * h)
        quarter, middle = t0 + 0.25 * h, t0 + 0.5 * h
        # evaluations in one channel more than noise makes of them: g along sqrt(h) in place of W
        one = W.new_full((), root).expand_as(W)
        f1, g1 = f(t0, y), g(t0, y)
        n1 = diffuse(g1, one)
        f2 = f(t1, y + h * f1)
        g2 = g(quarter, y + 0.25 * h * f1 - 0.5 * n1)
        f3 = f(middle, y + 0.25 * h * (f1 + f2) + diffuse(g1 + 0.5 * g2, I10))
        n2 = diffuse(g2, one)
        g3 = g(t1, y + h * f1 + n1)
        g4 = g(quarter, y + 0.25 * h * f3 + 2 * n1 - n2 + 0.5 * diffuse(g3, one))
        y = y + h / 6 * (f1 + f2 + 4 * f3)
        y = y + diffuse(g1, -W + I11 + 2 * I10 - 2 * I111)
        y = y + diffuse(g2, 4 / 3 * (W - I11 - I10) + 5 / 3 * I111)
        return Step(y + diffuse(g3, (2 * W + I11 - 2 * I10 - 2 * I111) / 3) + diffuse(g4, I111))
