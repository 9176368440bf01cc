from ..problem import SDE_TYPES
from ..solver import Card
from .runge_kutta import ButcherTableau, RungeKutta


class Bosh3(RungeKutta):
    r"""The Runge-Kutta pair of Bogacki and Shampine of orders 3 and 2, for ODEs.

    .. math:: y_{n+1} = y_n + \tfrac19 h (2 k_1 + 3 k_2 + 4 k_3), \quad
              e = h \big(-\tfrac{5}{72} k_1 + \tfrac{1}{12} k_2 + \tfrac19 k_3 - \tfrac18 k_4\big)

    at times t, t + h/2, t + 3h/4 and t + h.

    - Order: 3, with an estimate of the error of order 3 in h.
    - Cost per step: 3 drift evaluations; the last one is the first of the next step. ODEs only.
    - For rough tolerances (rtol above 1e-3); `Tsit5` for finer ones.
    - Source: Bogacki & Shampine 1989 (Appl. Math. Lett. 2), Table 1.
    """

    card: Card = Card(
        summary="Bogacki-Shampine pair of orders 3 and 2 for ODEs",
        reference="Bogacki & Shampine 1989 (Appl. Math. Lett. 2), Table 1",
        deterministic_order=3.0,
        evaluations=3,
        sde_types=SDE_TYPES,
    )
    error_order: float = 3.0
    tableau: ButcherTableau = ButcherTableau(
        c=(1 / 2, 3 / 4, 1.0), a=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)), e=(-5 / 72, 1 / 12, 1 / 9, -1 / 8)
    )
