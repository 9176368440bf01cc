from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .rk4 import runge_kutta


class ShiftedODE(StochasticSolver):
    r"""The shifted ODE method, designed for underdamped Langevin dynamics.

    .. math:: y_{n+1} = z(1) - g (H - 6 K), \quad \frac{dz}{du} = h f(z) + g (W - 12 K), \quad
              z(0) = y_n + g (H + 6 K),

    by one step of `RK4`: a path of two jumps and a line with the W, H and K of the Brownian path.

    - Strong order: 1.0 for additive noise; 3.0 if noise enters the momenta alone, as in underdamped
      Langevin dynamics dq = p dt, dp = (F(q) - gamma p) dt + sigma dW.
    - Cost per step: 4 drift evaluations. Lévy data: W, H, K. Calculus: both. g must not depend on time.
    - `QUICSORT` and `ShOULD` solve the friction exactly and need half the evaluations. For other additive noise `ShARK`
      has order 1.5.
    - Source: Foster, Lyons & Oberhauser 2021 (arXiv 2101.03446), Definition 1.1, Eq. (2).
    """

    card: Card = Card(
        summary="ODE along a shifted line that matches W, H and K; order 3.0 for underdamped Langevin",
        reference="Foster, Lyons & Oberhauser 2021 (arXiv 2101.03446), Definition 1.1, Eq. (2)",
        levy="K",
        sde_types=("ito", "stratonovich"),
        strong_order={"additive": 1.0, "underdamped": 3.0},
        weak_order={"additive": 1.0, "underdamped": 3.0},
        deterministic_order=4.0,
        evaluations=4,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        W, H, K = increment.W, increment.H, increment.K
        assert H is not None
        assert K is not None
        g = sde.diffusion(t0, y)
        z = y + diffuse(g, H + 6 * K)
        z = z + runge_kutta(sde, t0, t1, z, increment.h, W - 12 * K)
        return Step(z - diffuse(g, H - 6 * K))
