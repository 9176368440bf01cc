"""DEIS: exponential integrators whose noise prediction is a polynomial in a variable of choice."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _validation
from ..errors import InputError
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver, needs_schedule
from .dpm_core import Ending
from .exponential import adams_weights, closed_forms
from .ipndm import composite

VARIABLES = ("log_rho", "rho", "t")


class DEIS(DiffusionSolver):
    """x' = x + sum_j C_j eps_j, C_j = int l_j d sigma, l_j Lagrange's polynomials in a chosen variable.

    One evaluation a step, `order` of them used: order `order`, lower at the start. With "t" it is tAB
    of the paper, with "rho" (sigma itself) rhoAB; "log_rho" is diffusers' choice and an exponential
    method in lambda like `DPMSolver(multistep=True)`.

    Args:
        order: 1 to 4, the number of evaluations; the paper's degree plus one, diffusers' solver_order.
        variable: "log_rho", "rho", or "t", which needs the schedule.
        form: "consistent"; "diffusers" integrates the closed forms in float32 (order 3 then stops
            converging near 1e-3) and lowers the order of the last two of fewer than 15 steps.
    """

    card: Card = Card(
        summary="Adams-Bashforth of the noise prediction, polynomial in t, sigma or log sigma",
        reference="Zhang & Chen 2022 (arXiv 2204.13902), Eqs. (15), (16)",
        deterministic_order=3.0,
    )

    def __init__(self, order: int = 3, variable: str = "log_rho", form: str = "consistent") -> None:
        _validation.check_int("order", order, 1, 4)
        _validation.check_choice("variable", variable, VARIABLES)
        _validation.check_choice("form", form, ("consistent", "diffusers"))
        if form == "diffusers" and (variable != "log_rho" or order > 3):
            raise InputError(
                f"form: got 'diffusers' with {variable!r}, order {order}; it has 'log_rho' up to 3."
            )
        self.order = order
        self.variable = variable
        self.form = form
        self.ending: Ending = Ending()

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        if self.variable == "t" and schedule is None:
            raise needs_schedule("DEIS", "is polynomial in model time", "DEIS(variable='rho') needs none")
        builder = PlanBuilder(f"DEIS({self.order}, {self.variable})", sigmas, "noise")
        past: list[tuple[LinearExpr, float]] = []  # evaluations with their sigma, newest first
        n = len(sigmas) - 1
        for i, (s, t) in enumerate(zip(sigmas.tolist()[:-1], sigmas.tolist()[1:])):
            past = [(builder.evaluate(builder.x, s), s), *past[: self.order - 1]]
            order = self.ending.order(self.order, n - i, sigmas) if self.form == "diffusers" else self.order
            # log 0 does not exist and t(0) says nothing: the step to 0 is DDIM's
            used = past[: 1 if t == 0 else order]
            C = self._coefficients([sigma for _, sigma in used], t, schedule)
            builder.advance(builder.x + composite(C, [eps for eps, _ in used]))
        return builder.finish()

    def _coefficients(self, nodes: list[float], t: float, schedule: Schedule | None) -> list[float]:
        s = nodes[0]
        if len(nodes) == 1 or t == s:
            return [t - s, *[0.0] * (len(nodes) - 1)]
        if self.form == "diffusers":
            return closed_forms(nodes, t)
        if self.variable == "rho":
            return adams_weights(nodes, s, t, lambda rho: rho.new_ones(()))
        change = torch.log if self.variable == "log_rho" or schedule is None else schedule.time
        at = change(torch.tensor(nodes, dtype=torch.float64)).tolist()
        # the integral over log sigma, in which every variable is smooth
        return adams_weights(at, math.log(s), math.log(t), torch.exp, lambda l: change(torch.exp(l)))
