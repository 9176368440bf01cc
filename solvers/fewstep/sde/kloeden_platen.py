from torch import Tensor

from ..brownian import Increment
from ..problem import SDE
from ..solver import Card, Step, StochasticSolver


class KloedenPlaten15(StochasticSolver):
    r"""The strong Taylor scheme of order 1.5 with differences instead of derivatives.

    .. math:: y_{n+1} = y_n + g W + \frac{f_+ - f_-}{2\sqrt h} Z + \frac h4 (f_+ + 2 f + f_-)
              + \frac{g_+ - g_-}{4\sqrt h} (W^2 - h) + \frac{g_+ - 2 g + g_-}{2h} (W h - Z)
              + \frac{g_{++} - g_{+-} - g_+ + g_-}{4h} \big(\tfrac13 W^2 - h\big) W,

    at y_± = y + h f ± sqrt(h) g and y_+± = y_+ ± sqrt(h) g_+, with Z = int W ds = h (W/2 + H).

    - Strong order: 1.5 for scalar noise.
    - Cost per step: 3 drift and 5 diffusion evaluations. Lévy data: W, H. Calculus: Itô.
    - `SRID2` has this order with fewer evaluations of g, for diagonal noise too; `Taylor15` differentiates.
    - Source: Kloeden & Platen 1992, Eq. (11.2.1), with time as a component of the state.
    """

    card: Card = Card(
        summary="derivative-free strong Taylor scheme of order 1.5",
        reference="Kloeden & Platen 1992, Eq. (11.2.1); time as a component of the state",
        levy="H",
        sde_types=("ito",),
        strong_order={"scalar": 1.5},
        weak_order={"scalar": 2.0},
        deterministic_order=2.0,
        evaluations=3,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        h, W, Z = increment.h, increment.W, increment.U
        root = abs(h) ** 0.5  # an ODE may step back
        f = sde.drift(t0, y)

        def g(t: Tensor, x: Tensor) -> Tensor:
            return sde.diffusion(t, x).squeeze(-1)

        g0 = g(t0, y)
        up, down = y + h * f + root * g0, y + h * f - root * g0
        f_up, f_down, g_up, g_down = sde.drift(t1, up), sde.drift(t1, down), g(t1, up), g(t1, down)
        y = y + g0 * W + (f_up - f_down) * (Z / (2 * root)) + h / 4 * (f_up + 2 * f + f_down)
        y = y + (g_up - g_down) * ((W**2 - h) / (4 * root))
        y = y + (g_up - 2 * g0 + g_down) * ((W * h - Z) / (2 * h))
        curve = g(t1, up + root * g_up) - g(t1, up - root * g_up) - g_up + g_down
        return Step(y + curve * ((W**2 / 3 - h) * W / (4 * h)))
