"""Explicit Runge-Kutta methods for ODEs with an embedded estimate of the error."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, plus
from ..solver import Step, StochasticSolver


@dataclass(frozen=True)
class ButcherTableau:
    r"""The coefficients of a method whose last stage is the first one of the next step.

    .. math:: k_i = f\big(t + c_i h, y + h \textstyle\sum_{j<i} a_{ij} k_j\big), \quad
              y' = y + h \textstyle\sum_j a_{sj} k_j, \quad e = h \textstyle\sum_i e_i k_i.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    e: tuple[float, ...]


class RungeKutta(StochasticSolver):
    """The step of a tableau. Steps carry the drift at their end, so that it is evaluated once per time."""

    tableau: ButcherTableau

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> Tensor:
        return sde.drift(t0, y0)

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        return self._step(sde, t0, t1, y, increment, carry)[0]

    def step_with_error(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        """The step and its difference from the embedded method of one order less."""
        step, ks = self._step(sde, t0, t1, y, increment, carry)
        error = self.tableau.e[0] * ks[0]
        for e, k in zip(self.tableau.e[1:], ks[1:], strict=True):
            error = plus(error, e, k)
        return step._replace(error=increment.h * error)

    def _step(
        self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any
    ) -> tuple[Step, list[Tensor]]:
        """The step, and the drift at its stages."""
        ks, h, stage = [carry], increment.h, y
        for c, row in zip(self.tableau.c, self.tableau.a, strict=True):
            stage = y
            for a, k in zip(row, ks, strict=True):
                stage = plus(stage, a * h, k) if a else stage
            ks.append(sde.drift(t0 + c * h if c < 1 else t1, stage))
        return Step(stage, ks[-1]), ks
