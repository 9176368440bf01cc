"""DDIM, from deterministic to ancestral."""

import math
from itertools import pairwise

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .exponential import path_noise


class DDIM(DiffusionSolver):
    r"""The exponential Euler step, deterministic to ancestral.

    .. math:: x_t = \kappa\,x_s + (1-\kappa)\,D + v\,z, \qquad
        v = \eta\,\frac ts\sqrt{s^2-t^2},\ \kappa = \frac{\sqrt{t^2-v^2}}{s}

    Order 1, one evaluation per step; DPM-Solver and DPM-Solver++ of order 1 are the same step. `DPMSolverPP(order=2)`
    costs no more and has order 2. z is the normal of the path in 1/sigma^2; eta = 1 equals `DDPM` and `EulerMaruyama`.

    Args:
        eta: the share of the ancestral noise, in [0, 1].
    """

    def __init__(self, eta: float = 0.0) -> None:
        self.eta: float = _validation.check_float("eta", eta, 0, 1, "a number in [0, 1]")
        self.card: Card = Card(
            summary="exponential Euler step of the probability-flow ODE, plus eta of the ancestral noise",
            reference="Song, Meng & Ermon 2021 (arXiv 2010.02502), Eqs. (12), (16)",
            levy="W" if self.eta else "",
            deterministic_order=1,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder(f"DDIM(eta={self.eta:g})", sigmas, rising=self.eta == 0)
        for s, t in pairwise(builder.sigmas.tolist()):
            v = self.eta * t / s * math.sqrt(max(s * s - t * t, 0.0))
            noise = path_noise(builder, s, t, v)
            keep = math.sqrt(max(t * t - v * v, 0.0)) / s
            builder.advance(keep * builder.x + (1 - keep) * builder.evaluate(builder.x, s) + noise)
        return builder.finish()
