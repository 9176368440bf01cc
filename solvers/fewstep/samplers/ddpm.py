"""DDPM's ancestral sampler."""

import math
from itertools import pairwise

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .exponential import path_noise

VARIANCES = ("fixed_small", "fixed_large")


class DDPM(DiffusionSolver):
    r"""Ancestral sampling from the posterior $q(x_t \mid x_s, x_0 = D)$.

    .. math:: x_t = \Big(\frac ts\Big)^2 x_s + \Big(1 - \frac{t^2}{s^2}\Big) D + v\,z, \qquad
        v = \frac ts\sqrt{s^2 - t^2}

    Order 1, one evaluation per step; the small variance is `DDIM(eta=1)`. `DPMSolverSDE(order=2)` solves the same SDE
    to second order.

    Args:
        variance: "fixed_small", the posterior's, as above; or "fixed_large", that of the forward step of a
            variance-preserving process, $v^2 = (s^2-t^2)(1+t^2)/(1+s^2)$.
    """

    card: Card = Card(
        summary="ancestral sampling from the posterior of the forward process",
        reference="Ho, Jain & Abbeel 2020 (arXiv 2006.11239), Eqs. (6), (7), Algorithm 2",
        levy="W",
        deterministic_order=1,
    )

    def __init__(self, variance: str = "fixed_small") -> None:
        self.variance: str = _validation.check_choice("variance", variance, VARIANCES)

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder(f"DDPM({self.variance})", sigmas)
        for s, t in pairwise(builder.sigmas.tolist()):
            # beta of the step is (s^2 - t^2)/(1 + s^2) and the state is x_t / alpha_t
            beta = (s * s - t * t) / (1 + s * s)
            v = t / s * math.sqrt(s * s - t * t) if self.variance == "fixed_small" else math.sqrt(beta * (1 + t * t))
            noise = path_noise(builder, s, t, v if t > 0 else 0.0)
            keep = (t / s) ** 2
            builder.advance(keep * builder.x + (1 - keep) * builder.evaluate(builder.x, s) + noise)
        return builder.finish()
