from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .euler_heun import CHORD


class RK4(StochasticSolver):
    r"""The classical Runge-Kutta method along the chord of the path.

    .. math:: y_{n+1} = y_n + \tfrac16 (k_1 + 2 k_2 + 2 k_3 + k_4),

    the four stages of dz/du = h f + g W over u in [0, 1].

    - Strong order: 1.0; 0.5 for general noise. Deterministic order: 4.
    - Cost per step: 4 drift and 4 diffusion evaluations. Lévy data: W. Calculus: Stratonovich.
    - The reference among ODE solvers. With noise, `Heun` has the same order for half the cost.
    - Source: Kutta 1901; Rümelin 1982 (SIAM J. Numer. Anal. 19), Eq. (2.4).
    """

    card: Card = Card(
        summary="classical Runge-Kutta of order 4, along the chord of the path",
        reference="Kutta 1901; Rümelin 1982 (SIAM J. Numer. Anal. 19), Eq. (2.4)",
        deterministic_order=4.0,
        evaluations=4,
        **CHORD,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        return Step(y + runge_kutta(sde, t0, t1, y, increment.h, increment.W))


def runge_kutta(sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, h: float | Tensor, W: Tensor) -> Tensor:
    """The change of y by one RK4 step along the line from (t0, 0) to (t1, W) in time and noise."""

    def field(t: Tensor, z: Tensor) -> Tensor:
        return h * sde.drift(t, z) + diffuse(sde.diffusion(t, z), W)

    middle = t0 + 0.5 * h
    k1 = field(t0, y)
    k2 = field(middle, y + 0.5 * k1)
    k3 = field(middle, y + 0.5 * k2)
    return (k1 + 2 * (k2 + k3) + field(t1, y + k3)) / 6
