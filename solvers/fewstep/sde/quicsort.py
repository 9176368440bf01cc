import math

import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import SDE
from ..solver import Card, Step
from .phi import phi_functions
from .underdamped import Underdamped, constants_of, facts

LEFT = 0.5 - math.sqrt(3) / 6  # the nodes of Gauss's rule
RIGHT = 0.5 + math.sqrt(3) / 6


class QUICSORT(Underdamped):
    r"""The QUICSORT method of order 3 for underdamped Langevin dynamics, with two forces per step.

    .. math:: \tilde v &= v + \sigma (H + 6 K), \quad z(c) = x + c h \varphi_1(-c \gamma h) \tilde v
              + c^2 h \varphi_2(-c \gamma h)\, \sigma (W - 12 K), \\
              F_1 &= F(z(l)), \quad F_2 = F\big(z(r) + \tfrac{h^2}{3} \varphi_1(-\tfrac13 \gamma h) F_1\big), \\
              x' &= z(1) + \tfrac{h^2}{2} \big(r \varphi_1(-r \gamma h) F_1 + l \varphi_1(-l \gamma h) F_2\big), \\
              v' &= e^{-\gamma h} \tilde v + \varphi_1(-\gamma h)\, \sigma (W - 12 K) + \tfrac{h}{2}
              \big(e^{-r \gamma h} F_1 + e^{-l \gamma h} F_2\big) - \sigma (H - 6 K),

    with the nodes l, r = 1/2 -+ sqrt(3)/6 of Gauss's rule: the shifted ODE (`ShiftedODE`), whose friction is solved
    exactly.

    - Strong order: 3.0 for underdamped Langevin dynamics with a smooth force.
    - Cost per step: 2 drift evaluations. Lévy data: W, H, K. Calculus: both.
    - The default for `UnderdampedLangevin` on a path with K. `ShOULD` has the same order and cost, `ALIGN` order 2.0
      for one evaluation; `ShiftedODE` needs four.
    - Strong friction does not make it unstable, but where gamma h is above 1 velocities have too large a variance, and
      `ShOULD` and `ALIGN` too small a one. A stiff force limits the step.
    - Source: after Scott, O'Kane, Jelinčić & Foster 2025 (arXiv 2508.16485).
    """

    card: Card = Card(
        summary="shifted ODE by Gauss's rule, friction solved exactly; order 3.0 for underdamped Langevin",
        reference="after Scott, O'Kane, Jelinčić & Foster 2025 (arXiv 2508.16485)",
        levy="K",
        evaluations=2,
        **facts(3.0),
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        h, W, H, K = increment.h, increment.W, increment.H, increment.K
        assert H is not None
        assert K is not None
        (x, v), (friction, sigma) = y.chunk(2, -1), constants_of(sde)
        line, decay = sigma * (W - 12 * K), friction * h
        l0, l1, l2 = phi_functions(-LEFT * decay, 2)
        r0, r1, r2 = phi_functions(-RIGHT * decay, 2)
        e0, e1, e2 = phi_functions(-decay, 2)
        v = v + sigma * (H + 6 * K)
        F1 = self.force(sde, t0 + LEFT * h, x + LEFT * h * l1 * v + LEFT**2 * h * l2 * line)
        z = x + RIGHT * h * r1 * v + RIGHT**2 * h * r2 * line
        F2 = self.force(sde, t0 + RIGHT * h, z + h * h / 3 * phi_functions(-decay / 3, 1)[1] * F1)
        x = x + h * e1 * v + h * e2 * line + h * h / 2 * (RIGHT * r1 * F1 + LEFT * l1 * F2)
        v = e0 * v + e1 * line + h / 2 * (r0 * F1 + l0 * F2) - sigma * (H - 6 * K)
        return Step(torch.cat([x, v], -1))
