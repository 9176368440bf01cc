"""The reversible Heun method."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .euler_heun import STRATONOVICH_ORDERS, WEAK_ORDERS


class ReversibleHeun(StochasticSolver):
    """Heun with a second state z that leaps over y: each step can be undone exactly.

    Carries (z, f(z), g(z)) from step to step, so that it costs one drift evaluation a step (and one to
    start). Strong order 1.0 in Stratonovich's calculus (general noise 0.5). `Heun` is more stable: here
    the parasitic state z is not damped, a reason to keep to problems that are not stiff.
    """

    card: Card = Card(
        summary="algebraically reversible Heun step, one evaluation of drift and diffusion",
        reference="Kidger, Foster, Li & Lyons 2021 (arXiv 2105.13493), Algorithm 1",
        levy="W",
        sde_types=("stratonovich",),
        strong_order=STRATONOVICH_ORDERS,
        weak_order=WEAK_ORDERS,
        deterministic_order=2.0,
        evaluations=1,
    )

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return y0, sde.drift(t0, y0), sde.diffusion(t0, y0)

    def step(
        self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        h, W = increment.h, increment.W
        z, f, g = carry
        now = h * f + diffuse(g, W)
        z = 2 * y - z + now
        f, g = sde.drift(t1, z), sde.diffusion(t1, z)
        return Step(y + 0.5 * (now + h * f + diffuse(g, W)), (z, f, g))
