import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import SDE
from ..solver import Card, Step
from .phi import phi_functions
from .underdamped import FirstSameAsLast, constants_of, facts


class ALIGN(FirstSameAsLast):
    r"""The ALIGN method of order 2 for underdamped Langevin dynamics, with one force per step.

    .. math:: x' &= x + h \varphi_1 v + h^2 \varphi_2 F(x)
              + \sigma h \big(\varphi_2 W + 6 (\varphi_2 - 2 \varphi_3) H\big), \\
              v' &= \varphi_0 v + h \big((\varphi_1 - \varphi_2) F(x) + \varphi_2 F(x')\big)
              + \sigma \big(\varphi_1 W - 6 \gamma h (\varphi_2 - 2 \varphi_3) H\big),

    with :math:`\varphi_k = \varphi_k(-\gamma h)`: exact for a force that is linear in time between its values, and for
    the noise of a free particle given W and H.

    - Strong order: 2.0 for underdamped Langevin dynamics with a smooth force.
    - Cost per step: 1 drift evaluation (that at the end is the first of the next step). Lévy data: W, H.
      Calculus: both.
    - For adaptive steps too: its error estimate needs no other evaluation. `QUICSORT` and `ShOULD` have order 3.0 for
      two evaluations on a path with K.
    - Source: after Foster, Lyons & Oberhauser 2021 (arXiv 2101.03446), Definition 4.2 (Strang splitting), with the mean
      of the noise given W and H.
    """

    error_order: float = 2.0
    card: Card = Card(
        summary="force linear in time, friction solved exactly; order 2.0 for underdamped Langevin",
        reference="after Foster, Lyons & Oberhauser 2021 (arXiv 2101.03446), Definition 4.2",
        levy="H",
        evaluations=1,
        **facts(2.0),
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Tensor) -> Step:
        return self.step_with_error(sde, t0, t1, y, increment, carry)._replace(error=None)

    def step_with_error(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Tensor) -> Step:
        """The step and its difference from one with the force at its start."""
        h, W, H = increment.h, increment.W, increment.H
        assert H is not None
        (x, v), (friction, sigma), F0 = y.chunk(2, -1), constants_of(sde), carry
        e0, e1, e2, e3 = phi_functions(-friction * h, 3)
        chord, Z = sigma * W, 6 * sigma * (e2 - 2 * e3) * H
        x = x + h * (e1 * v + h * e2 * F0 + e2 * chord + Z)
        F1 = self.force(sde, t1, x)
        change = h * e2 * (F1 - F0)
        v = e0 * v + h * e1 * F0 + change + e1 * chord - friction * h * Z
        return Step(torch.cat([x, v], -1), F1, torch.cat([torch.zeros_like(x), change], -1))
