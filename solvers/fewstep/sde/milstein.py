from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, added, plus
from ..solver import Card, Step, StochasticSolver
from .iterated import check_differentiable, milstein_noise

ORDERS = {"diagonal": 1.0, "scalar": 1.0, "commutative": 1.0, "additive": 1.0}
FACTS: dict[str, Any] = {
    "levy": "W", "sde_types": ("ito", "stratonovich"), "strong_order": ORDERS, "weak_order": ORDERS,
    "deterministic_order": 1.0,
}  # fmt: skip


class Milstein(StochasticSolver):
    r"""The Milstein step, with derivatives by automatic differentiation.

    .. math:: y_{n+1} = y_n + h f + g W + \tfrac12 g' g (W^2 - h),

    without the last h in Stratonovich's calculus.

    - Strong order: 1.0 for diagonal, scalar, commutative and additive noise.
    - Cost per step: 1 drift and 1 diffusion evaluation with its derivative in reverse mode, or `SDE(derivative=...)`
      (scalar and commutative noise: 1 + m derivatives). Lévy data: W. Calculus: both.
    - `DerivativeFreeMilstein` needs no derivative, `GeneralMilstein` solves general noise given the area.
      For additive noise `EulerMaruyama` is the same step at lower cost.
    - Source: Kloeden & Platen 1992, Eqs. (10.3.1), (10.3.16).
    """

    card: Card = Card(
        summary="Euler-Maruyama with the iterated integral of the noise, derivative by autograd",
        reference="Kloeden & Platen 1992, Eqs. (10.3.1), (10.3.16)",
        **FACTS,
    )

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> None:
        check_differentiable(sde, t0, y0)

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        noise = milstein_noise(sde, t0, y, increment)
        return Step(added(plus(y, increment.h, sde.drift(t0, y)), noise))
