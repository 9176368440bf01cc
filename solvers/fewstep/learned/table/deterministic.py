"""Pairs of the probability-flow ODE: start states and the ends that a fine deterministic solver reaches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _validation
from ..._distributed import sum_over_processes
from ...errors import InputError
from ...grid import sigma_grid
from ...plan import Plan
from ...resolve import resolve
from ...samplers.unipc import UniPC
from ...schedule import Schedule
from ...solver import DiffusionSolver
from ..labelled_model import Model
from ..start_states import Work
from .objective import Pairs
from .setting import Setting
from .starts import given, usual

TEACHER_STEPS = 100


def deterministic(
    model: Model, noise: Tensor, nfe: int, start: Any, teacher: DiffusionSolver | None, steps: int | None, batch: int
) -> Setting:  # fmt: skip
    """The setting of a table without noise."""
    schedule = model.schedule
    pool = usual(schedule, nfe) if start is None else given(start, schedule, nfe)
    fine, half = _teacher(UniPC(3) if teacher is None else teacher, schedule, steps or TEACHER_STEPS)
    work = Work.of(model, noise, fine.ends[0], batch)
    pairs, distance = _pairs(work, fine, half)
    return Setting(pairs, pool, f"{fine.name}, {fine.nfe} steps", distance)


def _teacher(solver: Any, schedule: Schedule, steps: int) -> tuple[Plan, Plan]:
    """The teacher's plan, and the one of half as many steps."""
    _validation.check_instance("teacher", solver, DiffusionSolver, "a diffusion solver such as fewstep.UniPC(3)")
    plans = [resolve(solver, schedule, sigmas=sigma_grid(schedule, n))[0] for n in (steps, -(-steps // 2))]
    if plans[0].levy:
        raise InputError(f"teacher: got {plans[0].name!r}, which draws noise; expected a deterministic solver.")
    return plans[0], plans[1]


@torch.no_grad()
def _pairs(work: Work, fine: Plan, half: Plan) -> tuple[Pairs, float]:
    """The teacher's ends of all start states, and the distance of the half as fine teacher on held-out ones."""

    def ends(plan: Plan, which: Tensor) -> Tensor:
        out = torch.zeros_like(work.x)
        for index in work.share(which):
            out[index.to(out.device)] = work.ends(plan, index)
        return sum_over_processes(out)

    end = ends(fine, torch.arange(len(work.x)))
    if not bool(end.isfinite().all()):
        raise InputError("problem: its model gives values that are not finite for these start states.")
    at = work.held.to(end.device)
    gap = (ends(half, work.held)[at] - end[at]).double().square().mean().sqrt()
    normals = work.x.new_zeros(0, *work.x.shape)
    return Pairs(work.model, work.x, end, normals, work.kept, work.held, work.batch, work.spent), float(gap)
