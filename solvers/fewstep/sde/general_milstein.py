from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse, plus
from ..solver import Card, Step, StochasticSolver
from .iterated import check_differentiable, diffusion_and_bracket, pairs


class GeneralMilstein(StochasticSolver):
    r"""The Milstein step for noise that does not commute (Kloeden & Platen 1992, Eq. (10.3.3)).

    .. math:: y_{n+1} = y_n + h f + g W + \sum_{i,j} (D g_j\, g_i) I_{ij}, \quad
              I_{ij} = \tfrac12 W_i W_j + A_{ij} - \tfrac12 h \delta_{ij},

    without the last term of I in Stratonovich's calculus.

    - Strong order: 1.0 for general noise, on a path with its own area (`AreaPath`); 0.5 with an area
      that only has the right law.
    - Cost per step: 1 drift and 1 diffusion evaluation, 1 + m derivatives in reverse mode.
      Lévy data: W, A. Calculus: both.
    - `LogODE` has the same order with a second-order drift.
    """

    card: Card = Card(
        summary="Milstein with the iterated integrals of all pairs of channels",
        reference="Kloeden & Platen 1992, Eq. (10.3.3)",
        levy="A",
        sde_types=("ito", "stratonovich"),
        strong_order={"general": 1.0},
        weak_order={"general": 1.0},
        deterministic_order=1.0,
    )

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> None:
        check_differentiable(sde, t0, y0)

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        assert increment.A is not None
        g, bracket = diffusion_and_bracket(sde, t0, y, pairs(increment, sde) + increment.A)
        return Step(plus(y, increment.h, sde.drift(t0, y)) + diffuse(g, increment.W) + bracket)
