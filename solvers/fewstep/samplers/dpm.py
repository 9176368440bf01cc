"""DPM-Solver, DPM-Solver++ and its SDE, multistep and singlestep, written once.

They differ in what is extrapolated (noise or data) and in the exponential of `ExponentialStep`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from .. import _validation
from ..errors import InputError
from ..plan import Plan
from ..plan_builder import STEEP, LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .exponential import ExponentialStep, History, OrderAt, order_before_zero, path_noise

Group = tuple[list[float], list[float]]
"""The levels of a singlestep step from its start to its end, and where in lambda its inner nodes are."""
Terms = list[tuple[float, LinearExpr]]


def even_groups(order: int, sigmas: Tensor, r: float) -> list[Group]:
    """Each interval of the grid with inner nodes at r or even in lambda; a step to 0 has none."""
    ratios = [r] if order == 2 else [k / order for k in range(1, order)]
    pairs = pairwise(sigmas.tolist())
    return [([s, *(t if r == 1 else s * (t / s) ** r for r in ratios if t > 0), t], ratios) for s, t in pairs]


@dataclass(frozen=True)
class Rules:
    """Choices in which codes differ from the papers, whose choices are the defaults; see `fewstep.compat`.

    Args:
        order: of the multistep steps.
        groups: the steps of the singlestep form; None for `even_groups`.
        curvature: what turns the second divided difference into h^2 F'' of third-order multistep.
        shift: added to the weight of h^2 F''.
        halved: whether the second stage of a third-order step takes e0 / 2 for e1.
        steep: singlestep steps of the noise over a larger factor in sigma are of order 1.
    """

    order: OrderAt = order_before_zero
    groups: Callable[[int, Tensor], list[Group]] | None = None
    curvature: float = 2.0
    shift: float = 0.0
    halved: bool = False
    steep: float = STEEP


class DPMFamily(DiffusionSolver):
    """What the members share: the options, and the two forms."""

    prediction: str
    summary: str
    reference: str

    def __init__(self, order: int, multistep: bool, solver_type: str, eta: float = 0.0, r: float = 0.5) -> None:
        self.order: int = _validation.check_int("order", order, 1, 3)
        _validation.check_instance("multistep", multistep, bool, "True or False")
        self.multistep = multistep
        self.solver_type: str = _validation.check_choice("solver_type", solver_type, ("midpoint", "heun"))
        self.eta = eta
        self.r: float = _validation.check_float("r", r, 0, 1, "a number in (0, 1]")
        if self.r == 0 or (self.r != 0.5 and (order != 2 or multistep)):
            raise InputError(f"r: got {r!r}, expected a number in (0, 1], and 0.5 unless order=2 and multistep=False.")
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
        builder = PlanBuilder(name, sigmas, self.prediction, rising=self.eta == 0)
        (self._multistep if self.multistep else self._singlestep)(builder, rules)
        return builder.finish()

    def _step(self, s: float, t: float) -> ExponentialStep:
        return ExponentialStep(s, t, self.prediction, self.eta)

    def _trivial(self, builder: PlanBuilder, F: LinearExpr, s: float, t: float) -> bool:
        """Write a step to 0, which is the estimate of x0 itself, or to the same level."""
        if 0 < t != s:
            return False
        x0 = F if self.prediction == "data" else builder.x - s * F
        builder.advance(x0 if t == 0 else builder.x)
        return True

    def _multistep(self, builder: PlanBuilder, rules: Rules) -> None:
        """One evaluation per step, slopes from earlier ones."""
        past: History = []
        for i, (s, t) in enumerate(pairwise(builder.sigmas.tolist()), 1):
            noise = path_noise(builder, s, t, self._step(s, t).noise if 0 < t != s else 0.0)
            F = builder.evaluate(builder.x, s)
            if self._trivial(builder, F, s, t):
                continue
            past = [(F, -math.log(s)), *past[: self.order - 1]]
            left = len(builder.sigmas) - i
            step, used = self._step(s, t), past[: rules.order(self.order, left, builder.sigmas)]
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
        even = even_groups(self.order, builder.sigmas, self.r)
        for (s, *inner, t), r in rules.groups(self.order, builder.sigmas) if rules.groups else even:
            if t == 0 or t == s:
                self._trivial(builder, builder.evaluate(builder.x, s), s, t)
                continue
            noise = self._noise(builder, LinearExpr({}), s, [*inner, t][0])
            F = builder.evaluate(builder.x, s)
            if self.prediction == "noise" and s > rules.steep * t:
                inner, r = [], []
            stages: list[LinearExpr] = []
            for k, (v, following) in enumerate(pairwise([*inner, t])):
                sub = self._step(s, v)
                # stage 2 of a third-order step goes along the slope that stage 1 has found
                e0, e1, _ = sub.weights()
                weight = e0 / 2 if rules.halved else e1
                slope = [(weight, r[1] / r[0] * (stages[0] - F))] if k else []
                x = sub(builder.x, F, *slope) + noise
                noise = self._noise(builder, noise, v, following)
                stages.append(builder.evaluate(x, v))
            step = self._step(s, t)
            builder.advance(step(builder.x, F, *self._stage_slopes(step, F, stages, r)) + noise)

    def _noise(self, builder: PlanBuilder, noise: LinearExpr, u: float, v: float) -> LinearExpr:
        """The noise of a step up to level v, from that up to level u: stages see parts of one path."""
        if self.eta == 0 or u == v:
            return noise
        part = self._step(u, v)
        return part.scale * noise + path_noise(builder, u, v, part.noise)

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


class DPMSolver(DPMFamily):
    r"""Exponential integrators of the noise prediction in $\lambda = -\log\sigma$, singlestep by default.

    .. math:: x_t = x_s - s\int_0^h e^{-u}\,\varepsilon(\lambda_s + u)\,du, \qquad h = \log(s/t)

    with $\varepsilon$ a polynomial through evaluations inside the step or at earlier levels. Order 1 to 3 at as many
    evaluations per step, or at one with `multistep`. `DPMSolverPP` extrapolates the data instead, which is more robust
    at few steps and under guidance; order 1 is `DDIM`.

    Args:
        order: 1, 2 or 3.
        multistep: True takes one evaluation per step and reuses earlier ones; False takes `order` evaluations inside
            each step, at nodes even in lambda.
        solver_type: "midpoint" or "heun" (the paper's Taylor form) of the second-order term.
        r: where in lambda the inner node of a singlestep step of order 2 is; 1 is its end.
    """

    prediction = "noise"
    summary = "exponential Runge-Kutta or Adams-Bashforth of the noise prediction in log sigma"
    reference = "Lu et al. 2022 (arXiv 2206.00927), Algorithms 1 and 2, Eq. (B.4)"

    def __init__(self, order: int = 2, multistep: bool = False, solver_type: str = "midpoint", r: float = 0.5) -> None:
        super().__init__(order, multistep, solver_type, r=r)


class DPMSolverPP(DPMFamily):
    r"""Exponential integrators of the denoiser in $\lambda = -\log\sigma$: 2M, 3M, or 2S, 3S.

    .. math:: x_t = \frac ts\,x_s + \int_0^h e^{u-h}\,D(\lambda_s + u)\,du, \qquad h = \log(s/t)

    with D a polynomial through evaluations at earlier levels (M) or inside the step (S). Order 1 to 3. Multistep starts
    with a step of order 1; singlestep needs no start. `UniPC(order=2)` corrects each step with the evaluation it has
    anyway and is more accurate at the same cost; `DDIM` is the member of order 1.

    Args:
        order: 1, 2 or 3. Released codes drop a factor 2 in 3M, which leaves order 2: `compat.OfficialDPM`.
        multistep, solver_type, r: as for `DPMSolver`.
    """

    prediction = "data"
    summary = "exponential Adams-Bashforth (2M, 3M) or Runge-Kutta (2S, 3S) of the denoiser in log sigma"
    reference = "Lu et al. 2022 (arXiv 2211.01095), Algorithms 1 and 2; 3M with twice the D2 of its code"

    def __init__(self, order: int = 2, multistep: bool = True, solver_type: str = "midpoint", r: float = 0.5) -> None:
        super().__init__(order, multistep, solver_type, r=r)


class DPMSolverSDE(DPMFamily):
    r"""Exponential integration of the denoiser under exact noise: 2M SDE, 3M SDE, or singlestep.

    .. math:: x_t = \Big(\frac ts\Big)^{1+\eta} x_s + \int_0^q e^{u-q}\,D\,du + t\sqrt{1-e^{-2\eta h}}\,z,
        \qquad q = (1+\eta)\,h,\ h = \log(s/t)

    with D a polynomial through evaluations at earlier levels or inside the step, and z the normal of the path in
    1/sigma^2; stages inside the step see the noise of their part of it. One evaluation per step, or `order` without
    `multistep`. Order 1 with eta = 1 is `DDIM(eta=1)` and `EulerMaruyama`. Orders 2 and 3 are those of the drift; along
    a path the strong order stays 1, because only W is used (`ShARK` uses H).

    Args:
        order: 1, 2 or 3.
        eta: the share of the noise, tau^2 of SA-Solver: 0 is `DPMSolverPP`, 1 the reverse SDE.
        solver_type, multistep, r: as for `DPMSolver`.
    """

    prediction = "data"
    summary = "exponential Adams-Bashforth or Runge-Kutta of the denoiser for the reverse SDE"
    reference = "Lu et al. 2022 (arXiv 2211.01095), Eqs. (18), (19) and Appendix B; k-diffusion's dpmpp_sde"

    def __init__(
        self, order: int = 2, eta: float = 1.0, solver_type: str = "midpoint", multistep: bool = True, r: float = 0.5
    ) -> None:
        eta = _validation.check_float("eta", eta, 0, expected="a number of at least 0")
        super().__init__(order, multistep, solver_type, eta, r)
