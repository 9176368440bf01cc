"""SDE-DPM-Solver++: exponential multistep integration of the reverse SDE."""

from __future__ import annotations

from torch import Tensor

from .. import _validation
from ..plan import Plan
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .dpm_core import Family


class DPMSolverSDE(DiffusionSolver):
    """Exponential multistep steps of the denoiser under the exact noise of the clock tau = 1/sigma^2.

    One evaluation a step. Order 1 is DDIM(eta=1) and Euler-Maruyama in that clock. Orders 2 and 3 are
    those of the drift; along a path the strong order stays 1, since only W is seen (`ShARK` sees H).

    Args:
        order: 1, 2 or 3.
        eta: the share of the noise, tau^2 of SA-Solver: 0 is DPMSolverPP, 1 the reverse SDE.
        solver_type: "midpoint" or "heun" of the second-order term.
        form: as for `DPMSolverPP`; "diffusers" also has its wrong sign in the third-order term, which
            leaves order 1.
    """

    card: Card = Card(
        summary="exponential Adams-Bashforth of the denoiser for the reverse SDE",
        reference="Lu et al. 2022 (arXiv 2211.01095), Eqs. (18), (19) and Appendix B",
        levy="W",
        deterministic_order=2.0,
    )

    def __init__(
        self, order: int = 2, eta: float = 1.0, solver_type: str = "midpoint", form: str = "consistent"
    ) -> None:
        self.eta: float = _validation.check_float("eta", eta, 0, expected="a number of at least 0")
        self.family: Family = Family(f"DPMSolverSDE({order}M)", "data", order, solver_type, form, eta)
        self.order = order
        self.form = form
        self.solver_type = solver_type

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        return self.family.multistep(sigmas)
