"""DPM-Solver++: exponential integrators in data prediction."""

from __future__ import annotations

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .dpm_core import Family


class DPMSolverPP(DiffusionSolver):
    """Exponential multistep (2M, 3M) or singlestep (2S, 3S) integration in lambda = -log sigma.

    Order 1 to 3. Multistep costs one evaluation a step and starts with a step of order 1; singlestep
    costs `order` and needs no start. `UniPC(order=2)` corrects each step with the evaluation it has
    anyway and is more accurate at the same cost; `DDIM` is the order-1 member.

    Args:
        order: 1, 2 or 3.
        multistep: one evaluation a step from the last ones, or `order` evaluations in the step.
        solver_type: "midpoint" or "heun" (the Taylor form) of the second-order term.
        form: of the third-order multistep. "consistent" has order 3. "official" drops a factor 2 of the
            second derivative, as every released code does, and has order 2, sometimes with the smaller
            error at few steps. "diffusers" is official and lowers the order of the last two of fewer
            than 15 steps, whatever the last sigma; it gives the numbers of diffusers' schedulers.
        nodes: of singlestep. "own" puts the inner nodes into each interval of the grid (`order`
            evaluations an interval); "grid" takes the grid's own levels as nodes (one an interval, as
            diffusers does).
    """

    card: Card = Card(
        summary="exponential Adams-Bashforth (2M, 3M) or Runge-Kutta (2S, 3S) of the denoiser in log sigma",
        reference="Lu et al. 2022 (arXiv 2211.01095), Algorithms 1 and 2; 3M with twice the D2 of its code",
        deterministic_order=2.0,
    )

    def __init__(
        self, order: int = 2, multistep: bool = True, solver_type: str = "midpoint",
        form: str = "consistent", nodes: str = "own",
    ) -> None:  # fmt: skip
        _validation.check_instance("multistep", multistep, bool, "True or False")
        name = f"DPMSolverPP({order}{'M' if multistep else 'S'})"
        self.family: Family = Family(name, "data", order, solver_type, form, 0.0, nodes)
        self.order = order
        self.multistep = multistep
        self.form = form
        self.solver_type = solver_type
        self.nodes = nodes

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        return self.family.multistep(sigmas) if self.multistep else self.family.singlestep(sigmas)
