"""The explicit midpoint method."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .euler_heun import STRATONOVICH_ORDERS, WEAK_ORDERS


class Midpoint(StochasticSolver):
    """Drift and noise as they are at the middle of an Euler step.

    Strong order 1.0 in Stratonovich's calculus (general noise 0.5), order 2 without noise; two drift
    evaluations a step, no state more than one stage. `Heun` is its neighbour at the same price.
    """

    card: Card = Card(
        summary="explicit midpoint rule of the Stratonovich integral",
        reference="Kloeden & Platen 1992, Eq. (4.9.9) made explicit; torchsde's 'midpoint'",
        levy="W",
        sde_types=("stratonovich",),
        strong_order=STRATONOVICH_ORDERS,
        weak_order=WEAK_ORDERS,
        deterministic_order=2.0,
        evaluations=2,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        h, W = increment.h, increment.W
        half = y + 0.5 * (h * sde.drift(t0, y) + diffuse(sde.diffusion(t0, y), W))
        middle = t0 + 0.5 * h
        return Step(y + h * sde.drift(middle, half) + diffuse(sde.diffusion(middle, half), W))
