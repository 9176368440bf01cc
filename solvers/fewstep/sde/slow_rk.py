from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver


class SlowRK(StochasticSolver):
    r"""SlowRK: the RK4 rule for the noise, a second-order rule for the drift, and [f, g] through H.

    .. math:: y_{n+1} = y_n + \tfrac13 h (f_1 + 2 f_6) + \tfrac16 (g_2 + 2 g_3 + 2 g_4 + g_5) W
                        + 2 (g_4 - g_7) H

    - Strong order: 1.5 for diagonal, scalar, commutative and additive noise; 0.5 for general noise.
    - Cost per step: 2 drift and 6 diffusion evaluations. Lévy data: W, H. Calculus: Stratonovich.
    - `SRID2` is the counterpart in Itô's calculus; for additive noise `ShARK` has this order at lower cost.
    - Source: Foster, dos Reis & Strange 2024 (arXiv 2210.17543), Eq. (6.2); diffrax.
    """

    card: Card = Card(
        summary="seven-stage Runge-Kutta for commutative noise",
        reference="Foster, dos Reis & Strange 2024 (arXiv 2210.17543), Eq. (6.2); diffrax",
        levy="H",
        sde_types=("stratonovich",),
        strong_order={"diagonal": 1.5, "scalar": 1.5, "commutative": 1.5, "additive": 1.5, "general": 0.5},
        weak_order={"diagonal": 2.0, "scalar": 2.0, "commutative": 2.0, "additive": 2.0, "general": 1.0},
        deterministic_order=2.0,
        evaluations=2,
    )
    error_order: float = 1.5

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        return self._step(sde, t0, t1, y, increment, False)

    def step_with_error(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        """The step and its difference from Euler's rule for the drift with the midpoint rule for the noise."""
        return self._step(sde, t0, t1, y, increment, True)

    def _step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, estimate: bool) -> Step:
        f, g, h, W, H = sde.drift, sde.diffusion, increment.h, increment.W, increment.H
        assert H is not None
        middle = t0 + 0.5 * h
        f1 = f(t0, y)
        z2 = y + 0.5 * h * f1
        n2 = diffuse(g(middle, z2), W)
        n3 = diffuse(g(middle, z2 + 0.5 * n2), W)
        g4 = g(middle, z2 + 0.5 * n3)
        n4 = diffuse(g4, W)
        n5 = diffuse(g(middle, z2 + n4), W)
        f6 = f(t0 + 0.75 * h, y + 0.75 * (h * f1 + n4) + 1.5 * diffuse(g4, H))
        g7 = g(t1, y + h * f1 + 0.5 * n3)
        y = y + h / 3 * (f1 + 2 * f6)
        y = y + (n2 + 2 * n3 + 2 * n4 + n5) / 6 + diffuse(2 * (g4 - g7), H)
        if not estimate:
            return Step(y)
        return Step(y, error=2 * h / 3 * (f6 - f1) + (n2 - 4 * n3 + 2 * n4 + n5) / 6 + diffuse(2 * (g4 - g7), H))
