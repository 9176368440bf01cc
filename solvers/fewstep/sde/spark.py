from math import sqrt
from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver

# lengths of the outer and middle pieces of the path that has the W, H and mean square of a Brownian one
X1, X2 = (3 - sqrt(3)) / 6, sqrt(3) / 3
FACTS: dict[str, Any] = {
    "levy": "H", "sde_types": ("stratonovich",), "deterministic_order": 2.0,
    "strong_order": {"diagonal": 1.0, "scalar": 1.0, "commutative": 1.0, "additive": 1.5, "general": 0.5},
    "weak_order": {"diagonal": 1.0, "scalar": 1.0, "commutative": 1.0, "additive": 2.0, "general": 1.0},
}  # fmt: skip


class SPaRK(StochasticSolver):
    r"""The splitting path Runge-Kutta method, along a three-piece path with the W and H of the Brownian one.

    .. math:: y_{n+1} = y_n + h \big(a (f_1 + f_3) + b f_2\big) + \big(a (g_1 + g_3) + b g_2\big) W
                        + (g_1 - g_3) H, \quad a = \tfrac{3 - \sqrt 3}{6},\ b = \tfrac{\sqrt 3}{3},

    at z_1 = y, z_2 = y + h f_1 / 2 + g_1 (W/2 + sqrt(3) H), z_3 = y + h f_2 + g_2 W.

    - Strong order: 1.5 for additive noise; 1.0 for diagonal, scalar and commutative noise; 0.5 for general noise.
    - Cost per step: 3 drift and 3 diffusion evaluations. Lévy data: W, H. Calculus: Stratonovich.
    - `GeneralShARK` has the same orders for 2 drift evaluations; `SlowRK` has 1.5 for commutative noise.
    - Source: Foster, dos Reis & Strange 2024 (arXiv 2210.17543), Definition 1.6, Eq. (1.6).
    """

    card: Card = Card(
        summary="Runge-Kutta along a splitting path of W and H",
        reference="Foster, dos Reis & Strange 2024 (arXiv 2210.17543), Definition 1.6, Eq. (1.6)",
        evaluations=3,
        **FACTS,
    )
    error_order: float = 1.5

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        return self._step(sde, t0, t1, y, increment, False)

    def step_with_error(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        """The step and its difference from the trapezoidal rule of its first and last stage, without H."""
        return self._step(sde, t0, t1, y, increment, True)

    def _step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, estimate: bool) -> Step:
        f, g, h, W, H = sde.drift, sde.diffusion, increment.h, increment.W, increment.H
        assert H is not None
        middle = t0 + 0.5 * h
        f1, g1 = f(t0, y), g(t0, y)
        z2 = y + 0.5 * h * f1 + diffuse(g1, 0.5 * W + sqrt(3) * H)
        f2, g2 = f(middle, z2), g(middle, z2)
        z3 = y + h * f2 + diffuse(g2, W)
        f3, g3 = f(t1, z3), g(t1, z3)
        y = y + h * (X1 * (f1 + f3) + X2 * f2)
        y = y + diffuse(X1 * (g1 + g3) + X2 * g2, W) + diffuse(g1 - g3, H)
        if not estimate:
            return Step(y)
        return Step(y, error=X2 * (h * (f2 - 0.5 * (f1 + f3)) + diffuse(g2 - 0.5 * (g1 + g3), W)) + diffuse(g1 - g3, H))
