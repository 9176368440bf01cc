"""ShARK, the shifted additive-noise Runge-Kutta method."""

from __future__ import annotations

from ..solver import Card
from .additive import AdditiveRungeKutta, Tableau


class ShARK(AdditiveRungeKutta):
    """Two drift evaluations a step, strong order 1.5 for additive noise.

    Needs W and the space-time Lévy area H. The cheaper neighbour is `EulerMaruyama` (order 1.0 here, one
    evaluation, W alone). As a sampler it runs in the clock tau = 1/sigma^2 and stays much nearer to its
    path than the one-evaluation samplers; its marginals are not automatically better.
    """

    card: Card = Card(
        summary="two-stage Runge-Kutta for additive noise, its start shifted by H",
        reference="Foster, dos Reis & Strange 2024 (arXiv 2210.17543), Eq. (6.1)",
        levy="H",
        sde_types=("ito", "stratonovich"),
        strong_order={"additive": 1.5},
        weak_order={"additive": 2.0},
        deterministic_order=2.0,
        evaluations=2,
    )
    tableau: Tableau = Tableau(c=(0.0, 5 / 6), a=((), (5 / 6,)), b=(0.4, 0.6), w=(0.0, 5 / 6), e=(1.0, 1.0))
