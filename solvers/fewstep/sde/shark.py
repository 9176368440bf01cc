from ..solver import Card
from .additive import FACTS, AdditiveRungeKutta, Tableau


class ShARK(AdditiveRungeKutta):
    r"""The shifted additive-noise Runge-Kutta method.

    .. math:: y_{n+1} = y_n + h \big(\tfrac25 f(z_1) + \tfrac35 f(z_2)\big) + g W, \quad
              z_1 = y_n + g H, \quad z_2 = z_1 + \tfrac56 \big(h f(z_1) + g W\big)

    - Strong order: 1.5 for additive noise.
    - Cost per step: 2 drift evaluations. Lévy data: W, H. Calculus: both.
    - The default for additive noise; `EulerMaruyama` has order 1.0 for half the cost. As a sampler in the
      clock tau = 1/sigma^2 it is much closer to its path than samplers with one evaluation; its marginals
      are not necessarily better.
    - Source: Foster, dos Reis & Strange 2024 (arXiv 2210.17543), Eq. (6.1).
    """

    card: Card = Card(
        summary="two-stage Runge-Kutta for additive noise, its start shifted by H",
        reference="Foster, dos Reis & Strange 2024 (arXiv 2210.17543), Eq. (6.1)",
        evaluations=2,
        **FACTS,
    )
    tableau: Tableau = Tableau(c=(0.0, 5 / 6), a=((), (5 / 6,)), b=(0.4, 0.6), w=(0.0, 5 / 6), e=(1.0, 1.0))
