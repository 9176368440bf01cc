"""SOSRA, the stability-optimised stochastic Runge-Kutta method for additive noise."""

from __future__ import annotations

from ..solver import Card
from .additive import AdditiveRungeKutta, Tableau

A21, A31, A32 = 0.6923962376159507, -3.1609142252828395, 4.1609142252828395
B21, B31, B32 = 1.3371632704399763, 1.442371048468624, 1.8632741501139225
ALPHA = (0.2889874966892885, 0.6859880440839937, 0.025024459226717772)


class SOSRA(AdditiveRungeKutta):
    """Three drift evaluations a step, strong order 1.5 for additive noise, a wide region of stability.

    Needs W and H. For problems that are not stiff `ShARK` has as small an error for two evaluations.
    Its stages take g at the start of the step and its integral of g(t) dW is that of the line through
    both ends, where the original mixes three values of g with weights near 17 that cancel: the same
    order, no loss of digits.
    """

    card: Card = Card(
        summary="three-stage stochastic Runge-Kutta for additive noise, optimised for stability",
        reference="Rackauckas & Nie 2020 (arXiv 1804.04344), Eqs. of SOSRA; coefficients of SciML",
        levy="H",
        sde_types=("ito", "stratonovich"),
        strong_order={"additive": 1.5},
        weak_order={"additive": 2.0},
        deterministic_order=2.0,
        evaluations=3,
    )
    # B multiplies I_(1,0)/h = W/2 + H
    tableau: Tableau = Tableau(
        c=(0.0, A21, 1.0), a=((), (A21,), (A31, A32)), b=ALPHA,
        w=(0.0, B21 / 2, (B31 + B32) / 2), e=(0.0, B21, B31 + B32),
    )  # fmt: skip
