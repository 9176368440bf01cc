"""SRA1, Rößler's stochastic Runge-Kutta method for additive noise."""

from __future__ import annotations

from ..solver import Card
from .additive import AdditiveRungeKutta, Tableau


class SRA1(AdditiveRungeKutta):
    """Two drift evaluations a step, strong order 1.5 for additive noise.

    Needs W and the space-time Lévy area H. `ShARK` has the same price and order and mostly the smaller
    error. Where g varies in time its integral is that of the line through both ends, as Rößler's.
    """

    card: Card = Card(
        summary="two-stage stochastic Runge-Kutta for additive noise",
        reference="Rößler 2010 (SIAM J. Numer. Anal. 48), Table 6.3 (SRA1); torchsde's additive 'srk'",
        levy="H",
        sde_types=("ito", "stratonovich"),
        strong_order={"additive": 1.5},
        weak_order={"additive": 2.0},
        deterministic_order=2.0,
        evaluations=2,
    )
    # the stage's (3/2) g I_(1,0)/h is (3/4) W + (3/2) H
    tableau: Tableau = Tableau(
        c=(0.0, 3 / 4), a=((), (3 / 4,)), b=(1 / 3, 2 / 3), w=(0.0, 3 / 4), e=(0.0, 3 / 2)
    )  # fmt: skip
