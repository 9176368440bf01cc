"""Where fits start: the untrained samplers of a number of evaluations, and a user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import _validation
from ...errors import InputError
from ...grid import sigma_grid
from ...plan import Plan
from ...samplers.ddim import DDIM
from ...samplers.deis import DEIS
from ...samplers.dpm import DPMSolver, DPMSolverPP
from ...samplers.edm import EDMHeun
from ...samplers.ipndm import IPNDM
from ...samplers.unipc import UniPC
from ...schedule import Schedule
from ...solver import DiffusionSolver
from .coefficients import Coefficients

SPACINGS = ("logsnr", "karras", "trailing", "uniform")
SAMPLERS: tuple[Callable[[], DiffusionSolver], ...] = (
    DDIM, lambda: IPNDM(2), lambda: IPNDM(3), IPNDM, lambda: DEIS(2), DEIS, lambda: DPMSolverPP(2),
    lambda: DPMSolverPP(3), lambda: UniPC(2), lambda: UniPC(3), lambda: DPMSolver(2), lambda: DPMSolver(3), EDMHeun,
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """A plan, its origin, and its solver where its levels may move under the solver's formula.

    Attributes:
        letters: normals of each interval that a fit from it may read.
    """

    name: str
    plan: Plan
    solver: DiffusionSolver | None = None
    letters: int = 0

    @property
    def table(self) -> Coefficients:
        return Coefficients.of(self.plan, self.letters)


def untrained(schedule: Schedule, nfe: int, solvers: Sequence[DiffusionSolver] | None = None) -> list[Start]:
    """Every sampler on every spacing that takes exactly `nfe` evaluations."""
    chosen = [make() for make in SAMPLERS] if solvers is None else solvers
    made = [Start(f"{plan.name}, {spacing}", plan, s) for s in chosen for spacing in SPACINGS
            if (plan := _plan_of(s, schedule, nfe, spacing)) is not None]  # fmt: skip
    if not made:
        raise InputError(f"start: got solvers none of which takes exactly {nfe} evaluations. Choose another nfe.")
    return made


def given(start: Any, schedule: Schedule, nfe: int) -> list[Start]:
    """The starts from a user's argument: a solver, a plan, or several."""
    listed = list(start) if isinstance(start, (list, tuple)) else [start]
    expected = "a diffusion solver, a plan, or a list of them"
    for one in _validation.check_sequence("start", listed, expected):
        _validation.check_instance("start", one, (Plan, DiffusionSolver), expected)
    plans = [s for s in listed if isinstance(s, Plan)]
    solvers = [s for s in listed if isinstance(s, DiffusionSolver)]
    for plan in plans:
        ends = float(plan.sigmas[0]), float(plan.sigmas[-1])
        if plan.nfe != nfe or ends != (float(sigma_grid(schedule, 1)[0]), 0.0):
            raise InputError(
                f"start: got {plan.name!r} of {plan.nfe} evaluations from {ends[0]:.4g} to {ends[1]:.4g}, expected "
                f"{nfe} from the schedule's {schedule.sigma_max:.4g} to 0."
            )
    own = [Start(plan.name, plan) for plan in plans]
    return own + (untrained(schedule, nfe, solvers) if solvers else [])


def _plan_of(solver: DiffusionSolver, schedule: Schedule, nfe: int, spacing: str) -> Plan | None:
    """The solver's plan of exactly so many evaluations, where there is one."""
    least = -(-nfe // solver.card.evaluations)
    for steps in (least, least + 1):
        try:
            plan = solver.plan(sigma_grid(schedule, steps, spacing), schedule)
        except InputError:  # more steps than the schedule has labels, or fewer than the solver takes
            continue
        if plan.nfe == nfe:
            return plan
    return None


def with_levels(start: Start, schedule: Schedule) -> Callable[[Tensor], Plan]:
    """The plan of a start's solver as a function of the inner levels of its grid."""
    solver, sigmas = start.solver, start.plan.sigmas
    assert solver is not None
    return lambda inner: solver.plan(torch.cat([sigmas[:1], inner, sigmas[-1:]]), schedule)
