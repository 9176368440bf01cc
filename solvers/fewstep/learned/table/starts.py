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
from ...schedule import Schedule
from ...solver import DiffusionSolver
from ...untrained import untrained
from .coefficients import Coefficients


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


def usual(schedule: Schedule, nfe: int, solvers: Sequence[DiffusionSolver] | None = None) -> list[Start]:
    """Every untrained sampler that takes exactly `nfe` evaluations."""
    found = [u for u in untrained(schedule, nfe, solvers) if u.plan.nfe == nfe]
    if not found:
        raise InputError(f"start: got solvers none of which takes exactly {nfe} evaluations. Choose another nfe.")
    return [Start(f"{u.plan.name}, {u.spacing}", u.plan, u.solver) for u in found]


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
    return own + (usual(schedule, nfe, solvers) if solvers else [])


def with_levels(start: Start, schedule: Schedule) -> Callable[[Tensor], Plan]:
    """The plan of a start's solver as a function of the inner levels of its grid."""
    solver, sigmas = start.solver, start.plan.sigmas
    assert solver is not None
    return lambda inner: solver.plan(torch.cat([sigmas[:1], inner, sigmas[-1:]]), schedule)
