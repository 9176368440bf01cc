"""DDIM, from deterministic to ancestral."""

from __future__ import annotations

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from . import diffusers_compat


class DDIM(DiffusionSolver):
    """x' = (t/s) x + (1 - t/s) D for eta = 0; eta = 1 is DDPM's ancestral sampler.

    Order 1, one evaluation a step; DPM-Solver and DPM-Solver++ of order 1 are the same step.
    `DPMSolverPP(order=2)` costs no more and has order 2. With eta > 0 noise of the interval's own
    Brownian increment is put back in; eta = 1 equals `EulerMaruyama` as a sampler.

    Args:
        eta: the share of the ancestral noise, in [0, 1].
        form: "consistent", or "diffusers", which steps by N // n labels whatever the grid and so
            differs on "linspace" grids; its plan needs the schedule.
    """

    card: Card = Card(
        summary="the exponential Euler step of the probability-flow ODE, eta of its noise put back",
        reference="Song, Meng & Ermon 2021 (arXiv 2010.02502), Eqs. (12), (16)",
        deterministic_order=1.0,
    )

    def __init__(self, eta: float = 0.0, form: str = "consistent") -> None:
        self.eta: float = _validation.check_float("eta", eta, 0, 1, "a number in [0, 1]")
        self.form: str = _validation.check_choice("form", form, ("consistent", "diffusers"))

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        if self.form == "diffusers":
            return diffusers_compat.ddim(self.eta, sigmas, schedule)
        builder = PlanBuilder(f"DDIM(eta={self.eta:g})", sigmas)
        for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
            # Eq. (16) in x = x0 + sigma n; the noise is that of the path over [1/s^2, 1/t^2]
            v = self.eta * t / s * (s**2 - t**2).sqrt()
            random = v > 0
            (z,) = builder.noise(s**-2, t**-2) if random else (None,)
            D = builder.evaluate(builder.x, s)
            keep = (t**2 - v**2).clamp(min=0).sqrt() / s
            x = keep * builder.x + (1 - keep) * D
            builder.advance(x + v * z if z is not None else x)
        return builder.finish()
