import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import SDE
from ..solver import Card, Step
from .phi import phi_functions
from .underdamped import FirstSameAsLast, constants_of, facts


class ShOULD(FirstSameAsLast):
    r"""The ShOULD method of order 3 for underdamped Langevin dynamics: a shifted ODE by Simpson's rule.

    .. math:: F_1 &= F\big(x + \tfrac{h}{2} \varphi_1(-\tfrac12 \gamma h) (v + \sigma (H + 6 K)) + \tfrac{h}{4}
              \varphi_2(-\tfrac12 \gamma h) (h F_0 + \sigma (W - 12 K))\big), \\
              x' &= x + h \varphi_1 v + h^2 \varphi_2 \big(\tfrac13 F_0 + \tfrac23 F_1\big)
              + \sigma h \varphi_2 W + Z, \\
              v' &= \varphi_0 v + h \big(\tfrac16 \varphi_0 F_0 + \tfrac23 e^{-\gamma h / 2} F_1 + \tfrac16 F(x')\big)
              + \sigma \varphi_1 W - \gamma Z, \\
              Z &= \sigma h \big(6 (\varphi_2 - 2 \varphi_3) H + 60 (\varphi_2 - 6 \varphi_3 + 12 \varphi_4) K\big),

    with F_0 = F(x) and :math:`\varphi_k = \varphi_k(-\gamma h)`. The noise is that of a free particle, exact given W, H
    and K.

    - Strong order: 3.0 for underdamped Langevin dynamics with a smooth force.
    - Cost per step: 2 drift evaluations (the last is the first of the next step). Lévy data: W, H, K. Calculus: both.
    - `QUICSORT` has the same order and cost. `ALIGN` has order 2.0 for one evaluation, on a path with H.
    - Source: after Foster, Lyons & Oberhauser 2021 (arXiv 2101.03446), Definition 7.1.
    """

    card: Card = Card(
        summary="shifted ODE by Simpson's rule, friction solved exactly; order 3.0 for underdamped Langevin",
        reference="after Foster, Lyons & Oberhauser 2021 (arXiv 2101.03446), Definition 7.1",
        levy="K",
        evaluations=2,
        **facts(3.0),
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Tensor) -> Step:
        h, W, H, K = increment.h, increment.W, increment.H, increment.K
        assert H is not None
        assert K is not None
        (x, v), (friction, sigma), F0 = y.chunk(2, -1), constants_of(sde), carry
        half0, half1, half2 = phi_functions(-friction * h / 2, 2)
        e0, e1, e2, e3, e4 = phi_functions(-friction * h, 4)
        line, before, chord = sigma * (W - 12 * K), sigma * (H + 6 * K), sigma * W
        Z = sigma * (6 * (e2 - 2 * e3) * H + 60 * (e2 - 6 * e3 + 12 * e4) * K)
        F1 = self.force(sde, t0 + h / 2, x + h / 2 * half1 * (v + before) + h / 4 * half2 * (h * F0 + line))
        x = x + h * (e1 * v + h * e2 / 3 * (F0 + 2 * F1) + e2 * chord + Z)
        F2 = self.force(sde, t1, x)
        v = e0 * v + h / 6 * (e0 * F0 + 4 * half0 * F1 + F2) + e1 * chord - friction * h * Z
        return Step(torch.cat([x, v], -1), F2)
