from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, ReversibleSolver, Step
from .euler_heun import CHORD


class ReversibleHeun(ReversibleSolver):
    r"""The reversible Heun method: a step that can be undone exactly.

    .. math:: z_{n+1} = 2 y_n - z_n + h f(z_n) + g(z_n) W, \quad
              y_{n+1} = y_n + \tfrac12 h \big(f(z_n) + f(z_{n+1})\big)
                            + \tfrac12 \big(g(z_n) + g(z_{n+1})\big) W

    - Strong order: 1.0; 0.5 for general noise. Deterministic order: 2.
    - Cost per step: 1 drift and 1 diffusion evaluation, and one more of each at the start; z, f(z) and
      g(z) are carried from step to step. Lévy data: W. Calculus: Stratonovich.
    - `solve(..., gradient="reversible")` undoes its steps: exact gradients in memory that does not grow with them.
    - The parasitic state z is not damped: use it for problems that are not stiff. `Heun` is more stable.
    - Source: Kidger, Foster, Li & Lyons 2021 (arXiv 2105.13493), Algorithm 1.
    """

    card: Card = Card(
        summary="algebraically reversible Heun step, one evaluation of drift and diffusion",
        reference="Kidger, Foster, Li & Lyons 2021 (arXiv 2105.13493), Algorithm 1",
        deterministic_order=2.0,
        **CHORD,
    )

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return y0, sde.drift(t0, y0), sde.diffusion(t0, y0)

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        h, W = increment.h, increment.W
        z, f, g = carry
        now = h * f + diffuse(g, W)
        z = 2 * y - z + now
        f, g = sde.drift(t1, z), sde.diffusion(t1, z)
        return Step(y + 0.5 * (now + h * f + diffuse(g, W)), (z, f, g))

    def undo(
        self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, W = increment.h, increment.W
        z, f, g = carry
        now = h * f + diffuse(g, W)
        z = 2 * y - z - now
        f, g = sde.drift(t0, z), sde.diffusion(t0, z)
        return y - 0.5 * (now + h * f + diffuse(g, W)), (z, f, g)
