"""Gradient estimation: Euler steps along an extrapolated noise prediction."""

from itertools import pairwise

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver


class GradientEstimation(DiffusionSolver):
    r"""Euler steps along a weighted difference of the last two noise predictions.

    .. math:: x_t = x_s + (t-s)\big(\gamma\,\varepsilon_0 - (\gamma - 1)\,\varepsilon_1\big)

    newest first; the first step and the step to 0 have $\varepsilon_0$ alone. One evaluation per step. Order 1, but
    `gamma=1.5` is `IPNDM(2)`, of order 2 on even grids, and `gamma=1` is `DDIM`. It is ComfyUI's
    `gradient_estimation`. `IPNDM`, `DEIS` and `UniPC` are more accurate.

    Args:
        gamma: the weight of the newest prediction.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        self.gamma: float = _validation.check_float("gamma", gamma)
        self.card: Card = Card(
            summary="Euler steps along an extrapolated noise prediction",
            reference="Permenter & Yuan 2024 (arXiv 2306.04848), Algorithm 2",
            deterministic_order=2 if self.gamma == 1.5 else 1,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder(f"GradientEstimation({self.gamma:g})", sigmas, "noise", rising=True)
        last = None
        for s, t in pairwise(builder.sigmas.tolist()):
            newest = builder.evaluate(builder.x, s)
            change = (t - s) * newest
            if last is not None and t > 0:
                change = change + (t - s) * (self.gamma - 1) * (newest - last)
            builder.advance(builder.x + change)
            last = newest
        return builder.finish()
