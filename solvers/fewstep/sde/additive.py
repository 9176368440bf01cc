"""Stochastic Runge-Kutta methods for additive noise: a tableau gives an SDE step and a diffusion plan.

In the clock tau = 1/sigma^2 the reverse SDE of a diffusion model is dz = D dtau + dB with z = tau x:
additive noise of size one, without stiffness. So each tableau is also a sampler.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..plan import Plan
from ..plan_builder import LinearExpr, PlanBuilder
from ..problem import SDE, diffuse, plus
from ..schedule import Schedule
from ..solver import DiffusionSolver, Step, StochasticSolver

# The noise that a tableau adds to the first input of a step is s/t times that of its level: above this factor a
# denoiser receives an input that it was not made for, and the step has none. Not 10: many grids have that ratio, and
# rounding would decide.
STEEP = 12.0


@dataclass(frozen=True)
class Tableau:
    r"""The coefficients of a stochastic Runge-Kutta method for additive noise.

    .. math:: k_i = f\big(t + c_i h, y + h \textstyle\sum_j a_{ij} k_j + g (w_i W + e_i H)\big), \quad
              y' = y + h \textstyle\sum_i b_i k_i + g(t) W + \big(g(t+h) - g(t)\big) (\tfrac12 W - H),

    where the last term makes the integral of a g that is linear in time exact.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    w: tuple[float, ...]
    e: tuple[float, ...]


# facts of the tableaux with W and H of order 1.5
FACTS: dict[str, Any] = {
    "levy": "H", "sde_types": ("ito", "stratonovich"), "deterministic_order": 2.0,
    "strong_order": {"additive": 1.5}, "weak_order": {"additive": 2.0},
}  # fmt: skip


class AdditiveRungeKutta(StochasticSolver, DiffusionSolver):
    """The SDE step and the diffusion plan of a tableau. Steps carry g, so it is evaluated once per time."""

    tableau: Tableau
    error_order: float = 1.5

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> Tensor:
        return sde.diffusion(t0, y0)

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        return self._step(sde, t0, t1, y, increment, carry)[0]

    def step_with_error(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        """The step and its difference from one that takes the drift of the first stage alone, of strong order 1."""
        step, ks = self._step(sde, t0, t1, y, increment, carry)
        error = (self.tableau.b[0] - 1) * ks[0]
        for b, k in zip(self.tableau.b[1:], ks[1:], strict=True):
            error = plus(error, b, k)
        return step._replace(error=increment.h * error)

    def _step(
        self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any
    ) -> tuple[Step, list[Tensor]]:
        """The step, and the drift at its stages."""
        h, W, H = increment.h, increment.W, increment.H
        g0, tab = carry, self.tableau
        ks: list[Tensor] = []
        for c, row, w, e in zip(tab.c, tab.a, tab.w, tab.e, strict=True):
            stage = y
            for a, k in zip(row, ks):
                stage = plus(stage, a * h, k)
            if w or e:
                stage = stage + diffuse(g0, w * W if H is None else w * W + e * H)
            ks.append(sde.drift(t0 + c * h if c else t0, stage))
        for b, k in zip(tab.b, ks, strict=True):
            y = plus(y, b * h, k)
        g1 = sde.diffusion(t1, y)
        y = y + diffuse(g0, W)
        return Step(y + diffuse(g1 - g0, 0.5 * W - H) if H is not None else y, g1), ks

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        return snr_plan(type(self).__name__, self.tableau, self.card.levy, sigmas)


def snr_plan(name: str, tableau: Tableau, levy: str, sigmas: Tensor) -> Plan:
    """The plan of a tableau in the clock tau = 1/sigma^2; at a last level of 0 it returns x0."""
    builder = PlanBuilder(name, sigmas, levy=levy)
    letters = (1.0, 12.0)  # Var W = h, Var H = h/12
    for s, t in zip(builder.sigmas[:-1], builder.sigmas[1:], strict=True):
        tau = s**-2
        if t == 0:
            builder.advance(builder.evaluate(builder.x, s))
            continue
        h = t**-2 - tau
        x, z, ks = builder.x, builder.noise(tau, t**-2), list[LinearExpr]()
        for c, row, *we in zip(tableau.c, tableau.a, tableau.w, tableau.e, strict=True):
            at = tau + c * h
            stage = x * tau
            for a, k in zip(row, ks):
                stage = stage + a * h * k
            for weight, normal, var in zip(we, z if c or s <= STEEP * t else (), letters):
                stage = stage + weight * (h / var).sqrt() * normal
            ks.append(builder.evaluate(stage / at, at**-0.5))
        new = x * tau + h.sqrt() * z[0]
        for b, k in zip(tableau.b, ks, strict=True):
            new = new + b * h * k
        builder.advance(new * t**2)
    return builder.finish()
