"""Building blocks of exponential integrators in lambda = -log sigma: weights of a step and quadratures.

The exact step from s to t is x_t = scale x_s + gain int e^{-q(1-u)} q F(u) du with u in [0, 1] and F the
data prediction (q = h), the same under noise (q = (1 + eta) h), or the noise prediction (q = -h).
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..plan_builder import LinearExpr, PlanBuilder

History = list[tuple[LinearExpr, float]]
"""Evaluations with their lambda, newest first."""
OrderAt = Callable[[int, int, Tensor], int]
"""(order, steps left, sigmas) -> the order of a step."""


def order_before_zero(order: int, left: int, sigmas: Tensor) -> int:
    """The order of a step when `left` steps are left: at most 2 just before a last level of 0.

    That step is long, and the last one, which returns the estimate of x0, does not damp its error.
    """
    return min(order, 2) if left == 2 and sigmas[-1] == 0 else order


class ExponentialStep:
    """One exponential step from s to t, 0 < t < s.

    Args:
        prediction: "data" or "noise", what F is.
        eta: with "data", the share of the reverse SDE (0: the ODE; 1: the SDE), tau^2 of SA-Solver.
    """

    def __init__(self, s: float, t: float, prediction: str = "data", eta: float = 0.0) -> None:
        noise = prediction == "noise"
        self.s: float = s
        self.t: float = t
        self.eta: float = eta
        self.h: float = math.log(s / t)
        self.q: float = -self.h if noise else (1 + eta) * self.h
        self.gain: float = t if noise else 1.0
        self.scale: float = 1.0 if noise else (t / s) ** (1 + eta)
        # the standard deviation of the noise that the step adds
        self.noise: float = t * math.sqrt(-math.expm1(-2 * eta * self.h))

    def weights(self) -> tuple[float, float, float]:
        """Return the weights of F, h F' and h^2 F'' at s: q phi_k(-q) for k = 1, 2, 3."""
        q = self.q
        e0 = -math.expm1(-q)
        e1 = 1 - e0 / q
        return e0, e1, 0.5 - e1 / q

    def __call__(self, x: LinearExpr, F: LinearExpr, *terms: tuple[float, LinearExpr]) -> LinearExpr:
        """The step with F frozen, plus weighted derivatives of F."""
        return sum((self.gain * w * d for w, d in [(self.weights()[0], F), *terms]), self.scale * x)


def weighted_sum(weights: Sequence[float], terms: Sequence[LinearExpr]) -> LinearExpr:
    """sum_j w_j F_j."""
    return sum((w * F for w, F in zip(weights, terms, strict=True)), LinearExpr({}))


def path_noise(builder: PlanBuilder, s: float, t: float, size: float) -> LinearExpr:
    """size z, with z the normal of the path in 1/sigma^2 from level s to t; nothing where the size is 0."""
    return size * builder.noise(s**-2, t**-2)[0] if size > 0 else LinearExpr({})


@cache
def _gauss() -> tuple[Tensor, Tensor]:
    """32 nodes and weights: exact to rounding for every kernel here, steps of a factor e^20 in sigma included."""
    points, weights = np.polynomial.legendre.leggauss(32)
    return torch.from_numpy(points), torch.from_numpy(weights)


def adams_weights(
    nodes: Sequence[float], start: float, end: float, kernel: Callable[[Tensor], Tensor] = torch.ones_like,
    variable: Callable[[Tensor], Tensor] = lambda u: u,
) -> list[float]:  # fmt: skip
    """w_j = int_start^end kernel(u) l_j(variable(u)) du, l_j Lagrange's polynomial that is 1 at node j."""
    points, weights = _gauss()
    u = start + (end - start) * (points + 1) / 2
    mass, v = kernel(u) * weights * (end - start) / 2, variable(u)
    return [
        float(math.prod([(v - b) / (a - b) for k, b in enumerate(nodes) if k != j], start=mass).sum())
        for j, a in enumerate(nodes)
    ]
