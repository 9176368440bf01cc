from ..problem import SDE_TYPES
from ..solver import Card
from .runge_kutta import ButcherTableau, RungeKutta


class Tsit5(RungeKutta):
    r"""The Runge-Kutta pair of Tsitouras of orders 5 and 4, for ODEs.

    .. math:: y_{n+1} = y_n + h \sum_{j=1}^6 a_{7j} k_j, \quad e = h \sum_{i=1}^7 e_i k_i

    with the stages k of the table in the source.

    - Order: 5, with an estimate of the error of order 5 in h.
    - Cost per step: 6 drift evaluations; the last one is the first of the next step. ODEs only.
    - The first choice for ODEs that are not stiff, with `steps=Adaptive(...)`.
    - Source: Tsitouras 2011 (Comput. Math. Appl. 62), Table 1.
    """

    card: Card = Card(
        summary="Tsitouras pair of orders 5 and 4 for ODEs",
        reference="Tsitouras 2011 (Comput. Math. Appl. 62), Table 1",
        deterministic_order=5.0,
        evaluations=6,
        sde_types=SDE_TYPES,
    )
    error_order: float = 5.0
    tableau: ButcherTableau = ButcherTableau(
        c=(0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
        a=(
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
            (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
        ),
        e=(
            -0.001780011052225772, -0.0008164344596567469, 0.007880878010261995, -0.1447110071732629,
            0.5823571654525552, -0.45808210592918697, 1 / 66,
        ),
    )  # fmt: skip
