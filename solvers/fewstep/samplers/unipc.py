"""UniPC: a predictor and a corrector for the price of the predictor."""

from __future__ import annotations

import math

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .dpm_core import Ending
from .exponential import ExponentialStep, Through


class UniPC(DiffusionSolver):
    """UniP-p predicts; UniC-p corrects with the next step's evaluation, made at the predicted point.

    Order p + 1 with exact starting values (p without corrector), one evaluation a step. At very few
    evaluations the order should stay 2; `DPMSolverPP(order=2)` is its predictor alone. The last step is
    not corrected: it would cost an evaluation.

    Args:
        order: p, 1 to 3; lower at the start, where there is less history, and before a last level of 0.
        variant: B(h) of the paper, "bh1" (h) or "bh2" (e^h - 1). A last step to 0 is the estimate of x0
            for both; diffusers' bh1 is nan there.
        corrector: False for UniP alone; True, or a collection of the steps (0-based) to be corrected.
        predictor: False predicts by DDIM, so that UniC-p corrects a first-order step.
        prediction: "data" or "noise".
        form: "consistent"; "diffusers" lowers the order of the last steps whatever the last sigma.
    """

    card: Card = Card(
        summary="exponential Adams predictor and corrector, one evaluation a step",
        reference="Zhao et al. 2023 (arXiv 2302.04867), Algorithms 5 and 6, Eqs. (3), (5)",
        deterministic_order=3.0,
    )

    def __init__(
        self, order: int = 2, variant: str = "bh2", corrector: bool | frozenset[int] | set[int] = True,
        predictor: bool = True, prediction: str = "data", form: str = "consistent",
    ) -> None:  # fmt: skip
        _validation.check_int("order", order, 1, 3)
        kinds = (bool, set, frozenset, list, tuple)  # lists come from JSON
        _validation.check_instance("corrector", corrector, kinds, "True, False or a set of steps")
        _validation.check_instance("predictor", predictor, bool, "True or False")
        for argument, value, expected in (
            ("variant", variant, ("bh1", "bh2")), ("prediction", prediction, ("data", "noise")),
            ("form", form, ("consistent", "diffusers")),
        ):  # fmt: skip
            _validation.check_choice(argument, value, expected)
        self.order = order
        self.variant = variant
        self.corrector = corrector
        self.predictor = predictor
        self.prediction = prediction
        self.form = form
        self.ending: Ending = Ending()

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder(f"UniPC({self.order})", sigmas, self.prediction)
        past: list[tuple[LinearExpr, float]] = []  # evaluations with their lambda, newest first
        predicted, move, levels = builder.x, None, sigmas.tolist()
        for i, (s, t) in enumerate(zip(levels[:-1], levels[1:])):
            F = builder.evaluate(predicted, s)
            x = builder.advance(move.correct(F) if move and self._corrects(i - 1) else predicted)
            past = [(F, -math.log(s)), *past[: self.order - 1]]
            if t == 0:  # first order: no logarithm of 0
                builder.advance(F if self.prediction == "data" else x - s * F)
                break
            if t == s:  # diffusers' grids may say sigma_min twice: the state is where it should be
                break
            p = min(len(past), self._order_at(i, sigmas))
            move = Through(x, past[:p], ExponentialStep(s, t, self.prediction), self.variant)
            predicted = move.predict() if self.predictor else move.base
        else:
            builder.advance(predicted)
        return builder.finish()

    def _corrects(self, step: int) -> bool:
        return self.corrector if isinstance(self.corrector, bool) else step in self.corrector

    def _order_at(self, i: int, sigmas: Tensor) -> int:
        left = len(sigmas) - 1 - i
        if self.form == "diffusers":
            return min(self.order, left) if self.ending.lower else self.order
        # before a last level of 0 the order falls to 2: the step is long and nothing damps it
        return min(self.order, 2) if sigmas[-1] == 0 and left == 2 else self.order
