"""Tables made of the solvers' cards, with the measured order beside the declared one."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import fewstep
from fewstep import Solver, StochasticSolver

from .convergence import strong_orders
from .problems import JUDGES
from .records import Record

MEASURED = Path(__file__).parent / "weights" / "orders.json"
COLUMNS = ("solver", "solves", "needs", "strong order", "measured", "deterministic", "evaluations")


def measure_cards(paths: int = 4096, seed: int = 0) -> Record:
    """The strong order of every stochastic solver on every noise type its card lists."""
    found: dict[str, dict[str, list[float]]] = {}
    for noise, judge in JUDGES.items():
        able = {n: c for n, c in fewstep.solvers(noise).items() if _plain(c)}
        estimates = strong_orders(
            [c() for c in able.values()], judge(), levels=range(4, 9), paths=paths, reference="levels",
            seed=seed,
        )  # fmt: skip
        for name, e in zip(able, estimates, strict=True):
            found.setdefault(name, {})[noise] = [e.local[-1], e.local_low[-1], e.local_high[-1]]
    return Record("card-orders", {"paths": paths, "finest_local_slope": found}, seed)


def _plain(solver: type[Solver]) -> bool:
    """Whether it can be made without arguments: learned steps cannot, they need their network."""
    return issubclass(solver, StochasticSolver) and "__init__" not in vars(solver)


@cache
def _measured() -> dict[str, dict[str, list[float]]]:
    if not MEASURED.exists():
        return {}
    found: dict[str, dict[str, list[float]]] = Record.load(MEASURED).data["finest_local_slope"]
    return found


def rows(solvers: dict[str, type[Solver]] | None = None) -> list[tuple[str, ...]]:
    """A row a solver, in the order of COLUMNS."""
    return [_row(n, c) for n, c in (fewstep.solvers() if solvers is None else solvers).items()]


def _row(name: str, solver: type[Solver]) -> tuple[str, ...]:
    card = solver.card
    solves = "diffusion model" if not card.strong_order else ", ".join(card.strong_order)
    if card.strong_order and hasattr(solver, "plan"):
        solves += " + diffusion model"
    declared = ", ".join(f"{v:g}" for v in card.strong_order.values()) or "-"
    got = [_measured().get(name, {}).get(noise) for noise in card.strong_order]
    measured = ", ".join(f"{g[0]:.2f}" if g else "?" for g in got) or "-"
    order = "-" if card.deterministic_order is None else f"{card.deterministic_order:g}"
    return name, solves, card.levy or "-", declared, measured, order, str(card.evaluations)


def text(table: Iterable[tuple[str, ...]]) -> str:
    """The table for a terminal."""
    lines = [COLUMNS, *table]
    widths = [max(len(line[k]) for line in lines) for k in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def markdown(table: Iterable[tuple[str, ...]]) -> str:
    """The table for the docs."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
