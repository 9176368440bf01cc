"""SEA, the shifted Euler method for additive noise."""

from __future__ import annotations

from ..solver import Card
from .additive import AdditiveRungeKutta, Tableau


class SEA(AdditiveRungeKutta):
    """y' = y + f(y + g (W/2 + H)) h + g W: one drift evaluation at the mean of the path.

    Strong order 1.0 for additive noise as `EulerMaruyama`, with a third of its error for the price of
    H. `ShARK` has order 1.5 for two evaluations. As a sampler it asks the denoiser at the start of the
    step in tau, where its state without drift belongs: halfway (c = 1/2) has 2.4 to 10 times the error,
    measured at 8 to 128 steps.
    """

    card: Card = Card(
        summary="Euler step that looks at the time average of the noise",
        reference="Foster, dos Reis & Strange 2024 (arXiv 2210.17543), Eq. (5.8)",
        levy="H",
        sde_types=("ito", "stratonovich"),
        strong_order={"additive": 1.0},
        weak_order={"additive": 1.0},
        deterministic_order=1.0,
        evaluations=1,
    )
    tableau: Tableau = Tableau(c=(0.0,), a=((),), b=(1.0,), w=(0.5,), e=(1.0,))
