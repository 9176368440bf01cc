"""Write a diffusion solver as its paper does; the builder turns the formulas into a `Plan`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _validation
from .brownian.increment import LEVY_ORDER
from .errors import InputError
from .grid import check_sigmas
from .plan import PREDICTIONS, WEIGHTS, Plan

Key = tuple[Any, ...]
"""What a term multiplies: state ("x", generation), evaluation ("D", row) or normal ("z", row, letter)."""
STATE: Key = ("x",)  # the current state, whatever its generation
NOISE_FREE = (float("nan"), float("nan"))
NO_PATH = (0.0, 0.0)
# A step over a larger factor in sigma, as the first from t = 1 of a flow, is one of order 1: solvers that extrapolate
# the noise or its slope multiply a change of the estimate of x0 by that factor.
STEEP = 100.0


@dataclass(frozen=True)
class LinearExpr:
    """A linear combination of states, evaluations and unit normals, with float64 weights."""

    terms: dict[Key, float]

    def __add__(self, other: LinearExpr) -> LinearExpr:
        keys = self.terms.keys() | other.terms.keys()
        return LinearExpr({k: self.terms.get(k, 0.0) + other.terms.get(k, 0.0) for k in keys})

    def __mul__(self, weight: float | Tensor) -> LinearExpr:
        return LinearExpr({k: float(weight) * v for k, v in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, weight: float | Tensor) -> LinearExpr:
        return self * (1 / float(weight))

    def __sub__(self, other: LinearExpr) -> LinearExpr:
        return self + other * -1.0


class PlanBuilder:
    """Records the formulas of one solver on one grid.

    Example: DDIM is `D = builder.evaluate(builder.x, s); builder.advance(t/s * builder.x + (1 - t/s) * D)` for each
    pair (s, t) of adjacent levels.

    Args:
        name: of the plan.
        sigmas: (n,) decreasing noise levels.
        prediction: what `evaluate` returns, `"data"` (D) or `"noise"` ((input - D)/sigma).
        levy: the Lévy data of each noise interval, `"W"`, `"H"` (W and H) or `"K"` (W, H and K).
        rising: accept increasing levels, along which a deterministic solver goes from data to noise.
    """

    def __init__(
        self, name: str, sigmas: Tensor, prediction: str = "data", levy: str = "W", *, rising: bool = False
    ) -> None:
        self.name = name
        rising = _validation.check_flag("rising", rising)
        # the grids of diffusers may repeat their last level
        self.sigmas: Tensor = check_sigmas(sigmas, repeat=True, rising=rising)
        self.prediction: str = _validation.check_choice("prediction", prediction, PREDICTIONS)
        self.letters: int = LEVY_ORDER[_validation.check_choice("levy", levy, LEVY_ORDER)]
        self._generation = 0
        self._levels: list[float] = []
        self._stages: list[LinearExpr] = []
        self._updates: list[LinearExpr] = []
        self._noise: dict[int, tuple[float, float]] = {}

    @property
    def x(self) -> LinearExpr:
        """The current state."""
        return LinearExpr({("x", self._generation): 1.0})

    def evaluate(self, x: LinearExpr, sigma: float | Tensor) -> LinearExpr:
        """A network evaluation at x and noise level sigma: a new row."""
        stage = self._from_state(x)
        self._levels.append(_validation.check_float("sigma", sigma))
        self._stages.append(stage)
        self._updates.append(LinearExpr({STATE: 1.0}))
        return LinearExpr({("D", len(self._levels) - 1): 1.0})

    def noise(self, tau0: float | Tensor, tau1: float | Tensor) -> tuple[LinearExpr, ...]:
        """The unit normals of the path over [tau0, tau1] from the next row on; with equal ends independent of it."""
        row = len(self._levels)
        if row in self._noise:
            raise ValueError("a row opens at most one noise interval")
        ends = _validation.check_float("tau0", tau0), _validation.check_float("tau1", tau1)
        self._noise[row] = ends if ends[0] != ends[1] else NO_PATH
        return tuple(LinearExpr({("z", row, k): 1.0}) for k in range(self.letters))

    def advance(self, x: LinearExpr) -> LinearExpr:
        """Make x the current state; returns its symbol."""
        terms = dict(self._from_state(x).terms)
        if not self._levels:
            raise InputError("advance: called before the first evaluation; call builder.evaluate(x, sigma) before it.")
        weight = terms.pop(STATE, 0.0)
        self._updates[-1] = self._updates[-1] * weight + LinearExpr(terms)
        self._generation += 1
        return self.x

    def _from_state(self, x: LinearExpr) -> LinearExpr:
        """x in terms of the current state; earlier states are no longer available."""
        _validation.check_instance("x", x, LinearExpr, "a combination of builder.x, evaluations and normals")
        terms = {STATE if k == ("x", self._generation) else k: v for k, v in x.terms.items()}
        if any(k[0] == "x" and k != STATE for k in terms):
            raise ValueError("the formula contains a state that was already advanced past")
        return LinearExpr(terms)

    def finish(self) -> Plan:
        """The table."""
        rows = len(self._levels)
        if not rows:
            raise InputError("finish: no evaluation was recorded; call builder.evaluate(x, sigma) before it.")
        cells = [*self._cells("stage", self._stages, newest=1), *self._cells("update", self._updates, newest=0)]
        window = 1 + max([0, *(at[1] for name, at, _ in cells if name.endswith("_eval"))])
        slots = 1 + max([0, *(at[1] for name, at, _ in cells if name.endswith("_noise"))])
        shapes = {"x": (rows,), "eval": (rows, window), "noise": (rows, slots, self.letters)}
        # numpy: setting an entry is ten times faster than in torch
        out = {name: np.zeros(shapes[name.partition("_")[2]]) for name in WEIGHTS}
        for name, at, value in cells:
            out[name][at] = value
        noise = [self._noise.get(i, NOISE_FREE) for i in range(rows)]
        columns: dict[str, Any] = {k: torch.from_numpy(v) for k, v in out.items()}
        sigma, intervals = (torch.tensor(c, dtype=torch.float64) for c in (self._levels, noise))
        return Plan(self.name, self.prediction, self.sigmas, sigma, noise=intervals, **columns)

    def _cells(self, part: str, exprs: list[LinearExpr], newest: int) -> Iterator[tuple[str, tuple[int, ...], float]]:
        """(column, index, weight) of each term; `newest` is the age of the last evaluation's column."""
        number = {row: k for k, row in enumerate(self._noise)}  # of each noise interval, in the order of the rows
        newest_interval = -1
        for i, expr in enumerate(exprs):
            newest_interval = number.get(i, newest_interval)
            for key, value in expr.terms.items():
                if value == 0:
                    continue
                if key == STATE:
                    yield f"{part}_x", (i,), value
                elif key[0] == "D":
                    yield f"{part}_eval", (i, i - newest - key[1]), value
                else:
                    yield f"{part}_noise", (i, newest_interval - number[key[1]], key[2]), value


def joined(name: str, sigmas: Tensor, parts: Sequence[tuple[Plan, tuple[float, float] | None, float]]) -> Plan:
    """Deterministic plans one after the other, each followed by noise of an interval and a size, or by none."""
    plans = [plan for plan, _, _ in parts]
    window = max(plan.update_eval.shape[1] for plan in plans)
    columns: dict[str, Any] = {}
    for key in ("sigma", *WEIGHTS, "noise"):
        each = [getattr(plan, key) for plan in plans]
        if key.endswith("eval"):
            each = [torch.nn.functional.pad(c, (0, window - c.shape[1])) for c in each]
        columns[key] = torch.cat(each)
    last = -1
    for plan, interval, size in parts:
        last += plan.nfe
        if interval is not None:
            columns["noise"][last] = sigmas.new_tensor(interval)
            columns["update_noise"][last] = size
    return Plan(name, plans[0].prediction, sigmas, **columns)
