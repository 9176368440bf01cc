import torch
from torch import Tensor

from .. import _validation
from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver


class TruncatedEuler(StochasticSolver):
    r"""The truncated Euler method, for drift and noise that both grow faster than linearly.

    .. math:: y_{n+1} = y_n + h f(t_n, \bar y) + g(t_n, \bar y) W, \quad
              \bar y = y_n \min\big(1, R(h) / |y_n|\big), \quad R(h) = r\, h^{-1/(4p)},

    with the Euclidean norm over the last axis: drift and diffusion never see a state outside a ball, which grows as
    steps become shorter.

    - Strong order: 0.5; 1.0 for additive noise, under a monotonicity condition
      (:math:`y f + \tfrac12 |g|^2 \le c\,(1 + |y|^2)` and more moments) in place of linear growth. The moments of
      `EulerMaruyama` diverge there.
    - Cost per step: 1 drift and 1 diffusion evaluation. Lévy data: W. Calculus: Itô.
    - `TamedEuler` has no radius to choose and is for a large drift alone: its noise is not bounded.
    - Outside of the ball the solution is wrong: it must lie inside with a high probability.
    - Source: after Mao 2015 (J. Comput. Appl. Math. 290), with the bound :math:`h^{-1/4}` on the coefficients there.

    Args:
        radius: r, that of the ball for h = 1.
        growth: p, the power of |y| with which the faster of drift and diffusion grows.

    Raises:
        InputError: a radius or a growth that is not positive.
    """

    def __init__(self, radius: float = 10.0, growth: float = 3.0) -> None:
        self.radius: float = _validation.check_float("radius", radius, 1e-30, expected="a positive number")
        self.growth: float = _validation.check_float("growth", growth, 1e-30, expected="a positive number")
        self.card: Card = Card(
            summary="Euler-Maruyama with coefficients taken inside a ball; for superlinear drift and noise",
            reference="after Mao 2015 (J. Comput. Appl. Math. 290)",
            levy="W",
            sde_types=("ito",),
            strong_order={"diagonal": 0.5, "scalar": 0.5, "commutative": 0.5, "general": 0.5, "additive": 1.0},
            weak_order=dict.fromkeys(("diagonal", "scalar", "commutative", "general", "additive"), 1.0),
            deterministic_order=1.0,
        )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        h = increment.h
        size = torch.linalg.vector_norm(y, dim=-1, keepdim=True) if y.dim() else y.abs()
        radius = self.radius * abs(h) ** (-0.25 / self.growth)
        inside = y * (radius / size.clamp(min=torch.finfo(y.dtype).tiny)).clamp(max=1.0)
        return Step(y + h * sde.drift(t0, inside) + diffuse(sde.diffusion(t0, inside), increment.W))
