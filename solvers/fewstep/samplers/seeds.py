"""SEEDS: exponential Runge-Kutta for the reverse SDE in noise prediction."""

from __future__ import annotations

import math

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .exponential import ExponentialStep


class SEEDS(DiffusionSolver):
    """One, two or three stages at even distances in lambda, each with the noise of its own part of the path.

    `order` evaluations a step; the flow part has that order. Re-derived with noise that is consistent
    between the stages; the released third-order code is not, and its variance is off by several times.
    `ShARK` has the higher strong order at two evaluations; `DPMSolverSDE` costs one.

    Args:
        order: 1, 2 (r = 1/2) or 3 (r = 1/3, 2/3).
    """

    card: Card = Card(
        summary="exponential Runge-Kutta of the noise prediction for the reverse SDE",
        reference="Gonzalez et al. 2023 (arXiv 2305.14267), Algorithms 1 to 4, their noise re-derived",
        levy="W",
        deterministic_order=3.0,
        evaluations=3,
    )

    def __init__(self, order: int = 3) -> None:
        _validation.check_int("order", order, 1, 3)
        self.order = order

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder(f"SEEDS({self.order})", sigmas, "noise")
        levels = sigmas.tolist()
        for s, t in zip(levels[:-1], levels[1:]):
            if t == 0:
                builder.advance(builder.x - s * builder.evaluate(builder.x, s))
                continue
            x, noise, stages = builder.x, None, list[LinearExpr]()
            nodes = [s * (t / s) ** (k / self.order) for k in range(self.order)] + [t]
            for k, (u, v) in enumerate(zip(nodes[:-1], nodes[1:])):
                (z,) = builder.noise(u**-2, v**-2)
                stages.append(builder.evaluate(self._to(k, x, stages, s, t, u, noise), u))
                # variances add in sigma^2: sigma^2(s) - sigma^2(v) by the time that v is reached
                fresh = math.sqrt(u * u - v * v) * z
                noise = fresh if noise is None else noise + fresh
            builder.advance(self._to(self.order, x, stages, s, t, t, noise))
        return builder.finish()

    def _to(
        self,
        k: int,
        x: LinearExpr,
        e: list[LinearExpr],
        s: float,
        t: float,
        v: float,
        noise: LinearExpr | None,
    ) -> LinearExpr:
        """Stage k at level v, along the slope of the newest stage; twice the ODE's drift, plus noise."""
        if k == 0 or noise is None:
            return x
        step = ExponentialStep(s, v, "noise")
        e0, e1, _ = step.weights()
        drift = e0 * e[0]
        if k > 1:
            # SEEDS-2 ends with expm1(h)/(2r) in place of phi_2, as DPM-Solver-2 does
            weight = e0 / 2 if self.order == 2 else e1
            ratio = math.log(s / v) / math.log(s / t) * self.order / (k - 1)
            drift = drift + weight * ratio * (e[k - 1] - e[0])
        return x + 2 * v * drift + noise
