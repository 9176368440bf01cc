"""The conformance suite: what every solver of this library keeps, for yours to take as well.

    from .testing import check_solver
    check_solver(MySolver())

Orders are not checked here but measured: `fewstep_analysis.strong_order`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import _validation
from .brownian import AreaPath, BrownianPath, Increment
from .grid import FINALS, sigma_grid
from .problem import ODE, SDE, DiffusionModel
from .sample import sample
from .schedule import DiscreteVP
from .solve import solve
from .solver import Card, DiffusionSolver, Solver, StochasticSolver

STEPS = 8


class ConformanceError(AssertionError):
    """A solver does not keep what its card or the contract says; names the solver, the case and the rule."""


def check_solver(solver: StochasticSolver | DiffusionSolver) -> None:
    """Take a solver through the contract: an SDE solver's steps, a diffusion solver's plans, or both.

    Steps, on every noise type and calculus of the card: float32 and float64 are kept, and so is y's shape,
    of any event; drift is evaluated as often as declared; the step changes none of its arguments, gives the
    same again, and lives with no more of the increment than the card's `levy`; gradients reach y0; without
    noise, a small step follows the drift. Plans, on grids of 1 to 12 steps: the same again, float32 and
    float64 are kept, and exact where the estimate of x0 never changes.

    Raises:
        InputError: no solver.
        ConformanceError: the first rule that is broken.
    """
    kinds = (StochasticSolver, DiffusionSolver)
    _validation.check_instance(
        "solver", solver, kinds, "a solver such as EulerMaruyama() or DDIM(), not its class"
    )
    name = type(solver).__name__
    _within(name, _check_card, solver)
    if isinstance(solver, StochasticSolver):
        for sde, case in cases(solver):
            for dtype in (torch.float32, torch.float64):
                _within(f"{name}, {case}, {dtype}", _check_solve, solver, sde, dtype)
            _within(f"{name}, {case}", _check_step, solver, sde)
        _within(f"{name}, without noise", _check_drift, solver)
    if isinstance(solver, DiffusionSolver):
        for steps, final in product((1, 2, 3, 4, 12), FINALS):
            _within(f"{name}, steps={steps}, final={final!r}", _check_plan, solver, steps, final)


def _within(case: str, check: Callable[..., None], *given: Any) -> None:
    """A check; whatever the solver raises there names the case."""
    try:
        check(case, *given)
    except ConformanceError:
        raise
    except Exception as error:
        raise ConformanceError(f"{case}: {type(error).__name__}: {error}") from error


def _check_card(name: str, solver: Solver) -> None:
    """The facts that a loop or a table needs are there; `Card` itself refuses wrong words."""
    card = getattr(solver, "card", None)
    if not isinstance(card, Card):
        raise ConformanceError(f"{name}: it has no card; write card = fewstep.Card(...) in the class")
    rules = {
        "summary is empty": bool(card.summary),
        "reference names no equation, algorithm or table": re.search(r"Eq|Algorithm|Table|after|Section|Def",
                                                                     card.reference),
        "weak_order has other noise types than strong_order": set(card.weak_order)
        <= set(card.strong_order),
        "a weak order is below the strong one": all(
            order >= card.strong_order.get(noise, 0) for noise, order in card.weak_order.items()
        ),
    }  # fmt: skip
    if isinstance(solver, StochasticSolver):
        rules |= {
            "strong_order is empty": bool(card.strong_order),
            "sde_types is empty": bool(card.sde_types),
        }
    for broken, kept in rules.items():
        _require(bool(kept), f"{name}, card: {broken}")


def cases(solver: StochasticSolver) -> Iterator[tuple[SDE, str]]:
    """An SDE for each noise type and calculus that the card lists, with its name."""
    for noise in solver.card.strong_order:
        for calculus in solver.card.sde_types:

            def drift(t: Tensor, y: Tensor) -> Tensor:
                return -torch.sin(y) * (1 + t)

            def diffusion(t: Tensor, y: Tensor, noise: str = noise) -> Tensor:
                return _diffusion(noise, t, y)

            yield SDE(drift, diffusion, noise, calculus), f"{noise} noise, {calculus}"


def _diffusion(noise: str, t: Tensor, y: Tensor) -> Tensor:
    if noise == "additive":
        return (1 + t) * torch.ones_like(y)
    if noise == "diagonal":
        return 0.2 * y
    if noise == "scalar":
        return 0.2 * y.unsqueeze(-1)
    return torch.stack([0.2 * y, (0.1 if noise == "commutative" else 0.1 * torch.cos(y)) * y], -1)


def path_for(solver: StochasticSolver, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A path over [0, 1] with just what the solver's card asks for."""
    levy = {"A": "H", "": "W"}.get(solver.card.levy, solver.card.levy)
    path = BrownianPath(shape, 0.0, 1.0, seed=1, levy=levy, dtype=dtype)
    return AreaPath(path, 4 * STEPS) if solver.card.levy == "A" else path


