"""ER-SDE-Solver: reverse SDEs of any noise, integrated by a weight function of sigma."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .exponential import History, adams_weights, order_before_zero, path_noise, weighted_sum


class ERSDE(DiffusionSolver):
    r"""Adams-Bashforth of the denoiser in sigma, weighted by the noise of the extended reverse SDE.

    .. math:: x_t = \frac{\phi(t)}{\phi(s)}\,x_s + \phi(t) \int_s^t D\,d\,\frac1{\phi(\sigma)} + v\,z, \qquad
        v^2 = t^2 - s^2\,\frac{\phi(t)^2}{\phi(s)^2}, \quad \phi(\sigma) = \sigma\,(e^{\sigma^{0.3}} + 10)

    with D a polynomial in sigma through earlier evaluations and z the normal of the path in 1/sigma^2. phi is the
    function that the paper recommends. Below sigma = 98 it adds less noise than phi = sigma^2, which gives the reverse
    SDE; phi = sigma gives the probability-flow ODE, without noise.

    One evaluation per step. Order `order` of the drift, lower in the first steps and before a last level of 0. Released
    codes take a backward difference for the first derivative of order 3, which leaves order 2.

    Args:
        order: 1, 2 or 3.
    """

    def __init__(self, order: int = 3) -> None:
        self.order: int = _validation.check_int("order", order, 1, 3)
        self.card: Card = Card(
            summary="Adams-Bashforth of the denoiser in sigma for the extended reverse SDE",
            reference="Cui et al. 2023 (arXiv 2309.06169), Eqs. (12) to (17), its integrals by quadrature",
            levy="W",
            deterministic_order=self.order,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder(f"ERSDE({self.order})", sigmas)
        past: History = []
        n = len(sigmas) - 1
        for i, (s, t) in enumerate(pairwise(builder.sigmas.tolist())):
            if t == 0:
                builder.advance(builder.evaluate(builder.x, s))
                break
            keep = math.exp(float(_log_phi(torch.tensor(t)) - _log_phi(torch.tensor(s))))
            noise = path_noise(builder, s, t, math.sqrt(max(t * t - (s * keep) ** 2, 0.0)))
            past = [(builder.evaluate(builder.x, s), s), *past[: self.order - 1]]
            used = past[: order_before_zero(self.order, n - i, sigmas)]
            builder.advance(keep * builder.x + _integral(used, s, t, keep) + noise)
        return builder.finish()


def _log_phi(sigma: Tensor) -> Tensor:
    s = sigma.double()
    return s.log() + torch.logaddexp(s**0.3, s.new_tensor(math.log(10)))


def _integral(used: History, s: float, t: float, keep: float) -> LinearExpr:
    """phi(t) int_s^t D d(1/phi), in log sigma; `keep` = phi(t)/phi(s), so the weights add up to 1 - keep."""
    end = _log_phi(torch.tensor(t))

    def kernel(u: Tensor) -> Tensor:
        sigma = u.exp()
        slope = 1 + 0.3 * sigma**0.3 * torch.sigmoid(sigma**0.3 - math.log(10))  # of log phi in log sigma
        return -torch.exp(end - _log_phi(sigma)) * slope

    weights = adams_weights([level for _, level in used], math.log(s), math.log(t), kernel, torch.exp)
    weights[0] += 1 - keep - sum(weights)  # exact where D does not change, over the longest steps
    return weighted_sum(weights, [D for D, _ in used])
