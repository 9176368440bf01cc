"""The Euler-Heun method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver

# one path integral of the noise, W: order 1.0 wherever the channels commute, 0.5 where they do not
STRATONOVICH_ORDERS = {"diagonal": 1.0, "scalar": 1.0, "commutative": 1.0, "additive": 1.0, "general": 0.5}
WEAK_ORDERS = dict.fromkeys(STRATONOVICH_ORDERS, 1.0)


class EulerHeun(StochasticSolver):
    """y' = y + f h + (g + g(y + g W)) W / 2: Heun's rule for the noise, Euler's for the drift.

    Strong order 1.0 in Stratonovich's calculus (general noise 0.5), one drift and two diffusion
    evaluations a step: the cheapest solver of its kind. `Heun` takes a second drift evaluation and has
    the smaller error where drift matters.
    """

    card: Card = Card(
        summary="Euler for the drift, trapezoidal predictor-corrector for the noise",
        reference="Kloeden & Platen 1992, Eq. (4.9.15) of the noise, Section 11.1",
        levy="W",
        sde_types=("stratonovich",),
        strong_order=STRATONOVICH_ORDERS,
        weak_order=WEAK_ORDERS,
        deterministic_order=1.0,
        evaluations=1,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        noise = diffuse(sde.diffusion(t0, y), increment.W)
        after = diffuse(sde.diffusion(t1, y + noise), increment.W)
        return Step(torch.add(y, sde.drift(t0, y), alpha=increment.h) + 0.5 * (noise + after))
