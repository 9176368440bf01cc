from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .euler_heun import CHORD


class Midpoint(StochasticSolver):
    r"""The explicit midpoint method for drift and noise (Kloeden & Platen 1992, Eq. (4.9.9) made explicit).

    .. math:: y_{n+1} = y_n + h f(t_{n+1/2}, z) + g(t_{n+1/2}, z) W, \quad
              z = y_n + \tfrac12 (h f + g W)

    - Strong order: 1.0; 0.5 for general noise. Deterministic order: 2.
    - Cost per step: 2 drift and 2 diffusion evaluations. Lévy data: W. Calculus: Stratonovich.
    - `Heun` has the same cost and order.
    """

    card: Card = Card(
        summary="explicit midpoint rule of the Stratonovich integral",
        reference="Kloeden & Platen 1992, Eq. (4.9.9) made explicit; torchsde's 'midpoint'",
        deterministic_order=2.0,
        evaluations=2,
        **CHORD,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        h, W = increment.h, increment.W
        half = y + 0.5 * (h * sde.drift(t0, y) + diffuse(sde.diffusion(t0, y), W))
        middle = t0 + 0.5 * h
        return Step(y + h * sde.drift(middle, half) + diffuse(sde.diffusion(middle, half), W))
