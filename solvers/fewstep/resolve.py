"""From a solver and grid arguments to a plan, and from a model to the function that evaluates its rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import NoneType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from . import _validation
from ._tracing import apart, transformed, unwrapped, while_tracing
from ._validation import check_answer
from .catalog import written
from .denoiser import evaluation_names, on_levels, pairs_on_levels
from .errors import InputError
from .executor import Evaluate, Normals, Steered
from .grid import Spacing, check_sigmas, sigma_grid
from .plan import Plan
from .problem import DiffusionModel
from .schedule import Schedule
from .solver import DiffusionSolver, Solver, plain_options
from .traced_plan import TracedPlan, plan_numbered, same, traced_plan

T = TypeVar("T")


class Student(Protocol):
    """A learned solver: a plan, and a function that evaluates its rows in place of the model."""

    plan: Plan

    def evaluator(self, problem: DiffusionModel | None, like: Tensor) -> Evaluate: ...


AnySolver = Solver | Plan | Student


def carried_plan(solver: AnySolver) -> Plan | None:
    """The plan that a `Plan` or a student carries; None for a solver that makes a plan for each grid.

    Raises:
        InputError: a solver that has no plan.
    """
    if isinstance(solver, DiffusionSolver):
        return None
    plan = solver if isinstance(solver, Plan) else getattr(solver, "plan", None)
    if not isinstance(plan, Plan):
        if isinstance(solver, type) and issubclass(solver, DiffusionSolver):
            raise InputError(f"solver: got the class {solver.__name__}; expected an instance, {solver.__name__}().")
        raise InputError(
            f"solver: got {_validation.describe(solver)}, which has no plan; expected a diffusion solver, a Plan or a "
            "student. Of the SDE solvers EulerMaruyama, SEA, ShARK, SRA1 and SOSRA are diffusion solvers too."
            + written(solver)
        )
    return plan


def is_stochastic(solver: AnySolver) -> bool:
    """Whether the plans of a solver draw noise."""
    own = carried_plan(solver)
    return bool(own.levy) if own is not None else bool(solver.card.levy)  # type: ignore[union-attr]


def resolve(
    solver: AnySolver, schedule: Schedule | None, *, steps: int | None = None, sigmas: Any = None,
    timesteps: Any = None, spacing: Spacing = "logsnr", final: str = "x0", repeat: bool = False,
    keep: bool = False,
) -> tuple[Plan, Plan | Student]:  # fmt: skip
    """The plan of a solver on a grid, or the one that a `Plan` or a student carries, and what evaluates it.

    Args:
        schedule: the forward process; None where only `sigmas` are known.
        steps, sigmas, timesteps, spacing, final: the grid, as in `fewstep.sample`.
        repeat: accept `sigmas` whose last level appears twice.
        keep: one plan for all runs of equal solvers on the same levels; for callers that never pass it on.

    Raises:
        InputError: a solver without a plan, no grid, or a grid for something that carries a plan.
    """
    plan = carried_plan(solver)
    if plan is not None:
        chosen = [k for k, v, default in (("spacing", spacing, "logsnr"), ("final", final, "x0")) if v != default]
        if steps is not None or sigmas is not None or timesteps is not None or chosen:
            raise InputError(
                f"{chosen[0] if chosen else 'steps/sigmas'}: got a grid for {plan.name!r}, which carries its own grid "
                f"of {plan.nfe} evaluations. Omit the grid, or make a plan for the other grid."
            )
        if torch.compiler.is_compiling():
            plan = traced_plan(same, plan)
            return plan, plan if isinstance(solver, Plan) else solver  # type: ignore[return-value]
        return plan, solver  # type: ignore[return-value]
    if sigmas is None:
        if timesteps is not None:
            timesteps = _validation.check_numbers("timesteps", timesteps)  # read from its device once
            if not (steps := timesteps.numel()):
                raise InputError("timesteps: got none, expected decreasing model times of the evaluations.")
        if steps is None or schedule is None:
            raise InputError("steps: got None; expected steps=... or sigmas=... for the grid.")
    assert isinstance(solver, DiffusionSolver)
    repeat = repeat or solver.repeats_levels
    named: dict[str, Any] = {"sigmas": sigmas, "timesteps": timesteps, "spacing": spacing}
    tracing = torch.compiler.is_compiling()
    if tracing or transformed():
        named |= {k: unwrapped(k, _validation.check_numbers(k, v)) for k, v in named.items() if torch.is_tensor(v)}
    args = solver, schedule, steps, final, repeat, keep, *named.values()
    plan = traced_plan(made_plan, *args) if tracing else apart(made_plan, *args)
    return plan, plan


def made_plan(
    solver: DiffusionSolver, schedule: Schedule | None, steps: int | None, final: str, repeat: bool, keep: bool,
    sigmas: Any, timesteps: Any, spacing: Spacing,
) -> Plan:  # fmt: skip
    """The plan of a solver on a grid, see `resolve`."""
    options = _options(solver, schedule) if keep else None
    if options is not None and type(steps) in (int, NoneType) and isinstance(final, str) and isinstance(spacing, str):
        numbers = {"sigmas": sigmas, "timesteps": timesteps}
        read = [None if v is None else _validation.check_numbers(k, v) for k, v in numbers.items()]
        if all(v is None or v.dim() == 1 for v in read):
            lists = [None if v is None else tuple(v.tolist()) for v in read]
            return _kept(type(solver), options, schedule, steps, final, repeat, *lists, spacing)
    if sigmas is None:
        assert schedule is not None
        assert steps is not None
        sigmas = sigma_grid(schedule, steps, spacing, final, timesteps=timesteps)
    levels = check_sigmas(sigmas, repeat, rising=not is_stochastic(solver))
    return solver.plan(levels, schedule)


def _options(solver: DiffusionSolver, schedule: Schedule | None) -> tuple[tuple[str, Any], ...] | None:
    """What makes a solver of this library again, if its plans follow from that alone, numbers and words."""
    ours = schedule is None or type(schedule).__module__.partition(".")[0] == __package__
    if not ours or solver.warns or type(schedule).__hash__ is None:
        return None
    return plain_options(solver)


@lru_cache(maxsize=64)
def _kept(
    kind: type[DiffusionSolver], options: tuple[tuple[str, Any], ...], schedule: Schedule | None, steps: int | None,
    final: str, repeat: bool, sigmas: tuple[float, ...] | None, timesteps: tuple[float, ...] | None, spacing: Spacing,
) -> Plan:  # fmt: skip
    """A plan, which is immutable, for later runs on the same grid."""
    with torch.inference_mode(False):  # a later run may keep it for a backward pass
        levels = None if sigmas is None else torch.tensor(sigmas, dtype=torch.float64)
        times = None if timesteps is None else torch.tensor(timesteps, dtype=torch.float64)
        return made_plan(kind(**dict(options)), schedule, steps, final, repeat, False, levels, times, spacing)


def evaluator_of(problem: DiffusionModel, source: Plan | Student, like: Tensor, own: bool = True) -> Evaluate:
    """The function that evaluates a plan's rows: the model at its levels, or a student's own network.

    Each evaluation is checked and, with `own`, has memory of its own: models may write all outputs to one buffer.
    Without it the caller must be done with an evaluation before the next one.

    Raises:
        InputError: a plan that was fitted to another model; in a call, an output of another shape, device or precision.
    """
    if isinstance(source, (Plan, TracedPlan)):
        if source.fit is not None:
            source.fit.check(problem, like, source.name)
        predict = on_levels(problem.denoiser, source.sigma, like, source.prediction, own)
        return _leaving_input("model", predict)
    inner, names = source.evaluator(problem, like), evaluation_names(source.plan.sigma)

    def evaluate(i: int, x: Tensor, normals: tuple[Normals, ...]) -> Tensor:
        return check_answer("student", inner(i, x, normals), x, names[i]).clone()

    return _leaving_input("student", evaluate)


def _leaving_input(name: str, evaluate: Callable[..., T]) -> Callable[..., T]:
    """The function, with an `InputError` where it changes its input, which may be the state."""

    def checked(i: int, x: Tensor, normals: tuple[Normals, ...]) -> T:
        before = _validation.changes(x)
        out = evaluate(i, x, normals)
        _validation.check_unchanged(name, x, before)
        return out

    return checked


def steered_evaluator_of(problem: DiffusionModel, source: Plan | Student, like: Tensor) -> Steered:
    """`evaluator_of` for CFG++: the guided and the unconditional evaluation of a guided model."""
    if not isinstance(source, (Plan, TracedPlan)):
        raise InputError("cfg_pp: got True with a student, which replaces the model; expected a diffusion solver.")
    if isinstance(source, Plan):
        check_steers(source)
    else:
        _check_steers_number(source.number)
    predict = pairs_on_levels(problem.denoiser, source.sigma, like, source.prediction)
    return _leaving_input("model", lambda i, x, normals: predict(i, x))


def check_steers(plan: Plan) -> None:
    """Reject plans whose steps do not begin with an evaluation at the state, such as those with a corrector."""
    if sum(not row.stage.evaluations for row in plan.rows) != len(plan.sigmas) - 1:
        raise InputError(
            f"cfg_pp: got {plan.name!r}, whose steps do not begin with an evaluation of the state; expected a solver "
            "without corrector and restarts, such as DDIM, EDMEuler, DPMSolverPP or Ancestral(DPMSolverPP(...))."
        )


@while_tracing
def _check_steers_number(number: int) -> int:
    check_steers(plan_numbered(number))
    return number
