"""SEEDS: exponential Runge-Kutta for the reverse SDE in noise prediction."""

import math
from itertools import pairwise

from torch import Tensor

from .. import _validation
from ..errors import warn
from ..plan import Plan
from ..plan_builder import STEEP, LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .exponential import ExponentialStep, path_noise

LONGEST = 0.8  # step in log sigma: unit data then come out with a standard deviation of 1.1 to 1.7


class SEEDS(DiffusionSolver):
    r"""One, two or three stages even in lambda, each with the noise of its own part of the path.

    .. math:: x_v = x_s + 2v\,\big(\varphi_0\,\varepsilon_0 + \varphi_1\,(\varepsilon_k - \varepsilon_0)\big)
        + \sum_k \sqrt{u_k^2 - u_{k+1}^2}\,z_k

    at each level v from s to t: twice the drift of the probability-flow ODE, plus the noise up to v.

    `order` evaluations per step; the drift has that order, a path is followed with strong order 1. The noise is
    re-derived so that it agrees between the stages; in the released third-order code it does not, and the variance is
    off by several times. `ShARK` has the higher strong order at two evaluations; `DPMSolverSDE` costs one.

    Unstable in long steps: `plan` warns where log(s/t) exceeds 0.8, as on the default grids below 12 to 15 steps. The
    samples then spread beyond the data, at 8 steps by a factor of 7 to 170. `ShARK`, `DPMSolverSDE` are stable there.

    Args:
        order: 1, 2 (r = 1/2) or 3 (r = 1/3, 2/3).
    """

    warns = True

    def __init__(self, order: int = 3) -> None:
        self.order: int = _validation.check_int("order", order, 1, 3)
        self.card: Card = Card(
            summary="exponential Runge-Kutta of the noise prediction for the reverse SDE",
            reference="Gonzalez et al. 2023 (arXiv 2305.14267), Algorithms 1 to 4, their noise re-derived",
            levy="W",
            deterministic_order=self.order,
            evaluations=self.order,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder(f"SEEDS({self.order})", sigmas)
        longest = max((math.log(s / t) for s, t in pairwise(builder.sigmas.tolist()) if s <= STEEP * t), default=0.0)
        if longest > LONGEST:
            warn(
                f"SEEDS is unstable on this grid: its longest step is {longest:.2g} in log sigma, and above {LONGEST} "
                "the samples spread beyond the data. Take more steps (at least 12 to 15 on the default grids), or "
                "DPMSolverSDE()."
            )
        for s, t in pairwise(builder.sigmas.tolist()):
            if s > STEEP * t:  # to 0 above all; DDIM(eta=1), exact where the estimate of x0 does not change
                noise = path_noise(builder, s, t, t * math.sqrt(1 - (t / s) ** 2))
                keep = (t / s) ** 2
                builder.advance(keep * builder.x + (1 - keep) * builder.evaluate(builder.x, s) + noise)
                continue
            stages: list[LinearExpr] = []
            x, noise = builder.x, LinearExpr({})
            for u, v in pairwise([*(s * (t / s) ** (k / self.order) for k in range(self.order)), t]):
                # variances add in sigma^2: sigma^2(s) - sigma^2(v) by the time that v is reached
                noise = noise + path_noise(builder, u, v, math.sqrt(u * u - v * v))
                # written with D: the noise (x - D)/u loses digits where u is large
                stages.append((x - builder.evaluate(x, u)) / u)
                x = builder.x + 2 * v * self._drift(stages, s, t, v) + noise
            builder.advance(x)
        return builder.finish()

    def _drift(self, e: list[LinearExpr], s: float, t: float, v: float) -> LinearExpr:
        """The integral of eps from s to v over v, along the slope of the newest stage."""
        e0, e1, _ = ExponentialStep(s, v, "noise").weights()
        k = len(e)
        if k == 1:
            return e0 * e[0]
        # SEEDS-2 ends with expm1(h)/(2r) in place of phi_2, as DPM-Solver-2 does
        weight = e0 / 2 if self.order == 2 else e1
        ratio = math.log(s / v) / math.log(s / t) * self.order / (k - 1)
        return e0 * e[0] + weight * ratio * (e[k - 1] - e[0])
