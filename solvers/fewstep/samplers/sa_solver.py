"""SA-Solver: stochastic Adams predictor and corrector."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _validation
from ..errors import InputError
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .exponential import ExponentialStep, adams_weights


class SASolver(DiffusionSolver):
    """Exponential Adams-Bashforth predictor and Adams-Moulton corrector of the reverse SDE of size tau.

    One evaluation a step, made at the predicted point and reused. tau = 0 is the flow, tau = 1 the
    reverse SDE; there order 2 without corrector is `DPMSolverSDE(2, solver_type="heun")`. Orders are
    those of the drift; along a path the strong order is 1.

    Args:
        order: 1 to 4, evaluations used by the predictor; the paper: 3 unconditional, 2 under guidance.
        corrector: 0 (none) to 4, evaluations used by the corrector, the predicted one among them.
        tau: the size of the noise where sigma is in `between`, 0 elsewhere.
        between: (low, high) levels with noise.
    """

    card: Card = Card(
        summary="exponential Adams predictor and corrector for the reverse SDE of any size",
        reference="Xue et al. 2023 (arXiv 2309.05019), Algorithm 1, Eqs. (14), (17)",
        levy="W",
        deterministic_order=3.0,
    )

    def __init__(
        self, order: int = 3, corrector: int = 3, tau: float = 1.0,
        between: tuple[float, float] = (0.05, 1.0),
    ) -> None:  # fmt: skip
        if len(_validation.check_sequence("between", between, "two levels (low, high)")) != 2:
            raise InputError(f"between: got {between!r}, expected two levels (low, high).")
        low, high = between
        if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and low <= high):
            raise InputError(f"between: got {between!r}, expected two levels (low, high).")
        self.order: int = _validation.check_int("order", order, 1, 4)
        self.corrector: int = _validation.check_int("corrector", corrector, 0, 4)
        self.tau: float = _validation.check_float("tau", tau, 0, expected="a number of at least 0")
        self.between = between

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder(f"SASolver({self.order}, {self.corrector}, tau={self.tau:g})", sigmas)
        past: list[tuple[LinearExpr, float]] = []  # evaluations with their lambda, newest first
        predicted, move, levels = builder.x, None, sigmas.tolist()
        for i, (s, t) in enumerate(zip(levels[:-1], levels[1:])):
            low, high = self.between
            tau = self.tau if low <= s <= high and t > 0 else 0.0
            z = builder.noise(s**-2, t**-2)[0] if tau > 0 else None
            D = builder.evaluate(predicted, s)
            past = [(D, -math.log(s)), *past[:3]]
            # the corrector repeats the last step with one evaluation more and the same noise
            x = builder.advance(move(past[: self.corrector]) if move and self.corrector else predicted)
            if t == 0:
                builder.advance(D)
                break
            move = _Move(x, ExponentialStep(s, t, "data", tau**2), z)
            # before a last level of 0 the order falls to 2: the step is long and nothing damps it
            predicted = move(past[: min(self.order, 2) if levels[i + 2 :] == [0.0] else self.order])
        else:
            builder.advance(predicted)
        return builder.finish()


class _Move:
    """A step whose evaluations are still to be chosen: past ones predict, the next one corrects."""

    def __init__(self, x: LinearExpr, step: ExponentialStep, z: LinearExpr | None) -> None:
        self.step = step
        self.base = (step.t / step.s) ** (1 + step.eta) * x
        if z is not None:
            self.base = self.base + step.noise * z

    def __call__(self, used: list[tuple[LinearExpr, float]]) -> LinearExpr:
        rate, end = 1 + self.step.eta, -math.log(self.step.t)
        weights = adams_weights(
            [l for _, l in used], -math.log(self.step.s), end, lambda l: rate * torch.exp(rate * (l - end))
        )
        out: LinearExpr = self.base
        for w, (D, _) in zip(weights, used, strict=True):
            out = out + w * D
        return out
