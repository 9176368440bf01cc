"""The untrained samplers of a number of evaluations: what `compare` measures by default and fits start from."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from .errors import InputError
from .grid import Spacing, sigma_grid
from .plan import Plan
from .samplers.ddim import DDIM
from .samplers.deis import DEIS
from .samplers.dpm import DPMSolver, DPMSolverPP
from .samplers.edm import EDMHeun
from .samplers.ipndm import IPNDM
from .samplers.unipc import UniPC
from .schedule import Schedule
from .solver import DiffusionSolver

SPACINGS = ("logsnr", "karras", "trailing", "uniform")
SAMPLERS: tuple[Callable[[], DiffusionSolver], ...] = (
    DDIM, lambda: IPNDM(2), lambda: IPNDM(3), IPNDM, lambda: DEIS(2), DEIS, lambda: DPMSolverPP(2),
    lambda: DPMSolverPP(3), lambda: UniPC(2), lambda: UniPC(3), lambda: DPMSolver(2), lambda: DPMSolver(3), EDMHeun,
)  # fmt: skip


class Untrained(NamedTuple):
    """A solver on a spacing of a number of steps."""

    solver: DiffusionSolver
    spacing: str
    plan: Plan


def untrained(
    schedule: Schedule, nfe: int, solvers: Sequence[DiffusionSolver] | None = None,
    spacings: Sequence[Spacing] = SPACINGS,
) -> list[Untrained]:  # fmt: skip
    """Every solver on every spacing, with nfe evaluations or the next fewer that its grids can take."""
    chosen = [make() for make in SAMPLERS] if solvers is None else solvers
    return [Untrained(solver, name, plan) for solver in chosen for name, spacing in named_spacings(spacings)
            if (plan := plan_of(solver, nfe, spacing, schedule)) is not None]  # fmt: skip


def named_spacings(spacings: Iterable[Spacing]) -> list[tuple[str, Spacing]]:
    """Spacings with their names; those of a user's levels are "levels", "levels 2" and so on."""
    found, own = list[tuple[str, Spacing]](), 0
    for spacing in spacings:
        own += not isinstance(spacing, str)
        found.append((spacing if isinstance(spacing, str) else f"levels {own}" if own > 1 else "levels", spacing))
    return found


def plan_of(solver: DiffusionSolver, nfe: int, spacing: Spacing | Tensor, schedule: Schedule) -> Plan | None:
    """The plan with the most evaluations up to nfe, on a grid that ends in x0; None if there is none.

    Of one step, which is the same for all solvers, only for nfe = 1.
    """
    for steps in range(-(-nfe // solver.card.evaluations) + 1, min(nfe, 2) - 1, -1):
        try:
            plan = solver.plan(sigma_grid(schedule, steps, spacing), schedule)
        except InputError:  # more steps than the schedule has labels, or fewer than the solver takes
            continue
        if plan.nfe <= nfe:
            return plan
    return None
