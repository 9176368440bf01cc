"""UniPC: a predictor and a corrector for the price of the predictor."""

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import STEEP, LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .exponential import ExponentialStep, History, OrderAt, order_before_zero


class UniPC(DiffusionSolver):
    r"""UniP-p predicts; UniC-p corrects with the next step's evaluation, made at the predicted point.

    .. math:: x_t = \frac ts\,x_s + (1-e^{-h})\,D_0 - B(-h)\sum_m \frac{a_m}{r_m}\,(D_m - D_0)

    with $r_m$ the distance of level m from s in lambda over h, and a the solution of the order conditions.

    Order p + 1 with exact starting values (p without corrector), one evaluation per step. At very few evaluations the
    order should stay 2; `DPMSolverPP(order=2)` is its predictor alone. The last step is not corrected, which would
    cost an evaluation.

    Args:
        order: p, 1 to 3; lower in the first steps, which have less history, and before a last level of 0.
        variant: B(-h) is -h ("bh1") or e^-h - 1 ("bh2"). A last step to 0 is the estimate of x0 for both.
        corrector: False for UniP alone; True, or a collection of the steps (0-based) to correct.
        predictor: False predicts by DDIM; UniC-p then corrects a first-order step, which gives order 2.
        prediction: "data" or "noise".
    """

    def __init__(
        self, order: int = 2, variant: str = "bh2", corrector: bool | frozenset[int] | set[int] = True,
        predictor: bool = True, prediction: str = "data",
    ) -> None:  # fmt: skip
        self.order: int = _validation.check_int("order", order, 1, 3)
        self.variant: str = _validation.check_choice("variant", variant, ("bh1", "bh2"))
        kinds = (bool, set, frozenset, list, tuple)  # lists come from JSON
        _validation.check_instance("corrector", corrector, kinds, "True, False or a set of steps")
        self.corrector = corrector
        _validation.check_instance("predictor", predictor, bool, "True or False")
        self.predictor = predictor
        self.prediction: str = _validation.check_choice("prediction", prediction, ("data", "noise"))
        always = self.corrector is True  # a few corrected steps do not change the order
        self.card: Card = Card(
            summary="exponential Adams predictor and corrector, one evaluation per step",
            reference="Zhao et al. 2023 (arXiv 2302.04867), Algorithms 5 and 6, Eqs. (3), (5)",
            deterministic_order=(self.order if self.predictor else 1) + always,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        return self.plan_by(order_before_zero, sigmas)

    def plan_by(self, order_at: OrderAt, sigmas: Tensor) -> Plan:
        """The plan with (order, steps left, sigmas) -> order of the step in place of the solver's rule."""
        builder = PlanBuilder(f"UniPC({self.order})", sigmas, self.prediction, rising=True)
        past: History = []
        predicted, step, n = builder.x, None, len(sigmas) - 1
        for i, (s, t) in enumerate(pairwise(builder.sigmas.tolist())):
            F = builder.evaluate(predicted, s)
            x = builder.advance(step(F) if step and self._corrects(i - 1) else predicted)
            past = [(F, -math.log(s)), *past[: self.order - 1]]
            if t == 0:  # first order: no logarithm of 0
                builder.advance(F if self.prediction == "data" else x - s * F)
                break
            if t == s:
                break
            p = min(len(past), order_at(self.order, n - i, sigmas))
            frozen = ExponentialStep(s, t, self.prediction)
            step = partial(self._through, x, past[:p], frozen)
            predicted = step() if self.predictor else frozen(x, F)
            if self.prediction == "noise" and s > STEEP * t:
                step = None
        else:
            builder.advance(predicted)
        return builder.finish()

    def _corrects(self, step: int) -> bool:
        return self.corrector if isinstance(self.corrector, bool) else step in self.corrector

    def _through(self, x: LinearExpr, past: History, step: ExponentialStep, *new: LinearExpr) -> LinearExpr:
        """The step through past evaluations, the newest at its start (UniP), and a new one at its end (UniC)."""
        (F0, lam0), *older = past
        nodes = [*(((l - lam0) / step.h, F) for F, l in older), *((1.0, F) for F in new)]
        frozen, p, hh = step(x, F0), len(nodes), -step.q
        if p == 0:
            return frozen
        B = hh if self.variant == "bh1" else math.expm1(hh)
        # Theorem 3.1: R a = b with R_jk = r_k^(j-1), b_j = j! phi_{j+1}(hh) hh / B(hh)
        k, b = math.expm1(hh) / hh - 1, []
        for j in range(1, p + 1):
            b.append(math.factorial(j) * k / B)
            k = k / hh - 1 / math.factorial(j + 1)
        r = torch.tensor([r for r, _ in nodes], dtype=torch.float64)
        R = r.repeat(p, 1) ** torch.arange(p, dtype=torch.float64)[:, None]
        # UniP-2 and UniC-1 have one node: the paper sets its weight to 1/2, which keeps the order
        a = [0.5] if p == 1 else torch.linalg.solve(R, torch.tensor(b, dtype=torch.float64)).tolist()
        terms = (-step.gain * B * w / ratio * (F - F0) for w, (ratio, F) in zip(a, nodes, strict=True))
        return sum(terms, frozen)
