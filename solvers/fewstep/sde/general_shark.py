from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .spark import FACTS


class GeneralShARK(StochasticSolver):
    r"""ShARK for a diffusion that depends on the state.

    .. math:: y_{n+1} = y_n + \tfrac25 (h f_2 + g_2 W) + \tfrac35 (h f_3 + g_3 W)
                        + \tfrac65 (g_2 - g_3) H,

    at z_2 = y + g H and, 5h/6 later, z_3 = y + g H + (5/6)(h f_2 + g_2 W).

    - Strong order: 1.5 for additive noise; 1.0 for diagonal, scalar and commutative noise; 0.5 for general noise.
    - Cost per step: 2 drift and 3 diffusion evaluations. Lévy data: W, H. Calculus: Stratonovich.
    - For additive noise `ShARK` needs fewer evaluations of g; `SlowRK` has 1.5 for commutative noise.
    - Source: Foster, dos Reis & Strange 2024 (arXiv 2210.17543), after Eq. (6.1); diffrax.
    """

    card: Card = Card(
        summary="two-stage Runge-Kutta, its start shifted by H, for state-dependent noise",
        reference="Foster, dos Reis & Strange 2024 (arXiv 2210.17543), after Eq. (6.1); diffrax",
        evaluations=2,
        **FACTS,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        f, g, h, W, H = sde.drift, sde.diffusion, increment.h, increment.W, increment.H
        assert H is not None
        shift = diffuse(g(t0, y), H)
        z2 = y + shift
        f2, g2 = f(t0, z2), g(t0, z2)
        later = t0 + 5 / 6 * h
        z3 = y + 5 / 6 * (h * f2 + diffuse(g2, W)) + shift
        f3, g3 = f(later, z3), g(later, z3)
        y = y + h * (0.4 * f2 + 0.6 * f3)
        return Step(y + diffuse(0.4 * g2 + 0.6 * g3, W) + diffuse(1.2 * (g2 - g3), H))
