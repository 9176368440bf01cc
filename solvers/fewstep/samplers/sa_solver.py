"""SA-Solver: stochastic Adams predictor and corrector."""

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .. import _validation
from ..errors import InputError
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .exponential import ExponentialStep, History, adams_weights, order_before_zero, path_noise, weighted_sum


class SASolver(DiffusionSolver):
    r"""Exponential Adams-Bashforth predictor and Adams-Moulton corrector of the reverse SDE of size tau.

    .. math:: x_t = \Big(\frac ts\Big)^r x_s
        + \sum_j D_j \int_{\lambda_s}^{\lambda_t} r\,e^{r(l-\lambda_t)}\,\ell_j(l)\,dl
        + t\sqrt{1-e^{-2\tau^2h}}\,z, \qquad r = 1+\tau^2

    with $\ell_j$ Lagrange's polynomials in lambda and z the normal of the path in 1/sigma^2.

    One evaluation per step, made at the predicted point and reused by the corrector. tau = 0 is the probability-flow
    ODE, tau = 1 the reverse SDE, where order 2 without corrector is `DPMSolverSDE(2, solver_type="heun")`. The order
    of the drift is min(order + 1, corrector), or `order` without corrector; along a path the strong order is 1. With
    `pece` the corrected point is evaluated again, two evaluations per step.

    Args:
        order: 1 to 4, evaluations used by the predictor; the paper: 3 unconditional, 2 under guidance.
        corrector: 0 (none) to 4, evaluations used by the corrector, the one at the predicted point included.
        tau: the size of the noise in steps whose first level is in `between`; 0 in others.
        between: (low, high) levels with noise.
        pece: evaluate again at the corrected point (ComfyUI's `sa_solver_pece`).
    """

    def __init__(
        self, order: int = 3, corrector: int = 3, tau: float = 1.0, between: tuple[float, float] = (0.05, 1.0),
        pece: bool = False,
    ) -> None:  # fmt: skip
        pair = _validation.check_sequence("between", between, "two levels (low, high)")
        if len(pair) != 2 or not all(isinstance(v, (int, float)) for v in pair) or not pair[0] <= pair[1]:
            raise InputError(f"between: got {between!r}, expected two levels (low, high).")
        self.order: int = _validation.check_int("order", order, 1, 4)
        self.corrector: int = _validation.check_int("corrector", corrector, 0, 4)
        self.tau: float = _validation.check_float("tau", tau, 0, expected="a number of at least 0")
        self.between = between
        _validation.check_instance("pece", pece, bool, "True or False")
        if pece and not corrector:
            raise InputError("pece: got True without corrector, expected a corrector of order 1 to 4.")
        self.pece = pece
        self.card: Card = Card(
            summary="exponential Adams predictor and corrector for the reverse SDE of any size",
            reference="Xue et al. 2023 (arXiv 2309.05019), Algorithm 1, Eqs. (14), (17)",
            levy="W" if self.tau else "",
            deterministic_order=min(self.order + 1, self.corrector) if self.corrector else self.order,
            evaluations=1 + pece,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        name = f"SASolver({self.order}, {self.corrector}, tau={self.tau:g})"
        builder = PlanBuilder(name, sigmas, rising=self.tau == 0)
        past: History = []
        predicted, step, n = builder.x, None, len(sigmas) - 1
        for i, (s, t) in enumerate(pairwise(builder.sigmas.tolist())):
            tau = self.tau if self.between[0] <= s <= self.between[1] and t > 0 else 0.0
            frozen = ExponentialStep(s, t, "data", tau**2) if t > 0 else None
            noise = path_noise(builder, s, t, frozen.noise if frozen else 0.0)
            D = builder.evaluate(predicted, s)
            past = [(D, -math.log(s)), *past[:3]]
            # the corrector repeats the last step with one evaluation more and the same noise
            x = builder.advance(step(past[: self.corrector]) if step and self.corrector else predicted)
            if step and self.pece:
                D = builder.evaluate(x, s)
                past[0] = (D, -math.log(s))
            if frozen is None:
                builder.advance(D)
                break
            step = partial(_adams, frozen.scale * x + noise, frozen)
            predicted = step(past[: order_before_zero(self.order, n - i, sigmas)])
        else:
            builder.advance(predicted)
        return builder.finish()


def _adams(base: LinearExpr, step: ExponentialStep, used: History) -> LinearExpr:
    """The end of a step through any evaluations: past ones predict, the next one corrects."""
    rate, start, end = 1 + step.eta, -math.log(step.s), -math.log(step.t)
    weights = adams_weights([l for _, l in used], start, end, lambda l: rate * torch.exp(rate * (l - end)))
    return base + weighted_sum(weights, [D for D, _ in used])
