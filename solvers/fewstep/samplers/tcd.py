"""Strategic stochastic sampling of trajectory consistency distillation: TCD."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver, needs_schedule
from .exponential import path_noise


class TCD(DiffusionSolver):
    r"""A DDIM step past the next level, and fresh noise back to it.

    .. math:: x_t = D + \frac us (x_s - D) + \sqrt{t^2 - u^2}\,z, \qquad
        \operatorname{time}(u) = (1 - \gamma)\operatorname{time}(t)

    with z the normal of the path in 1/sigma^2 from level s to t, independent of all earlier noise; the last step adds
    none. The time of u is rounded down to a label where the schedule has labels. gamma = 0 is `DDIM`, and gamma = 1 is
    `LCM` but for the noise of label 0. For networks that were distilled so (TCD checkpoints); their grids end at label
    0, `final="sigma_min"`.

    Args:
        gamma: the share of the way that noise goes back, in [0, 1]; `eta` in diffusers.
    """

    def __init__(self, gamma: float = 0.3) -> None:
        self.gamma: float = _validation.check_float("gamma", gamma, 0, 1, "a number in [0, 1]")
        self.card: Card = Card(
            summary="DDIM step past the next level and fresh noise back, for trajectory consistency distillation",
            reference="Zheng et al. 2024 (arXiv 2402.19159), Algorithm 4",
            levy="W" if self.gamma else "",
            deterministic_order=None if self.gamma else 1,
            consistency=self.gamma > 0,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder(f"TCD(gamma={self.gamma:g})", sigmas)
        levels = builder.sigmas.tolist()
        for i, (s, t) in enumerate(pairwise(levels), 1):
            u = t if i == len(levels) - 1 else self._past(t, schedule)
            noise = path_noise(builder, s, t, math.sqrt(t * t - u * u))
            builder.advance(u / s * builder.x + (1 - u / s) * builder.evaluate(builder.x, s) + noise)
        return builder.finish()

    def _past(self, t: float, schedule: Schedule | None) -> float:
        """The level at (1 - gamma) of the time of level t."""
        if self.gamma == 0:
            return t
        if schedule is None and self.gamma == 1:
            return 0.0
        if schedule is None:
            raise needs_schedule("TCD", "counts in model time", "TCD(0) and TCD(1) need none")
        time = (1 - self.gamma) * schedule.time(torch.tensor([t], dtype=torch.float64))
        # a label that rounding has put just below an integer is that integer
        return min(t, float(schedule.sigma((time + 1e-9).floor() if schedule.labels is not None else time)))
