"""PNDM: pseudo-numerical methods on the manifold."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver, needs_schedule
from . import diffusers_compat
from .ipndm import EVEN, composite

WARM_UPS = ("runge_kutta", "plms")


class PNDM(DiffusionSolver):
    """Four-step Adams-Bashforth in DDIM steps, started by three pseudo Runge-Kutta steps.

    n + 9 evaluations for n steps ("runge_kutta"), n + 1 with the lighter start ("plms", a Heun step and
    rising orders: Stable Diffusion's). Order 2. `IPNDM` needs no warm-up and no schedule, and is the
    better buy below 20 evaluations.

    Args:
        warm_up: "runge_kutta" or "plms". The Runge-Kutta steps look half way in the model's own time,
            so that their plan needs the schedule.
        form: "consistent", or "diffusers", which steps by N // n labels whatever the grid; it differs
            where the grid has another stride, and it too needs the schedule.
        combine: of form "diffusers": "epsilon", or "v_prediction", for networks of v it combines v.
    """

    card: Card = Card(
        summary="pseudo linear multistep of the noise prediction, pseudo Runge-Kutta at the start",
        reference="Liu et al. 2022 (arXiv 2202.09778), Algorithm 2, Eqs. (12), (13)",
        deterministic_order=2.0,
    )

    def __init__(
        self, warm_up: str = "runge_kutta", form: str = "consistent", combine: str = "epsilon"
    ) -> None:
        self.warm_up: str = _validation.check_choice("warm_up", warm_up, WARM_UPS)
        self.form: str = _validation.check_choice("form", form, ("consistent", "diffusers"))
        self.combine: str = _validation.check_choice("combine", combine, ("epsilon", "v_prediction"))

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        if self.form == "diffusers":
            return diffusers_compat.pndm(self.warm_up, sigmas, schedule, self.combine)
        if self.warm_up == "runge_kutta" and schedule is None:
            raise needs_schedule("PNDM", "looks half way in model time", "PNDM('plms') needs none")
        builder = PlanBuilder(f"PNDM({self.warm_up})", sigmas, "noise")
        past: list[LinearExpr] = []
        for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            e1 = builder.evaluate(builder.x, s)
            past = [e1, *past[:3]]
            if i < 3 and self.warm_up == "runge_kutta" and t > 0 and schedule is not None:
                middle = schedule.sigma((schedule.time(s) + schedule.time(t)) / 2)
                direction = _runge_kutta(builder, e1, s, middle, t)
            elif i == 0 and t > 0:
                direction = (e1 + builder.evaluate(builder.x + (t - s) * e1, t)) / 2
            else:
                direction = composite(EVEN[len(past) - 1], past)
            builder.advance(builder.x + float(t - s) * direction)
        return builder.finish()


def _runge_kutta(builder: PlanBuilder, e1: LinearExpr, s: Tensor, m: Tensor, t: Tensor) -> LinearExpr:
    """Eq. (13): the classical tableau with DDIM steps for its stages."""
    x = builder.x
    m = torch.as_tensor(m)
    e2 = builder.evaluate(x + (m - s) * e1, m)
    e3 = builder.evaluate(x + (m - s) * e2, m)
    e4 = builder.evaluate(x + (t - s) * e3, t)
    return (e1 + 2 * e2 + 2 * e3 + e4) / 6
