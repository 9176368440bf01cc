"""DDIM, from deterministic to ancestral."""

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..plan_builder import PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver, moved


class DDIM(DiffusionSolver):
    r"""The exponential Euler step, deterministic to ancestral.

    .. math:: x_t = \kappa\,x_s + (1-\kappa)\,D + v\,z, \qquad
        v = \eta\,\frac ts\sqrt{s^2-t^2},\ \kappa = \frac{\sqrt{t^2-v^2}}{s}

    Order 1, one evaluation per step; DPM-Solver and DPM-Solver++ of order 1 are the same step.
    `DPMSolverPP(order=2)` costs no more and has order 2. The normal z is that of the path in 1/sigma^2;
    eta = 1 is DDPM's ancestral sampler and equals `EulerMaruyama` as a sampler.

    Args:
        eta: the share of the ancestral noise, in [0, 1].
    """

    @moved(form="compat.DiffusersDDIM(eta)")
    def __init__(self, eta: float = 0.0) -> None:
        self.eta: float = _validation.check_float("eta", eta, 0, 1, "a number in [0, 1]")
        self.card: Card = Card(
            summary="exponential Euler step of the probability-flow ODE, plus eta of the ancestral noise",
            reference="Song, Meng & Ermon 2021 (arXiv 2010.02502), Eqs. (12), (16)",
            levy="W" if self.eta else "",
            deterministic_order=1,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder(f"DDIM(eta={self.eta:g})", sigmas)
        for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
            v = self.eta * t / s * (s**2 - t**2).sqrt()
            z = builder.noise(s**-2, t**-2)[0] if v > 0 else None
            D = builder.evaluate(builder.x, s)
            keep = (t**2 - v**2).clamp(min=0).sqrt() / s
            x = keep * builder.x + (1 - keep) * D
            builder.advance(x + v * z if z is not None else x)
        return builder.finish()
