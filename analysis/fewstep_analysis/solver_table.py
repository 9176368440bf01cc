"""Tables made of the solvers' cards, with the measured order beside the declared one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fewstep
from fewstep import SDE, Solver, StochasticSolver, solve

from .convergence import strong_orders
from .parallel import is_first, progress
from .problems import JUDGES, TestProblem, judge
from .records import Record

# resolved: an editable install may see this file through a link, and the record belongs beside the source
MEASURED = Path(__file__).resolve().parent / "weights" / "orders.json"
COLUMNS = (
    "solver",
    "solves",
    "calculus",
    "needs",
    "strong order",
    "measured",
    "deterministic",
    "evaluations",
)


def cases(solvers: dict[str, type[Solver]] | None = None) -> Iterator[tuple[TestProblem, list[Any]]]:
    """Each judging problem, by noise and calculus, with the solvers whose cards say they can."""
    known = fewstep.solvers() if solvers is None else solvers
    for noise in JUDGES:
        for calculus in ("ito", "stratonovich"):
            if noise == "additive" and calculus == "stratonovich":
                continue  # the same equation
            able = [
                c for c in known.values()
                if plain(c) and noise in c.card.strong_order
                and (calculus in c.card.sde_types or noise == "additive")
            ]  # fmt: skip
            yield judge(noise, calculus), able


def measure_cards(paths: int = 8192, seed: int = 0, device: str = "cpu") -> Record:
    """The strong order of every stochastic solver on every noise and calculus its card lists.

    Kept are the mean of the two finest local slopes, which judges the card, and the fit's interval.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for problem, able in progress(list(cases()), "problem"):
        estimates = strong_orders(
            [c() for c in able], problem, levels=range(4, 9), paths=paths, reference="levels", seed=seed,
            device=device,
        )  # fmt: skip
        for c, e in zip(able, estimates, strict=True):
            orders = found.setdefault(c.__name__, {}).setdefault(e.noise_type, {})
            orders[e.sde_type] = [round(v, 3) for v in (sum(e.local[-2:]) / 2, e.low, e.high)]
    exact = {c.__name__: round(deterministic_order(c()), 3) for c in fewstep.solvers().values() if plain(c)}
    data = {"paths": paths, "levels": [4, 8], "strong": found, "deterministic": exact}
    return Record("card-orders", data, seed)


def deterministic_order(solver: StochasticSolver, levels: tuple[int, int] = (6, 7)) -> float:
    """The finest local slope on y' = sin(3t) - y^2 for four starts, against RK4 at 2^12 steps."""
    start = torch.tensor([[-0.3], [0.2], [0.5], [1.5]], dtype=torch.float64)

    def end(s: StochasticSolver, level: int) -> torch.Tensor:
        noise = "additive" if "additive" in s.card.strong_order else next(iter(s.card.strong_order))
        width = {"scalar": (1,), "general": (2,)}.get(noise, ())
        sde = SDE(_riccati, lambda t, y: y.new_zeros(*y.shape, *width), noise, s.card.sde_types[0])
        return solve(sde, s, start, torch.linspace(0, 1, 2**level + 1, dtype=torch.float64)).y

    truth = end(fewstep.RK4(), 12)
    coarse, fine = ((end(solver, n) - truth).norm() for n in levels)
    return float(torch.log2(coarse / fine))


def _riccati(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.sin(3 * t) - y * y


def remeasure(device: str = "cpu", seed: int = 0) -> None:
    """Measure every card again and keep the record."""
    record = measure_cards(seed=seed, device=device)
    if is_first():
        record.save(MEASURED)
        _measured.cache_clear()


def plain(solver: type[Solver]) -> bool:
    """Whether it is stochastic and can be made without arguments: learned steps need their network."""
    return issubclass(solver, StochasticSolver) and "__init__" not in vars(solver)


@cache
def _measured() -> dict[str, Any]:
    return Record.load(MEASURED).data if MEASURED.exists() else {}


def rows(solvers: dict[str, type[Solver]] | None = None) -> list[tuple[str, ...]]:
    """A row a solver, in the order of COLUMNS."""
    return [_row(n, c) for n, c in (fewstep.solvers() if solvers is None else solvers).items()]


def _row(name: str, solver: type[Solver]) -> tuple[str, ...]:
    card = solver.card
    solves = "diffusion model" if not card.strong_order else ", ".join(card.strong_order)
    if card.strong_order and hasattr(solver, "plan"):
        solves += " + diffusion model"
    declared = ", ".join(f"{v:g}" for v in card.strong_order.values()) or "-"
    strong = _measured().get("strong", {}).get(name, {})
    measured = ", ".join(_got(strong.get(n, {}), v) for n, v in card.strong_order.items()) or "-"
    order = "-" if card.deterministic_order is None else f"{card.deterministic_order:g}"
    exact = _measured().get("deterministic", {}).get(name)
    if exact is not None:
        order += f" ({exact:.2f})"
    calculus = "both" if len(set(card.sde_types)) > 1 else "".join(card.sde_types[:1]) or "-"
    return name, solves, calculus, card.levy or "-", declared, measured, order, str(card.evaluations)


def _got(by_calculus: dict[str, list[float]], declared: float) -> str:
    """The measured order; of two calculi the one that is further from the declared."""
    if not by_calculus:
        return "?"
    return f"{max((v[0] for v in by_calculus.values()), key=lambda v: abs(v - declared)):.2f}"


def text(table: Iterable[tuple[str, ...]]) -> str:
    """The table for a terminal."""
    lines = [COLUMNS, *table]
    widths = [max(len(line[k]) for line in lines) for k in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def markdown(table: Iterable[tuple[str, ...]]) -> str:
    """The table for the docs."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
