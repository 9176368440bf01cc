"""Stochastic tables: rows that read the signature of coarse intervals, fitted to a fine teacher on the same paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _validation
from ...brownian.increment import LEVY_ORDER
from ...errors import InputError
from ...grid import sigma_grid
from ...samplers.dpm import DPMSolverSDE
from ...samplers.unipc import UniPC
from ...sde.euler_maruyama import EulerMaruyama
from ...sde.sea import SEA
from ...solver import DiffusionSolver
from ..labelled_model import Model
from ..start_states import Work
from ..training import held_out
from ..trajectories import checked_levels, make_trajectories
from .objective import Pairs
from .setting import Setting, intervals
from .starts import Start

TEACHER_STEPS = 300
SHIFT = 0.4  # of the grid, over the variance of the data


def coarse_levels(low: float, high: float, variance: float, steps: int) -> Tensor:
    """(steps + 1,) levels even in (tau + shift)^(-1/5), tau = 1/sigma^2, from the highest to the lowest.

    Within one Gaussian of variance 1/c the end is linear in the integral of dB/(tau + c). This spacing gives each step
    an equal part of what a step's W and H leave open of it; a shift below c takes the modes into account.
    """
    shift = SHIFT / variance
    first, last = ((s**-2.0 + shift) ** -0.2 for s in (high, low))
    u = first + (last - first) * torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    out: Tensor = (u**-5 - shift).rsqrt()
    out[0], out[-1] = high, low
    return out


def stochastic(
    model: Model, noise: Tensor, nfe: int, start: Any, teacher: DiffusionSolver | None, steps: int | None, batch: int,
    levy: str, sigmas: Tensor | None, seed: int,
) -> Setting:  # fmt: skip
    """The setting of a table that reads the signature of a path: one trajectory of the teacher for each start state."""
    _validation.check_choice("levy", levy, LEVY_ORDER)
    schedule, spent = model.schedule, [0]
    if sigmas is None:
        work = Work.of(model, noise, schedule.sigma_max, batch)
        grid = coarse_levels(schedule.sigma_min, schedule.sigma_max, _variance(work), nfe)
        spent = work.spent
    else:
        grid = checked_levels(sigmas)
        if len(grid) != nfe + 1:
            raise InputError(f"sigmas: got {len(grid)} levels, expected {nfe + 1}, those between {nfe} evaluations.")
    pool = _pool(start, grid, model, levy)
    substeps = max(1, round((steps or TEACHER_STEPS) / nfe))
    data = make_trajectories(
        model.problem, grid, count=len(noise), event_shape=tuple(noise.shape[1:]), substeps=substeps, teacher=teacher,
        levy=levy, labels=model.labels, seed=seed, device=noise.device,
    )  # fmt: skip
    made = data.pick(torch.arange(len(data))).to(noise.device)
    knots, xi = made.knots.to(noise.dtype), made.xi.to(noise.dtype)
    normals = xi.transpose(1, 2).flatten(0, 1)  # by interval, then by letter
    pairs = Pairs(model, knots[0], knots[-1], normals, *held_out(len(data)), batch, spent)
    name = f"{EulerMaruyama() if teacher is None else teacher}, {data.evaluations} evaluations"
    return Setting(pairs, pool, name, sigmas=grid, teacher_evaluations=data.evaluations)


@torch.no_grad()
def _variance(work: Work) -> float:
    """The variance of the data, from a few samples."""
    schedule = work.model.schedule
    index = torch.arange(min(work.batch, len(work.x)))
    plan = UniPC(2).plan(sigma_grid(schedule, 20), schedule)
    return float(work.ends(plan, index).double().var(0).mean().clamp(min=1e-6))


def _pool(start: Any, sigmas: Tensor, model: Model, levy: str) -> list[Start]:
    """The stochastic samplers of one evaluation per step on a coarse grid, or a user's."""
    listed = list(start) if isinstance(start, (list, tuple)) else [start]
    chosen: list[Any] = [EulerMaruyama(), SEA(), DPMSolverSDE(2), DPMSolverSDE(1)] if start is None else listed
    expected, found = intervals(sigmas), list[Start]()
    for solver in chosen:
        _validation.check_instance("start", solver, DiffusionSolver, "with levy a stochastic solver, or several")
        plan = solver.plan(sigmas, model.schedule)
        fits = plan.noise.shape == expected.shape and torch.allclose(plan.noise, expected, rtol=1e-9)
        if fits and LEVY_ORDER[plan.levy] <= LEVY_ORDER[levy]:
            found.append(Start(plan.name, plan, letters=LEVY_ORDER[levy]))
    if not found:
        raise InputError(
            f"start: got none that opens the intervals of the {len(sigmas) - 1} steps and reads no more than {levy!r}; "
            "expected a stochastic sampler of one evaluation per step, such as EulerMaruyama()."
        )
    return found
