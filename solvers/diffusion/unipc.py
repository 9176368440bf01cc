"""UniPC: a predictor and a corrector for the price of the predictor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..plan import Plan
from ..solver import Card, DiffusionSolver
from ..tape import Affine, Tape
from .dpm import Ending
from .exponential import Step


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
        checks.whole("order", order, 1, 3)
        kinds = (bool, set, frozenset, list, tuple)  # lists come from JSON
        checks.instance("corrector", corrector, kinds, "True, False or a set of steps")
        checks.instance("predictor", predictor, bool, "True or False")
        for argument, value, wanted in (
            ("variant", variant, ("bh1", "bh2")), ("prediction", prediction, ("data", "noise")),
            ("form", form, ("consistent", "diffusers")),
        ):  # fmt: skip
            checks.word(argument, value, wanted)
        self.order = order
        self.variant = variant
        self.corrector = corrector
        self.predictor = predictor
        self.prediction = prediction
        self.form = form
        self.ending: Ending = Ending()

    def plan(self, sigmas: Tensor) -> Plan:
        tape = Tape(f"UniPC({self.order})", sigmas, self.prediction)
        past: list[tuple[Affine, float]] = []  # evaluations with their lambda, newest first
        predicted, move, levels = tape.x, None, sigmas.tolist()
        for i, (s, t) in enumerate(zip(levels[:-1], levels[1:])):
            F = tape.evaluate(predicted, s)
            x = tape.advance(move.correct(F) if move and self._corrects(i - 1) else predicted)
            past = [(F, -math.log(s)), *past[: self.order - 1]]
            if t == 0:  # first order: no logarithm of 0
                tape.advance(F if self.prediction == "data" else x - s * F)
                break
            if t == s:  # diffusers' grids may say sigma_min twice: the state is where it should be
                break
            p = min(len(past), self._order_at(i, sigmas))
            move = _Move(x, past[:p], Step(s, t, self.prediction), self.variant)
            predicted = move.predict() if self.predictor else move.base
        else:
            tape.advance(predicted)
        return tape.finish()

    def _corrects(self, step: int) -> bool:
        return self.corrector if isinstance(self.corrector, bool) else step in self.corrector

    def _order_at(self, i: int, sigmas: Tensor) -> int:
        left = len(sigmas) - 1 - i
        if self.form == "diffusers":
            return min(self.order, left) if self.ending.lower else self.order
        # before a last level of 0 the order falls to 2: the step is long and nothing damps it
        return min(self.order, 2) if sigmas[-1] == 0 and left == 2 else self.order


class _Move:
    """One step from s to t through p past evaluations, the newest at s."""

    def __init__(self, x: Affine, past: list[tuple[Affine, float]], step: Step, variant: str) -> None:
        self.F0, lam0 = past[0]
        self.nodes = [((l - lam0) / step.h, F) for F, l in past[1:]]
        self.base, self.hh = step(x, self.F0), -step.q
        self.gain = step.t if step.prediction == "noise" else 1.0
        self.B = self.hh if variant == "bh1" else math.expm1(self.hh)

    def predict(self) -> Affine:
        """UniP: the nodes are the past ones."""
        return self._through(self.nodes)

    def correct(self, F: Affine) -> Affine:
        """UniC: the evaluation at t is one node more."""
        return self._through([*self.nodes, (1.0, F)])

    def _through(self, nodes: list[tuple[float, Affine]]) -> Affine:
        p, hh = len(nodes), self.hh
        if p == 0:
            return self.base
        # R a = b with R_jk = r_k^(j-1), b_j = j! phi_{j+1}(hh) hh / B(hh)
        k, b = math.expm1(hh) / hh - 1, []
        for j in range(1, p + 1):
            b.append(math.factorial(j) * k / self.B)
            k = k / hh - 1 / math.factorial(j + 1)
        r = torch.tensor([r for r, _ in nodes], dtype=torch.float64)
        R = r.repeat(p, 1) ** torch.arange(p, dtype=torch.float64)[:, None]
        a = torch.linalg.solve(R, torch.tensor(b, dtype=torch.float64)).tolist()
        # UniP-2 and UniC-1 have one node: the paper sets its weight to 1/2, which keeps the order
        a = [0.5] if p == 1 else a
        x = self.base
        for weight, (ratio, F) in zip(a, nodes, strict=True):
            x = x - self.gain * self.B * weight / ratio * (F - self.F0)
        return x
