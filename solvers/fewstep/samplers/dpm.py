"""What DPM-Solver, DPM-Solver++ and its SDE share: the multistep and the singlestep form.

The solvers differ in what is extrapolated (noise or data) and in the exponential of `ExponentialStep`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .exponential import ExponentialStep, History, order_before_zero, path_noise

Group = tuple[list[float], list[float]]
"""The levels of a singlestep step from its start to its end, and where in lambda its inner nodes are."""
Terms = list[tuple[float, LinearExpr]]


def even_groups(order: int, sigmas: Tensor) -> list[Group]:
    """Each interval of the grid with inner nodes even in lambda; a step to 0 has none."""
    ratios = [k / order for k in range(1, order)]  # exact: F then cancels to rounding at second order
    pairs = pairwise(sigmas.tolist())
    return [([s, *(s * (t / s) ** r for r in ratios if t > 0), t], ratios) for s, t in pairs]


@dataclass(frozen=True)
class Rules:
    """Choices in which codes differ from the papers, whose choices are the defaults; see `fewstep.compat`.

    Args:
        order: (order, steps left, sigmas) -> the order of a multistep step.
        groups: the steps of the singlestep form.
        curvature: what turns the second divided difference into h^2 F'' of third-order multistep.
        shift: added to the weight of h^2 F''.
        halved: whether the second stage of a third-order step takes e0 / 2 for e1.
    """

    order: Callable[[int, int, Tensor], int] = order_before_zero
    groups: Callable[[int, Tensor], list[Group]] = even_groups
    curvature: float = 2.0
    shift: float = 0.0
    halved: bool = False


class DPMFamily(DiffusionSolver):
    """What the members share: the options, and the two forms."""

    prediction: str
    summary: str
    reference: str

    def __init__(self, order: int, multistep: bool, solver_type: str, eta: float = 0.0) -> None:
        self.order: int = _validation.check_int("order", order, 1, 3)
        _validation.check_instance("multistep", multistep, bool, "True or False")
        self.multistep = multistep
        self.solver_type: str = _validation.check_choice("solver_type", solver_type, ("midpoint", "heun"))
        self.eta = eta
        self.card: Card = Card(
            summary=self.summary,
            reference=self.reference,
            levy="W" if eta > 0 else "",
            deterministic_order=order,
            evaluations=1 if multistep else order,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        return self.plan_by(Rules(), sigmas)

    def plan_by(self, rules: Rules, sigmas: Tensor) -> Plan:
        """The plan under other rules than the papers'."""
        name = f"{type(self).__name__}({self.order}{'M' if self.multistep else 'S'})"
        builder = PlanBuilder(name, sigmas, self.prediction)
        (self._multistep if self.multistep else self._singlestep)(builder, rules)
        return builder.finish()

    def _step(self, s: float, t: float) -> ExponentialStep:
        return ExponentialStep(s, t, self.prediction, self.eta)

    def _trivial(self, builder: PlanBuilder, F: LinearExpr, s: float, t: float) -> bool:
        """Write a step to 0, which is the estimate of x0 itself, or to the same level."""
        if 0 < t < s:
            return False
        x0 = F if self.prediction == "data" else builder.x - s * F
        builder.advance(x0 if t == 0 else builder.x)
        return True

    def _multistep(self, builder: PlanBuilder, rules: Rules) -> None:
        """One evaluation per step, slopes from earlier ones."""
        past: History = []
        sigmas, n = builder.sigmas, len(builder.sigmas) - 1
        for i, (s, t) in enumerate(pairwise(sigmas.tolist())):
            noise = path_noise(builder, s, t, self._step(s, t).noise if 0 < t < s else 0.0)
            F = builder.evaluate(builder.x, s)
            if self._trivial(builder, F, s, t):
                continue
            past = [(F, -math.log(s)), *past[: self.order - 1]]
            step, used = self._step(s, t), past[: rules.order(self.order, n - i, sigmas)]
            builder.advance(step(builder.x, F, *self._slopes(step, used, rules)) + noise)

    def _slopes(self, step: ExponentialStep, past: History, rules: Rules) -> Terms:
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
        return [(e1, g1), (e2 + rules.shift, rules.curvature * (d10 - d11) / (r0 + r1))]

    def _singlestep(self, builder: PlanBuilder, rules: Rules) -> None:
        """Groups of stages; `order` evaluations take the state over one group."""
        for (s, *inner, t), r in rules.groups(self.order, builder.sigmas):
            F = builder.evaluate(builder.x, s)
            if self._trivial(builder, F, s, t):
                continue
            stages: list[LinearExpr] = []
            for k, v in enumerate(inner):
                sub = self._step(s, v)
                # stage 2 of a third-order step goes along the slope that stage 1 has found
                e0, e1, _ = sub.weights()
                weight = e0 / 2 if rules.halved else e1
                slope = [(weight, r[1] / r[0] * (stages[0] - F))] if k else []
                stages.append(builder.evaluate(sub(builder.x, F, *slope), v))
            step = self._step(s, t)
            builder.advance(step(builder.x, F, *self._stage_slopes(step, F, stages, r)))

    def _stage_slopes(self, step: ExponentialStep, F: LinearExpr, stages: list[LinearExpr], r: list[float]) -> Terms:
        """h F' and h^2 F'' from the stages, with their weights."""
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
