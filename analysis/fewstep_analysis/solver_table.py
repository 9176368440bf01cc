"""The table of solvers: what each declares, next to the orders measured for it."""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fewstep
from fewstep import ODE, DiffusionSolver, StochasticSolver, solve
from fewstep._distributed import is_first
from fewstep._progress import progress
from fewstep.problem import CONSTANT
from fewstep.solver import Solver

from .convergence import strong_orders
from .problems import JUDGES, TestProblem, judge
from .records import Record

MEASURED = Path(__file__).parent / "weights" / "orders.json"
COLUMNS = ("solver", "solves", "calculus", "needs", "strong order", "measured", "deterministic", "evaluations")


def able(noise_type: str, sde_type: str) -> list[StochasticSolver]:
    """The solvers that declare to solve SDEs of this noise type and calculus."""
    return [
        s for s in fewstep.solvers(noise_type).values()
        if isinstance(s, StochasticSolver) and (sde_type in s.card.sde_types or noise_type in CONSTANT)
    ]  # fmt: skip


def cases() -> Iterator[tuple[TestProblem, list[StochasticSolver]]]:
    """Each judging problem, by noise type and calculus, with the solvers that declare to solve it."""
    for noise in JUDGES:
        for calculus in ("ito", "stratonovich"):
            if noise not in CONSTANT or calculus == "ito":  # without a calculus additive noise is one equation
                yield judge(noise, calculus), able(noise, calculus)


def remeasure(device: str = "cpu", seed: int = 0, paths: int = 8192) -> None:
    """Measure every SDE solver on every noise type and calculus of its card, and replace the shipped record.

    The record holds the mean of the two finest local slopes, which judges the card, and the interval of the fit.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    options: dict[str, Any] = dict(levels=range(4, 9), paths=paths, reference="levels", seed=seed, device=device)
    for problem, solvers in progress(list(cases()), "problem"):
        for e in strong_orders(solvers, problem, **options):
            orders = found.setdefault(e.solver, {}).setdefault(e.noise_type, {})
            orders[e.sde_type] = [round(v, 3) for v in (sum(e.local[-2:]) / 2, e.low, e.high)]
    known = {k: s for k, s in fewstep.solvers().items() if isinstance(s, StochasticSolver)}
    exact = {k: round(deterministic_order(s), 3) for k, s in known.items() if "none" in s.card.noise_types}
    data = {"paths": paths, "levels": [4, 8], "strong": found, "deterministic": exact}
    if is_first():
        Record("card-orders", data, seed).save(MEASURED)
        _measured.cache_clear()


def deterministic_order(solver: StochasticSolver, levels: tuple[int, int] = (6, 7)) -> float:
    """The local slope between two refinements on y' = sin(3t) - y^2 for four starts, against RK4 at 2^12."""
    ode = ODE(lambda t, y: torch.sin(3 * t) - y * y)
    start = torch.tensor([[-0.3], [0.2], [0.5], [1.5]], dtype=torch.float64)

    def end(s: StochasticSolver, level: int) -> torch.Tensor:
        return solve(ode, s, start, torch.linspace(0, 1, 2**level + 1, dtype=torch.float64)).y

    truth = end(fewstep.RK4(), 12)
    coarse, fine = ((end(solver, n) - truth).norm() for n in levels)
    return float(torch.log2(coarse / fine))


@cache
def _measured() -> dict[str, Any]:
    return Record.load(MEASURED).data if MEASURED.exists() else {}


def rows() -> list[tuple[str, ...]]:
    """One row per solver, in the order of COLUMNS."""
    return [_row(name, solver) for name, solver in fewstep.solvers().items()]


def _row(name: str, solver: Solver) -> tuple[str, ...]:
    card = solver.card
    solves = ", ".join(card.strong_order)
    if isinstance(solver, DiffusionSolver):
        solves = f"{solves} + diffusion model" if solves else "diffusion model"
    declared = ", ".join(f"{v:g}" for v in card.strong_order.values()) or "-"
    strong = _measured().get("strong", {}).get(name, {})
    measured = ", ".join(_furthest(strong.get(n, {}), v) for n, v in card.strong_order.items()) or "-"
    order = "-" if card.deterministic_order is None else f"{card.deterministic_order:g}"
    exact = _measured().get("deterministic", {}).get(name)
    if exact is not None:
        order += f" ({exact:.2f})"
    calculus = "both" if len(set(card.sde_types)) > 1 else "".join(card.sde_types[:1]) or "-"
    return name, solves, calculus, card.levy or "-", declared, measured, order, str(card.evaluations)


def _furthest(by_calculus: dict[str, list[float]], declared: float) -> str:
    """The measured order; of two calculi the one further from the declared order."""
    found = max((v[0] for v in by_calculus.values()), key=lambda v: abs(v - declared), default=None)
    return "?" if found is None else f"{found:.2f}"


def markdown(table: Iterable[tuple[str, ...]]) -> str:
    """The table in Markdown, for the documentation."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
