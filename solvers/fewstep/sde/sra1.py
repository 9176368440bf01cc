from ..solver import Card
from .additive import FACTS, AdditiveRungeKutta, Tableau


class SRA1(AdditiveRungeKutta):
    r"""Rößler's stochastic Runge-Kutta method SRA1 for additive noise, torchsde's additive `srk`.

    .. math:: y_{n+1} = y_n + \tfrac13 h \big(f(y_n) + 2 f(z)\big) + g W, \quad
              z = y_n + \tfrac34 h f(y_n) + g \big(\tfrac34 W + \tfrac32 H\big)

    - Strong order: 1.5 for additive noise.
    - Cost per step: 2 drift evaluations. Lévy data: W, H. Calculus: both.
    - `ShARK` has the same cost and order and usually the smaller error.
    - Source: Rößler 2010 (SIAM J. Numer. Anal. 48), Table 6.3 (SRA1).
    """

    card: Card = Card(
        summary="two-stage stochastic Runge-Kutta for additive noise",
        reference="Rößler 2010 (SIAM J. Numer. Anal. 48), Table 6.3 (SRA1); torchsde's additive 'srk'",
        evaluations=2,
        **FACTS,
    )
    tableau: Tableau = Tableau(
        c=(0.0, 3 / 4), a=((), (3 / 4,)), b=(1 / 3, 2 / 3), w=(0.0, 3 / 4), e=(0.0, 3 / 2)
    )  # fmt: skip
