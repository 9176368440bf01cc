"""UniPC: a predictor and a corrector for the price of the predictor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError
from ..plan import Plan
from ..solver import Card, DiffusionSolver
from ..tape import Affine, Tape


class UniPC(DiffusionSolver):
    """UniP-p predicts; UniC-p corrects with the next step's evaluation, made at the predicted point.

    Order p + 1 with exact starting values, one evaluation a step; data prediction, B(h) = e^h - 1
    ("bh2"). At very few evaluations the order should stay 2; `DPMSolverPP(order=2)` is its predictor
    alone. The last step is not corrected: it would cost an evaluation.

    Args:
        order: p, 1 to 3; lower at the start, where there is less history.
    """

    card = Card(
        summary="exponential Adams predictor and corrector, one evaluation a step",
        reference="Zhao et al. 2023 (arXiv 2302.04867), Algorithms 5 and 6, Eqs. (3), (5)",
        deterministic_order=3.0,
    )

    def __init__(self, order: int = 2) -> None:
        if order not in (1, 2, 3):
            raise InputError(f"order: got {order!r}, wanted 1, 2 or 3.")
        self.order = order

    def plan(self, sigmas: Tensor) -> Plan:
        tape = Tape(f"UniPC({self.order})", sigmas)
        lam = -torch.log(sigmas.clamp(min=torch.finfo(sigmas.dtype).tiny))
        past: list[tuple[Affine, float]] = []  # evaluations with their lambda, newest first
        predicted, correct = tape.x, None
        for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            D = tape.evaluate(predicted, s)
            x = tape.advance(correct(D)) if correct else tape.x
            past = [(D, float(lam[i])), *past[: self.order - 1]]
            if t == 0:  # first order: no logarithm of 0
                tape.advance(D)
                break
            # before a last level of 0 the order falls to 2: the step is long and nothing damps it
            p = min(len(past), 2 if sigmas[-1] == 0 and i == len(sigmas) - 3 else self.order)
            step = _Step(x, past[:p], s, t, float(lam[i + 1]))
            predicted, correct = step.predict(), step.correct
        else:
            tape.advance(predicted)
        return tape.finish()


class _Step:
    """One step from s to t through p past evaluations, the newest at s."""

    def __init__(self, x: Affine, past: list[tuple[Affine, float]], s: Tensor, t: Tensor, lam: float) -> None:
        self.D0, lam0 = past[0]
        self.h = lam - lam0
        self.nodes = [((l - lam0) / self.h, D) for D, l in past[1:]]
        self.base = float(t / s) * x - math.expm1(-self.h) * self.D0

    def predict(self) -> Affine:
        """UniP: the nodes are the past ones."""
        return self._through(self.nodes)

    def correct(self, D: Affine) -> Affine:
        """UniC: the evaluation at t is one node more."""
        return self._through([*self.nodes, (1.0, D)])

    def _through(self, nodes: list[tuple[float, Affine]]) -> Affine:
        p, hh = len(nodes), -self.h
        if p == 0:
            return self.base
        # R a = b with R_jk = r_k^(j-1), b_j = j! phi_{j+1}(hh) hh / B(hh); B(hh) = e^hh - 1
        B = math.expm1(hh)
        k, b = math.expm1(hh) / hh - 1, []
        for j in range(1, p + 1):
            b.append(math.factorial(j) * k / B)
            k = k / hh - 1 / math.factorial(j + 1)
        r = torch.tensor([r for r, _ in nodes], dtype=torch.float64)
        R = r.repeat(p, 1) ** torch.arange(p, dtype=torch.float64)[:, None]
        a = torch.linalg.solve(R, torch.tensor(b, dtype=torch.float64)).tolist()
        # UniP-2 and UniC-1 have one node: the paper sets its weight to 1/2, which keeps the order
        a = [0.5] if p == 1 else a
        x = self.base
        for weight, (ratio, D) in zip(a, nodes, strict=True):
            x = x - B * weight / ratio * (D - self.D0)
        return x
