"""PNDM: pseudo-numerical methods on the manifold."""

from itertools import pairwise

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import STEEP, LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver, needs_schedule
from .exponential import weighted_sum
from .ipndm import EVEN


class PNDM(DiffusionSolver):
    r"""Four-step Adams-Bashforth in DDIM steps, started by pseudo Runge-Kutta steps.

    .. math:: x_t = x_s
        + (t-s)\,\tfrac1{24}(55\varepsilon_0 - 59\varepsilon_1 + 37\varepsilon_2 - 9\varepsilon_3)

    after three steps of the classical Runge-Kutta tableau with DDIM steps for its stages. Order 2; n + 9 evaluations
    for n steps, or n + 1 with the lighter start of Stable Diffusion. `IPNDM` needs neither warm-up nor schedule and is
    better below 20 evaluations.

    Args:
        warm_up: "runge_kutta", whose stages are half way in the model's own time: the plan needs the schedule; or
            "plms", a Heun step followed by rising orders.
    """

    card: Card = Card(
        summary="pseudo linear multistep of the noise prediction, pseudo Runge-Kutta at the start",
        reference="Liu et al. 2022 (arXiv 2202.09778), Algorithm 2, Eqs. (12), (13)",
        deterministic_order=2,
    )

    def __init__(self, warm_up: str = "runge_kutta") -> None:
        self.warm_up: str = _validation.check_choice("warm_up", warm_up, ("runge_kutta", "plms"))

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        if self.warm_up == "runge_kutta" and schedule is None:
            raise needs_schedule("PNDM", "has stages half way in model time", "PNDM('plms') needs none")
        builder = PlanBuilder(f"PNDM({self.warm_up})", sigmas, "noise", rising=True)
        past: list[LinearExpr] = []
        for i, (s, t) in enumerate(pairwise(builder.sigmas)):
            e1 = builder.evaluate(builder.x, s)
            past = [e1, *past[:3]]
            steep = bool(s > STEEP * t)  # to 0 above all: a step of order 1
            if i < 3 and self.warm_up == "runge_kutta" and not steep and schedule is not None:
                x, m = builder.x, schedule.sigma((schedule.time(s) + schedule.time(t)) / 2)
                e2 = builder.evaluate(x + (m - s) * e1, m)
                e3 = builder.evaluate(x + (m - s) * e2, m)
                e4 = builder.evaluate(x + (t - s) * e3, t)
                direction = (e1 + 2 * e2 + 2 * e3 + e4) / 6  # Eq. (13)
            elif i == 0 and not steep:
                direction = (e1 + builder.evaluate(builder.x + (t - s) * e1, t)) / 2
            else:
                direction = weighted_sum(EVEN[len(past) - 1], past)
            builder.advance(builder.x + float(t - s) * direction)
        return builder.finish()
