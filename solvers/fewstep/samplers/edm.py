"""EDM's samplers: Euler's and Heun's method in sigma, with optional churn."""

from __future__ import annotations

import math

from torch import Tensor

from .. import _validation
from ..errors import InputError
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver


class _Churned(DiffusionSolver):
    """What both methods share: the options, and the noise that raises the level before a step."""

    def __init__(
        self, churn: float = 0.0, churn_min: float = 0.0, churn_max: float = math.inf, noise: float = 1.0
    ) -> None:
        for name, value in (("churn", churn), ("churn_min", churn_min), ("noise", noise)):
            _validation.check_float(name, value)
        if not (isinstance(churn_max, (int, float)) and churn_min <= churn_max and min(churn, noise) >= 0):
            raise InputError(
                f"churn: got churn={churn!r} in [{churn_min!r}, {churn_max!r}], noise={noise!r}; expected "
                "numbers >= 0 and churn_min <= churn_max."
            )
        self.churn = churn
        self.churn_min = churn_min
        self.churn_max = churn_max
        self.noise = noise

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        name = type(self).__name__ + (f"(churn={self.churn:g})" if self.churn else "")
        builder = PlanBuilder(name, sigmas)
        gamma = min(self.churn / (len(sigmas) - 1), math.sqrt(2) - 1)
        for s, t in zip(sigmas.tolist()[:-1], sigmas.tolist()[1:]):
            x = builder.x
            if gamma > 0 and self.churn_min <= s <= self.churn_max:
                (z,) = builder.noise(0, 0)
                x = x + self.noise * s * math.sqrt((1 + gamma) ** 2 - 1) * z
                s = s * (1 + gamma)
            builder.advance(self._step(builder, x, s, t))
        return builder.finish()

    def _step(self, builder: PlanBuilder, x: LinearExpr, s: float, t: float) -> LinearExpr:
        raise NotImplementedError


class EDMEuler(_Churned):
    """Euler's method for dx/dsigma = (x - D)/sigma: DDIM's step, with churn on request.

    Order 1, one evaluation a step. `EDMHeun` has order 2 at two, `DPMSolverPP(order=2)` at one. Churn
    raises the noise level before each step by fresh noise, which belongs to no path.

    Args:
        churn: S_churn, shared among the steps; 0 is deterministic.
        churn_min, churn_max: the levels between which it acts.
        noise: S_noise, the size of the fresh noise.
    """

    card: Card = Card(
        summary="Euler's method in sigma with churn",
        reference="Karras et al. 2022 (arXiv 2206.00364), Algorithm 2 without its correction",
        deterministic_order=1.0,
    )

    def _step(self, builder: PlanBuilder, x: LinearExpr, s: float, t: float) -> LinearExpr:
        return t / s * x + (1 - t / s) * builder.evaluate(x, s)


class EDMHeun(_Churned):
    """Heun's method for dx/dsigma = (x - D)/sigma, an Euler step to sigma = 0.

    Order 2, two evaluations a step (2n - 1 in all when the grid ends in 0). At few evaluations the
    one-evaluation `DPMSolverPP(order=2)` and `UniPC` are better. Churn raises the noise level before
    each step by fresh noise, which belongs to no path.

    Args:
        churn: S_churn, shared among the steps; 0 is deterministic.
        churn_min, churn_max: the levels between which it acts.
        noise: S_noise, the size of the fresh noise.
    """

    card: Card = Card(
        summary="Heun's method in sigma with churn",
        reference="Karras et al. 2022 (arXiv 2206.00364), Algorithm 2",
        deterministic_order=2.0,
        evaluations=2,
    )

    def _step(self, builder: PlanBuilder, x: LinearExpr, s: float, t: float) -> LinearExpr:
        D = builder.evaluate(x, s)
        d = (x - D) / s
        euler = x + (t - s) * d
        if t == 0:
            return D
        d_next = (euler - builder.evaluate(euler, t)) / t
        return x + (t - s) * 0.5 * (d + d_next)
