"""The shifted ODE method, made for underdamped Langevin dynamics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .rk4 import runge_kutta


class ShiftedODE(StochasticSolver):
    """Shift y by g (H + 6K), solve dz/du = f h + g (W - 12K) over u in [0, 1] by RK4, shift by g (6K - H).

    The path of two jumps and a line has the W, H and K of the Brownian one. Where noise enters the
    momenta alone, as in underdamped Langevin dynamics dq = p dt, dp = (F(q) - gamma p) dt + sigma dW, the
    strong order is 3.0 (`tests/test_classical.py` measures it); for other additive noise it is 1.0,
    where `ShARK` has 1.5 for half the evaluations. g must not depend on time.
    """

    card: Card = Card(
        summary="ODE along a shifted line that matches W, H and K; order 3.0 for underdamped Langevin",
        reference="Foster, Lyons & Oberhauser 2021 (arXiv 2101.03446), Definition 1.1, Eq. (2)",
        levy="K",
        sde_types=("ito", "stratonovich"),
        strong_order={"additive": 1.0},
        weak_order={"additive": 1.0},
        deterministic_order=4.0,
        evaluations=4,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        W, H, K = increment.W, increment.H, increment.K
        assert H is not None
        assert K is not None
        g = sde.diffusion(t0, y)
        z = y + diffuse(g, H + 6 * K)
        z = z + runge_kutta(sde, t0, t1, z, increment.h, W - 12 * K)
        return Step(z - diffuse(g, H - 6 * K))
