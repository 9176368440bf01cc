"""DDPM's ancestral sampler."""

from __future__ import annotations

import math

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver

VARIANCES = ("fixed_small", "fixed_large")


class DDPM(DiffusionSolver):
    """Draws from the posterior q(x_t | x_s, x0 = D): the same as `DDIM(eta=1)` with the small variance.

    Order 1, one evaluation a step. `DPMSolverSDE(order=2)` solves the same SDE to second order.

    Args:
        variance: "fixed_small" (the posterior's) or "fixed_large" (that of the forward step, which
            takes a variance-preserving process).
    """

    card: Card = Card(
        summary="ancestral sampling from the posterior of the forward process",
        reference="Ho, Jain & Abbeel 2020 (arXiv 2006.11239), Eqs. (6), (7), Algorithm 2",
        levy="W",
        deterministic_order=1.0,
    )

    def __init__(self, variance: str = "fixed_small") -> None:
        self.variance: str = _validation.check_choice("variance", variance, VARIANCES)

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder(f"DDPM({self.variance})", sigmas)
        levels = sigmas.tolist()
        for s, t in zip(levels[:-1], levels[1:]):
            z = builder.noise(s**-2, t**-2)[0] if t > 0 else None
            D = builder.evaluate(builder.x, s)
            keep = (t / s) ** 2
            x = keep * builder.x + (1 - keep) * D
            # beta of the step is (s^2 - t^2)/(1 + s^2) and the state is x_t / alpha_t
            large = math.sqrt((s * s - t * t) * (1 + t * t) / (1 + s * s))
            small = t / s * math.sqrt(s * s - t * t)
            std = small if self.variance == "fixed_small" else large
            builder.advance(x + std * z if z is not None else x)
        return builder.finish()
