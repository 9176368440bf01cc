from torch import Tensor

from ..brownian import Increment
from ..problem import SDE
from ..solver import Card, Step, StochasticSolver
from .iterated import check_differentiable, milstein_noise
from .milstein import FACTS
from .tamed_euler import tamed


class TamedMilstein(StochasticSolver):
    r"""The tamed Milstein method, for drifts that grow faster than linearly.

    .. math:: y_{n+1} = y_n + \frac{h f}{1 + h |f|} + g W + \tfrac12 g' g (W^2 - h),

    without the last h in Stratonovich's calculus, with the Euclidean norm of f over the last axis.

    - Strong order: 1.0 for diagonal, scalar, commutative and additive noise, for one-sided Lipschitz drifts
      of polynomial growth such as y - y^3.
    - Cost per step: 1 drift and 1 diffusion evaluation with its derivative. Lévy data: W. Calculus: both.
    - `ImplicitMilstein` also follows large drifts, at the cost of Jacobians; `TamedEuler` needs no derivative.
    - Source: after Wang & Gan 2013 (J. Difference Equ. Appl. 19), the tamed Milstein method for commutative noise.
    """

    card: Card = Card(
        summary="Milstein with a bounded step of the drift; for superlinear drifts",
        reference="after Wang & Gan 2013 (J. Difference Equ. Appl. 19)",
        **FACTS,
    )

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> None:
        check_differentiable(sde, t0, y0)

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        return Step(y + tamed(sde.drift(t0, y), increment.h) + milstein_noise(sde, t0, y, increment))
