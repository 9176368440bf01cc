"""EDM's samplers: Euler's and Heun's method in sigma, with optional churn."""

import math
from abc import abstractmethod
from itertools import pairwise

from torch import Tensor

from .. import _validation
from ..errors import InputError
from ..plan import Plan
from ..plan_builder import STEEP, LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver


class _Churned(DiffusionSolver):
    """What both methods share: the options, and the noise that raises the level before a step."""

    summary: str
    reference: str
    evaluations: int

    def __init__(
        self, churn: float = 0.0, churn_min: float = 0.0, churn_max: float = math.inf, noise: float = 1.0
    ) -> None:
        self.churn: float = _validation.check_float("churn", churn, 0, expected="a number of at least 0")
        self.churn_min: float = _validation.check_float("churn_min", churn_min)
        if not (isinstance(churn_max, (int, float)) and churn_min <= churn_max):
            raise InputError(f"churn_max: got {churn_max!r}, expected a number of at least churn_min={churn_min!r}.")
        self.churn_max = churn_max
        self.noise: float = _validation.check_float("noise", noise, 0, expected="a number of at least 0")
        self.card: Card = Card(
            summary=self.summary,
            reference=self.reference,
            levy="W" if churn else "",
            deterministic_order=None if churn else self.evaluations,
            evaluations=self.evaluations,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        name = type(self).__name__ + (f"(churn={self.churn:g})" if self.churn else "")
        builder = PlanBuilder(name, sigmas, rising=self.churn == 0)
        gamma = min(self.churn / (len(sigmas) - 1), math.sqrt(2) - 1)
        for s, t in pairwise(builder.sigmas.tolist()):
            x = builder.x
            if gamma > 0 and self.churn_min <= s <= self.churn_max:
                (z,) = builder.noise(0, 0)
                x = x + self.noise * s * math.sqrt((1 + gamma) ** 2 - 1) * z
                s = s * (1 + gamma)
            builder.advance(self._step(builder, x, s, t))
        return builder.finish()

    @abstractmethod
    def _step(self, builder: PlanBuilder, x: LinearExpr, s: float, t: float) -> LinearExpr:
        """The state at level t from x at level s."""


class EDMEuler(_Churned):
    r"""Euler's method for $dx/d\sigma = (x - D)/\sigma$, with optional churn: DDIM's step without it.

    .. math:: x_t = x_s + (t - s)\,\frac{x_s - D}{s} = \frac ts\,x_s + \Big(1 - \frac ts\Big) D

    Order 1 without churn, one evaluation per step. `EDMHeun` has order 2 at two, `DPMSolverPP(order=2)` at one. Churn
    raises the noise level before each step to $(1+\gamma)s$, $\gamma = \min(\text{churn}/n, \sqrt2-1)$, by fresh
    noise, which belongs to no path.

    Args:
        churn: S_churn, divided among the n steps; 0 is deterministic.
        churn_min, churn_max: the levels between which it acts.
        noise: S_noise, the size of the fresh noise.
    """

    summary = "Euler's method in sigma with churn"
    reference = "Karras et al. 2022 (arXiv 2206.00364), Algorithm 2 without its correction"
    evaluations = 1

    def _step(self, builder: PlanBuilder, x: LinearExpr, s: float, t: float) -> LinearExpr:
        return t / s * x + (1 - t / s) * builder.evaluate(x, s)


class EDMHeun(_Churned):
    r"""Heun's method for $dx/d\sigma = (x - D)/\sigma$, with optional churn and an Euler step to 0.

    .. math:: x_t = x_s + \frac{t-s}2\Big(\frac{x_s - D(x_s, s)}s + \frac{x_E - D(x_E, t)}t\Big)

    with $x_E$ the result of `EDMEuler`. Order 2 without churn, two evaluations per step (2n - 1 in all when the grid
    ends in 0). At few evaluations the one-evaluation `DPMSolverPP(order=2)` and `UniPC` are better.

    Args:
        churn, churn_min, churn_max, noise: as for `EDMEuler`.
    """

    steep = STEEP
    """Steps over a larger factor in sigma are Euler's."""

    summary = "Heun's method in sigma with churn"
    reference = "Karras et al. 2022 (arXiv 2206.00364), Algorithm 2"
    evaluations = 2

    def _step(self, builder: PlanBuilder, x: LinearExpr, s: float, t: float) -> LinearExpr:
        D = builder.evaluate(x, s)
        if t == 0 or s > self.steep * t:  # the second slope does not exist at 0
            return t / s * x + (1 - t / s) * D
        slope = (x - D) / s
        euler = x + (t - s) * slope
        return x + (t - s) * 0.5 * (slope + (euler - builder.evaluate(euler, t)) / t)
