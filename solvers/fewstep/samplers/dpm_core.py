"""The multistep and singlestep forms of DPM-Solver, DPM-Solver++ and its SDE, written once.

They differ in what is extrapolated (noise or data) and in the step's exponential; see `exponential.Step`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from .exponential import ExponentialStep

TYPES = ("midpoint", "heun")
FORMS = ("consistent", "official", "diffusers")
NODES = ("own", "grid")
SHORT = 15  # below this many steps diffusers lowers the order of the last two


@dataclass(frozen=True)
class Ending:
    """How a run of diffusers ends, for `form="diffusers"`; total: its steps, where a grid is only its end."""

    total: int | None = None
    lower: bool = True
    euler: bool = False

    def steps(self, sigmas: Tensor) -> int:
        """Steps of the whole run."""
        return self.total or len(sigmas) - 1

    def order(self, order: int, left: int, sigmas: Tensor) -> int:
        """The order where `left` steps are left: lower at the end of short runs."""
        if left == 1 and self.euler:
            return 1
        return min(order, left) if self.lower and self.steps(sigmas) < SHORT else order


@dataclass(frozen=True)
class Family:
    """A member of the family on its way to a plan; the solvers' docstrings explain the options."""

    name: str
    prediction: str
    order: int
    solver_type: str = "midpoint"
    form: str = "consistent"
    eta: float = 0.0
    nodes: str = "own"
    ending: Ending = Ending()

    def __post_init__(self) -> None:
        _validation.check_int("order", self.order, 1, 3)
        for argument, value, expected in (
            ("solver_type", self.solver_type, TYPES), ("form", self.form, FORMS),
            ("nodes", self.nodes, NODES),
        ):  # fmt: skip
            _validation.check_choice(argument, value, expected)

    def step(self, s: Tensor | float, t: Tensor | float) -> ExponentialStep:
        return ExponentialStep(float(s), float(t), self.prediction, self.eta)

    def to_zero(self, builder: PlanBuilder, s: Tensor, F: LinearExpr) -> LinearExpr:
        """The step to sigma = 0 is the estimate of x0 itself: first order, no logarithm of 0."""
        return F if self.prediction == "data" else builder.x - float(s) * F

    # ---------------------------------------------------------------- multistep

    def multistep(self, sigmas: Tensor) -> Plan:
        """One evaluation a step, slopes from earlier ones."""
        builder = PlanBuilder(self.name, sigmas, self.prediction)
        past: list[tuple[LinearExpr, float]] = []  # evaluations with their lambda, newest first
        for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            noisy = self.eta > 0 and 0 < t < s
            z = builder.noise(s**-2, t**-2)[0] if noisy else None
            F = builder.evaluate(builder.x, s)
            if t == 0 or t == s:  # diffusers' grids may say sigma_min twice
                builder.advance(self.to_zero(builder, s, F) if t == 0 else builder.x)
                continue
            past = [(F, -math.log(s)), *past[: self.order - 1]]
            step = self.step(s, t)
            x = step(builder.x, F, *self._slopes(step, past[: self._order_at(i, sigmas)]))
            builder.advance(x + step.noise * z if z is not None else x)
        return builder.finish()

    def _order_at(self, i: int, sigmas: Tensor) -> int:
        """The order of step i where history allows: lower before the end."""
        left = len(sigmas) - 1 - i
        if self.form == "diffusers":
            return self.ending.order(self.order, left, sigmas)
        # before a last level of 0 the order falls to 2: the step is long and nothing damps it
        return min(self.order, 2) if left == 2 and sigmas[-1] == 0 else self.order

    def _slopes(
        self, step: ExponentialStep, past: list[tuple[LinearExpr, float]]
    ) -> list[tuple[float, LinearExpr]]:
        """h F' and h^2 F'' from divided differences, with their weights."""
        if len(past) == 1:
            return []
        e0, e1, e2 = step.weights()
        (F0, l0), (F1, l1), *rest = past
        r0 = (l0 - l1) / step.h
        d10 = (F0 - F1) / r0
        if not rest:
            return [(e0 / 2 if self.solver_type == "midpoint" else e1, d10)]
        ((F2, l2),) = rest
        r1 = (l1 - l2) / step.h
        d11 = (F1 - F2) / r1
        g1 = d10 + r0 / (r0 + r1) * (d10 - d11)
        # twice the divided difference is h^2 F''; the official code has it once, which leaves order 2
        g2 = (2 if self.form == "consistent" else 1) * (d10 - d11) / (r0 + r1)
        if self.form == "diffusers" and self.eta > 0:
            e2 = e2 - 1  # `- 0.5` where the integral has `+ 0.5`: order 1
        return [(e1, g1), (e2, g2)]

    # ---------------------------------------------------------------- singlestep

    def singlestep(self, sigmas: Tensor) -> Plan:
        """Groups of stages; `order` evaluations take the state over one group."""
        builder = PlanBuilder(self.name, sigmas, self.prediction)
        for group in self._groups(sigmas):
            s, *inner, t = group
            F = builder.evaluate(builder.x, s)
            if t == 0 or t == s:
                builder.advance(self.to_zero(builder, sigmas[-2], F) if t == 0 else builder.x)
                continue
            step, h = self.step(s, t), math.log(s / t)
            # even nodes are exact fractions, so that 2S holds no rounding residue of F
            even = self.nodes == "own"
            r = [(k + 1) / self.order if even else math.log(s / v) / h for k, v in enumerate(inner)]
            stages: list[LinearExpr] = []
            for k, v in enumerate(inner):
                sub = self.step(s, v)
                # stage 2 of a third-order step goes along the slope that stage 1 has found
                e0, e1, _ = sub.weights()
                if self.form == "diffusers" and self.solver_type == "midpoint":
                    e1 = e0 / 2  # its stage 2 is a whole second-order step: still order 3
                slope = [(e1, r[1] / r[0] * (stages[0] - F))] if k else []
                stages.append(builder.evaluate(sub(builder.x, F, *slope), v))
            builder.advance(step(builder.x, F, *self._stage_slopes(step, F, stages, r)))
        return builder.finish()

    def _stage_slopes(
        self, step: ExponentialStep, F: LinearExpr, stages: list[LinearExpr], r: list[float]
    ) -> list[tuple[float, LinearExpr]]:
        if not stages:
            return []
        e0, e1, e2 = step.weights()
        d = [(stage - F) / ratio for stage, ratio in zip(stages, r, strict=True)]
        if len(d) == 1:
            return [(e0 / 2 if self.solver_type == "midpoint" else e1, d[0])]
        if self.solver_type == "midpoint":
            return [(e1, d[1])]
        r1, r2 = r
        return [(e1, (r2 * d[0] - r1 * d[1]) / (r2 - r1)), (e2, 2 * (d[1] - d[0]) / (r2 - r1))]

    def _groups(self, sigmas: Tensor) -> list[list[float]]:
        """The levels of each step: its start, its inner nodes, its end."""
        levels, n = sigmas.tolist(), len(sigmas) - 1
        if self.nodes == "grid":
            total = self.ending.steps(sigmas)
            full = not self.ending.lower and levels[-1] > 0 and total % self.order == 0
            orders = (
                [self.order] * (total // self.order) if full else _orders(self.order, total, levels[-1] == 0)
            )
            ends = [0, *(e for e in (v - total + n for v in accumulate(orders)) if e > 0)]
            return [levels[a : b + 1] for a, b in zip(ends[:-1], ends[1:])]
        ratios = [k / self.order for k in range(1, self.order)]  # even in lambda
        return [
            [s, *(s * (t / s) ** r for r in ratios), t] if t > 0 else [s, t]
            for s, t in zip(levels[:-1], levels[1:])
        ]


def _orders(order: int, n: int, to_zero: bool) -> list[int]:
    """Steps of `order` grid intervals and fewer at the end, n intervals in all (arXiv 2206.00927, App. C)."""
    if order == 3:
        tail = {0: [2, 1], 1: [1], 2: [2]}[n % 3]
    else:
        tail = [1] * (1 if n % order else order) if order > 1 else []
    orders = [order] * ((n - sum(tail)) // order) + tail
    return [*orders[:-1], *[1] * orders[-1]] if to_zero else orders
