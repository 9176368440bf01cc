"""The classical Runge-Kutta method along the chord of the path."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .euler_heun import STRATONOVICH_ORDERS, WEAK_ORDERS


class RK4(StochasticSolver):
    """Runge and Kutta's four stages for dz/du = f h + g W over u in [0, 1].

    Order 4 where there is no noise: the reference among ODE solvers. With noise the chord is all it
    sees, strong order 1.0 in Stratonovich's calculus (general noise 0.5), which `Heun` has for half.
    """

    card: Card = Card(
        summary="classical Runge-Kutta of order 4, along the chord of the path",
        reference="Kutta 1901; Rümelin 1982 (SIAM J. Numer. Anal. 19), Eq. (2.4)",
        levy="W",
        sde_types=("stratonovich",),
        strong_order=STRATONOVICH_ORDERS,
        weak_order=WEAK_ORDERS,
        deterministic_order=4.0,
        evaluations=4,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        return Step(y + runge_kutta(sde, t0, t1, y, increment.h, increment.W))


def runge_kutta(sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, h: float, W: Tensor) -> Tensor:
    """What four stages add to y along a line in (time, noise) that goes h and W far."""

    def field(t: Tensor, z: Tensor) -> Tensor:
        return h * sde.drift(t, z) + diffuse(sde.diffusion(t, z), W)

    middle = t0 + 0.5 * h
    k1 = field(t0, y)
    k2 = field(middle, y + 0.5 * k1)
    k3 = field(middle, y + 0.5 * k2)
    return (k1 + 2 * (k2 + k3) + field(t1, y + k3)) / 6
