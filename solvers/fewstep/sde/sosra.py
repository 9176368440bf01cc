from ..solver import Card
from .additive import FACTS, AdditiveRungeKutta, Tableau

A21, A31, A32 = 0.6923962376159507, -3.1609142252828395, 4.1609142252828395
B21, B31, B32 = 1.3371632704399763, 1.442371048468624, 1.8632741501139225
ALPHA = (0.2889874966892885, 0.6859880440839937, 0.025024459226717772)


class SOSRA(AdditiveRungeKutta):
    r"""The stability-optimised stochastic Runge-Kutta method for additive noise.

    .. math:: y_{n+1} = y_n + h (b_1 f_1 + b_2 f_2 + b_3 f_3) + g W, \quad
              z_i = y_n + h \sum_j a_{ij} f_j + g B_i (\tfrac12 W + H)

    - Strong order: 1.5 for additive noise, with a large region of stability.
    - Cost per step: 3 drift evaluations. Lévy data: W, H. Calculus: both.
    - For problems that are not stiff `ShARK` has as small an error for 2 evaluations. If g depends on time,
      its integral is that of the line through both ends, where the original combines three values of g with
      weights near 17 that cancel: the same order, no loss of digits.
    - Source: Rackauckas & Nie 2020 (arXiv 1804.04344), Eqs. of SOSRA; coefficients of SciML.
    """

    card: Card = Card(
        summary="three-stage stochastic Runge-Kutta for additive noise, optimised for stability",
        reference="Rackauckas & Nie 2020 (arXiv 1804.04344), Eqs. of SOSRA; coefficients of SciML",
        evaluations=3,
        **FACTS,
    )
    tableau: Tableau = Tableau(
        c=(0.0, A21, 1.0), a=((), (A21,), (A31, A32)), b=ALPHA,
        w=(0.0, B21 / 2, (B31 + B32) / 2), e=(0.0, B21, B31 + B32),
    )  # fmt: skip
