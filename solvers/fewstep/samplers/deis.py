"""DEIS: exponential integrators whose noise prediction is a polynomial in a variable of choice."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver, needs_schedule
from .exponential import OrderAt, adams_weights, weighted_sum

Coefficients = Callable[[list[float], float, Schedule | None], list[float]]
"""(levels of the evaluations, newest first; the next level; the schedule) -> weights of the evaluations."""


class DEIS(DiffusionSolver):
    r"""Adams-Bashforth of the noise prediction with a polynomial in a variable of choice.

    .. math:: x_t = x_s + \sum_j C_j\,\varepsilon_j, \qquad C_j = \int_s^t \ell_j(v(\sigma))\,d\sigma

    with $\ell_j$ Lagrange's polynomials at the last `order` levels in v.

    Order `order`, lower in the first steps, at one evaluation per step. `IPNDM` is often better below 8 evaluations,
    `UniPC(order=3)` above 13. `DEIS(2)` is `DPMSolver(2, multistep=True, solver_type="heun")`.

    Args:
        order: 1 to 4, the number of evaluations used: the paper's degree plus one.
        variable: v, one of "log_rho" (log sigma), "rho" (sigma; the paper's rhoAB), or "t" (tAB), which needs the
            schedule.
    """

    def __init__(self, order: int = 3, variable: str = "log_rho") -> None:
        self.order: int = _validation.check_int("order", order, 1, 4)
        self.variable: str = _validation.check_choice("variable", variable, ("log_rho", "rho", "t"))
        self.card: Card = Card(
            summary="Adams-Bashforth of the noise prediction, polynomial in t, sigma or log sigma",
            reference="Zhang & Chen 2022 (arXiv 2204.13902), Eqs. (15), (16)",
            deterministic_order=self.order,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        return self.plan_by(self._coefficients, lambda order, left, sigmas: order, sigmas, schedule)

    def plan_by(self, coefficients: Coefficients, order_at: OrderAt, sigmas: Tensor, schedule: Schedule | None) -> Plan:
        """The plan with other coefficients and orders than the paper's."""
        if self.variable == "t" and schedule is None:
            raise needs_schedule("DEIS", "is polynomial in model time", "DEIS(variable='rho') needs none")
        builder = PlanBuilder(f"DEIS({self.order}, {self.variable})", sigmas, "noise", rising=True)
        past: list[LinearExpr] = []  # newest first
        levels, n = builder.sigmas.tolist(), len(sigmas) - 1
        for i, (s, t) in enumerate(pairwise(levels)):
            past = [builder.evaluate(builder.x, s), *past[: self.order - 1]]
            # log 0 does not exist, t(0) has no meaning and a repeated level has no length: DDIM's step
            used = past[: order_at(self.order, n - i, sigmas) if 0 < t != s else 1]
            C = coefficients(levels[i::-1][: len(used)], t, schedule) if len(used) > 1 else [t - s]
            builder.advance(builder.x + weighted_sum(C, used))
        return builder.finish()

    def _coefficients(self, nodes: list[float], t: float, schedule: Schedule | None) -> list[float]:
        if self.variable == "rho":
            return adams_weights(nodes, nodes[0], t)
        change = torch.log if self.variable == "log_rho" or schedule is None else schedule.time
        at = change(torch.tensor(nodes, dtype=torch.float64)).tolist()
        # the integral over log sigma, in which every variable is smooth
        ends = math.log(nodes[0]), math.log(t)
        return adams_weights(at, *ends, torch.exp, lambda l: change(torch.exp(l)))
