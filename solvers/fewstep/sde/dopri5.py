from ..problem import SDE_TYPES
from ..solver import Card
from .runge_kutta import ButcherTableau, RungeKutta


class Dopri5(RungeKutta):
    r"""The Runge-Kutta pair of Dormand and Prince of orders 5 and 4, for ODEs; MATLAB's ode45.

    .. math:: y_{n+1} = y_n + h \sum_{j=1}^6 a_{7j} k_j, \quad e = h \sum_{i=1}^7 e_i k_i

    with the stages k of the table in the source.

    - Order: 5, with an estimate of the error of order 5 in h.
    - Cost per step: 6 drift evaluations; the last one is the first of the next step. ODEs only.
    - `Tsit5` has the same cost and smaller errors; this one is for comparison with other libraries.
    - Source: Dormand & Prince 1980 (J. Comput. Appl. Math. 6), Table 2.
    """

    card: Card = Card(
        summary="Dormand-Prince pair of orders 5 and 4 for ODEs",
        reference="Dormand & Prince 1980 (J. Comput. Appl. Math. 6), Table 2",
        deterministic_order=5.0,
        evaluations=6,
        sde_types=SDE_TYPES,
    )
    error_order: float = 5.0
    tableau: ButcherTableau = ButcherTableau(
        c=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        a=(
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        e=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    )
