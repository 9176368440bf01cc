"""The conformance suite: what every solver of this library keeps, for yours to take as well.

    from fewstep.testing import check_solver
    check_solver(MySolver())

Orders are not checked here but measured: `fewstep.analysis.strong_order`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .brownian import AreaPath, BrownianPath, Increment
from .checks import instance
from .problem import NOISE_TYPES, ODE, SDE, SDE_TYPES
from .solve import solve
from .solver import Card, StochasticSolver

STEPS = 8


class ConformanceError(AssertionError):
    """A solver does not keep what its card or the contract says; names the solver, the case and the rule."""


def check_solver(solver: StochasticSolver) -> None:
    """Take a solver through the contract, on every noise type and calculus of its card.

    The card is whole; float32 and float64 are kept, and so is y's shape, of any event; drift is evaluated
    as often as declared; the step changes none of its arguments, gives the same again, and lives with no
    more of the increment than the card's `levy`; gradients reach y0; without noise, a small step follows
    the drift.

    Raises:
        ConformanceError: the first rule that is broken.
    """
    instance("solver", solver, StochasticSolver, "an SDE solver such as EulerMaruyama(), not its class")
    name = type(solver).__name__
    check_card(name, solver.card)
    for sde, case in cases(solver):
        for dtype in (torch.float32, torch.float64):
            _check_solve(solver, sde, f"{name}, {case}, {dtype}", dtype)
        _check_step(solver, sde, f"{name}, {case}")
    _check_drift(solver, name)


def check_card(name: str, card: Card) -> None:
    """The facts are there and of the words that loops understand."""
    rules = {
        "summary is empty": bool(card.summary),
        "reference names no equation, algorithm or table": re.search(r"Eq|Algorithm|Table|after|Section|Def",
                                                                     card.reference),
        f"levy is {card.levy!r}": card.levy in ("", "W", "H", "K", "A"),
        "evaluations is below 1": card.evaluations >= 1,
        "strong_order is empty": bool(card.strong_order),
        "strong_order has an unknown noise type": set(card.strong_order) <= set(NOISE_TYPES),
        "weak_order has other noise types than strong_order": set(card.weak_order)
        <= set(card.strong_order),
        "a weak order is below the strong one": all(
            order >= card.strong_order[noise] for noise, order in card.weak_order.items()
        ),
        "sde_types is empty or has an unknown calculus": bool(card.sde_types)
        and set(card.sde_types) <= set(SDE_TYPES),
    }  # fmt: skip
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


def _check_solve(solver: StochasticSolver, sde: SDE, case: str, dtype: torch.dtype) -> None:
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
    wanted = solver.card.evaluations * STEPS + started
    _require(
        got.nfe == wanted, f"{case}: {got.nfe} drift evaluations in {STEPS} steps, the card says {wanted}"
    )
    _require(got.y.dtype == dtype, f"{case}: the state came back as {got.y.dtype}")
    _require(got.y.shape == y0.shape, f"{case}: the state came back with shape {tuple(got.y.shape)}")
    _require(torch.equal(y0, kept), f"{case}: y0 was written to")
    again = solve(sde, solver, y0, grid, path=path)
    _require(torch.equal(again.y, got.y), f"{case}: two solves along one path differ")


def _check_step(solver: StochasticSolver, sde: SDE, case: str) -> None:
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
        first, _ = solver.step(sde, t0, t1, y, bare, carry)
    except (AssertionError, TypeError, AttributeError) as error:
        raise ConformanceError(f"{case}: the step wants more than levy={richest!r}: {error}") from error
    now = [v for v in (y, bare.W, bare.H, bare.K, bare.A) if v is not None]
    same = all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    _require(same, f"{case}: the step wrote to one of its arguments")
    second, _ = solver.step(sde, t0, t1, y, bare, carry)
    _require(torch.equal(first, second), f"{case}: the same step twice differs, so it keeps state")
    gradient = torch.autograd.grad(first.sum(), y)[0]
    _require(bool(gradient.isfinite().all() and (gradient != 0).all()), f"{case}: no gradient reaches y0")


def _check_drift(solver: StochasticSolver, name: str) -> None:
    """Without noise, (y1 - y0) / h is the drift to within h: for any kind of noise that it knows."""
    if "additive" not in solver.card.strong_order:
        return
    y0, h = torch.tensor([[0.7]], dtype=torch.float64), 2.0**-12
    y1 = solve(ODE(lambda t, y: torch.cos(y)), solver, y0, torch.tensor([0.0, h], dtype=torch.float64)).y
    speed = float((y1 - y0) / h)
    _require(abs(speed - float(torch.cos(y0))) < 10 * h, f"{name}: without noise it moves by {speed:g} h")


def _require(kept: bool, words: str) -> None:
    if not kept:
        raise ConformanceError(words)