def _check_solve(case: str, solver: StochasticSolver, sde: SDE, dtype: torch.dtype) -> None:
    grid = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    y0 = torch.linspace(0.1, 1, 24, dtype=dtype).reshape(4, 2, 3)
    path = path_for(solver, sde.noise_shape(y0, sde.diffusion(y0.new_zeros(()), y0)), dtype)
    calls = [0]

    def counted(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return sde.drift(t, y)

    solver.init(replace(sde, drift=counted), y0.new_zeros(()), y0)
    started, kept = calls[0], y0.clone()
    got = solve(sde, solver, y0, grid, path=path, save="all")
    expected = solver.card.evaluations * STEPS + started
    _require(
        got.nfe == expected, f"{case}: {got.nfe} drift evaluations in {STEPS} steps, the card says {expected}"
    )
    _require(got.y.dtype == dtype, f"{case}: the state came back as {got.y.dtype}")
    _require(got.y.shape == y0.shape, f"{case}: the state came back with shape {tuple(got.y.shape)}")
    _require(torch.equal(y0, kept), f"{case}: y0 was written to")
    again = solve(sde, solver, y0, grid, path=path)
    _require(torch.equal(again.y, got.y), f"{case}: two solves along one path differ")


def _check_step(case: str, solver: StochasticSolver, sde: SDE) -> None:
    y = torch.linspace(0.1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
    t0, t1 = y.new_tensor(0.25), y.new_tensor(0.5)
    path = path_for(solver, sde.noise_shape(y, sde.diffusion(t0, y)), torch.float64)
    full = path.increment(0.25, 0.5)
    richest = solver.card.levy
    bare = Increment(
        full.h, full.W, full.H if richest in ("H", "K") else None, full.K if richest == "K" else None,
        full.A if richest == "A" else None,
    )  # fmt: skip
    kept = [v.clone() for v in (y, bare.W, bare.H, bare.K, bare.A) if v is not None]
    carry = solver.init(sde, t0, y)
    try:
        first = solver.step(sde, t0, t1, y, bare, carry).y
    except (AssertionError, TypeError, AttributeError) as error:
        raise ConformanceError(f"{case}: the step wants more than levy={richest!r}: {error}") from error
    now = [v for v in (y, bare.W, bare.H, bare.K, bare.A) if v is not None]
    same = all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    _require(same, f"{case}: the step wrote to one of its arguments")
    second = solver.step(sde, t0, t1, y, bare, carry).y
    _require(torch.equal(first, second), f"{case}: the same step twice differs, so it keeps state")
    gradient = torch.autograd.grad(first.sum(), y)[0]
    _require(bool(gradient.isfinite().all() and (gradient != 0).all()), f"{case}: no gradient reaches y0")


def _check_drift(case: str, solver: StochasticSolver) -> None:
    """Without noise, (y1 - y0) / h is the drift to within h: for any kind of noise that it knows."""
    if "additive" not in solver.card.strong_order:
        return
    y0, h = torch.tensor([[0.7]], dtype=torch.float64), 2.0**-12
    y1 = solve(ODE(lambda t, y: torch.cos(y)), solver, y0, torch.tensor([0.0, h], dtype=torch.float64)).y
    speed = float((y1 - y0) / h)
    _require(abs(speed - float(torch.cos(y0))) < 10 * h, f"{case}: it moves by {speed:g} h")


def _check_plan(case: str, solver: DiffusionSolver, steps: int, final: str) -> None:
    """Where D = c for ever, x - c is pure noise: it shrinks with sigma, and x = c stays."""
    schedule = DiscreteVP.named("linear")
    sigmas = sigma_grid(schedule, steps, final=final)
    kept, given = sigmas.clone(), (schedule,)
    plan, again = solver.plan(sigmas, *given), solver.plan(sigmas, *given)
    _require(torch.equal(sigmas, kept), f"{case}: it wrote to the grid")
    columns, others = plan.tensors(), again.tensors()
    same = all(torch.equal(v.nan_to_num(-1), others[k].nan_to_num(-1)) for k, v in columns.items())
    _require(same, f"{case}: two plans on one grid differ, so it keeps state")
    problem = DiffusionModel(lambda x, sigma: torch.full_like(x, 0.5), schedule)
    noise = torch.linspace(-2, 2, 24).reshape(4, 2, 3)  # alpha x, as networks know it
    for dtype in (torch.float32, torch.float64):
        x = sample(problem, plan, noise=noise.to(dtype))
        _require(x.dtype == dtype, f"{case}: samples of {dtype} came back as {x.dtype}")
    (first, last), noisy = (
        sigmas[[0, -1]],
        bool((plan.stage_noise != 0).any() or (plan.update_noise != 0).any()),
    )
    silent = replace(plan, stage_noise=0 * plan.stage_noise, update_noise=0 * plan.update_noise)
    # in float64: one step over all levels cancels most digits
    apart = torch.linspace(0 if noisy else -2, 0 if noisy else 2, 5, dtype=torch.float64)[:, None] * first
    x = sample(problem, silent, noise=(0.5 + apart) * schedule.alpha(first)) / schedule.alpha(last)
    error = float((x - 0.5 - apart * last / first).abs().max())
    _require(error < 1e-6, f"{case}: where the estimate of x0 never changes it ends {error:g} off")


def _require(kept: bool, words: str) -> None:
    if not kept:
        raise ConformanceError(words)
