from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .euler_heun import CHORD


class Heun(StochasticSolver):
    r"""Heun's method: the trapezoidal rule after an Euler step, for drift and noise.

    .. math:: y_{n+1} = y_n + \tfrac12 (k_1 + k_2), \quad k_1 = h f + g W, \quad
              k_2 = h f(t_{n+1}, y_n + k_1) + g(t_{n+1}, y_n + k_1) W

    - Strong order: 1.0; 0.5 for general noise. Deterministic order: 2.
    - Cost per step: 2 drift and 2 diffusion evaluations. Lévy data: W. Calculus: Stratonovich.
    - `Midpoint` has the same cost; for additive noise `ShARK` has order 1.5 at this cost.
    - Source: Rümelin 1982 (SIAM J. Numer. Anal. 19), Eq. (3.5).
    """

    card: Card = Card(
        summary="trapezoidal predictor-corrector of the Stratonovich integral",
        reference="Rümelin 1982 (SIAM J. Numer. Anal. 19), Eq. (3.5); torchsde's 'heun'",
        deterministic_order=2.0,
        evaluations=2,
        **CHORD,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        h, W = increment.h, increment.W
        now = h * sde.drift(t0, y) + diffuse(sde.diffusion(t0, y), W)
        z = y + now
        then = h * sde.drift(t1, z) + diffuse(sde.diffusion(t1, z), W)
        return Step(y + 0.5 * (now + then))
