"""DPM-Solver: exponential integrators in noise prediction."""

from __future__ import annotations

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .dpm_core import Family


class DPMSolver(DiffusionSolver):
    """Exponential integration of the noise prediction in lambda = -log sigma, singlestep by default.

    Order 1 to 3 at as many evaluations a step; multistep at one. `DPMSolverPP` extrapolates the data
    instead, which is more robust at few steps and under guidance; order 1 is `DDIM`.

    Args:
        order: 1, 2 or 3.
        multistep: one evaluation a step from the last ones, or `order` evaluations in the step.
        solver_type: "midpoint", or "heun", which is the paper's Taylor variant.
        form, nodes: as for `DPMSolverPP`.
    """

    card: Card = Card(
        summary="exponential Runge-Kutta of the noise prediction in log sigma",
        reference="Lu et al. 2022 (arXiv 2206.00927), Algorithms 1 and 2, Eq. (B.4)",
        deterministic_order=2.0,
        evaluations=2,
    )

    def __init__(
        self, order: int = 2, multistep: bool = False, solver_type: str = "midpoint",
        form: str = "consistent", nodes: str = "own",
    ) -> None:  # fmt: skip
        _validation.check_instance("multistep", multistep, bool, "True or False")
        name = f"DPMSolver({order}{'M' if multistep else 'S'})"
        self.family: Family = Family(name, "noise", order, solver_type, form, 0.0, nodes)
        self.order = order
        self.multistep = multistep
        self.form = form
        self.solver_type = solver_type
        self.nodes = nodes

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        return self.family.multistep(sigmas) if self.multistep else self.family.singlestep(sigmas)
