"""Several starts: short fits of each, the most promising ones to the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ...errors import InputError
from ...schedule import Schedule
from .coefficients import Coefficients
from .families import Family, Formula, Free
from .newton import Newton, levenberg_marquardt
from .objective import Objective
from .report import Errors
from .starts import Start, with_levels

FREE = ("weights", "scale", "given")
SCOUT = 8  # iterations of a short fit
FINALISTS, SEMIFINAL = 3, 12  # short fits that go on, and for how many iterations until one of them is left


@dataclass(frozen=True)
class Candidate:
    """A fit in progress.

    Attributes:
        name: of its start.
        family: the tables it moves among.
        run: its iterations so far.
    """

    name: str
    family: Family
    run: Newton

    @property
    def table(self) -> Coefficients:
        return self.family.table(self.run.numbers)


@dataclass(frozen=True)
class Search:
    """Fits of one objective under a guard.

    Attributes:
        base: errors that the median and the 90 % quantile on held-out states should not exceed.
        bounds: of the logarithms of levels.
        ahead: a stochastic table's rows read the interval that they are about to cross.
    """

    objective: Objective
    base: Errors
    bounds: tuple[float, float]
    ahead: bool

    def begun(self, name: str, family: Family, numbers: Tensor | None = None, iterations: int = 0) -> Candidate:
        """A candidate at these numbers, by default those that its family starts with."""
        at = family.start if numbers is None else numbers
        table = family.table(at)
        return Candidate(
            name, family, Newton(at, self._score(table), self.objective.value(table), 1e-3, at, iterations)
        )

    def continued(self, candidate: Candidate, iterations: int) -> Candidate:
        """The candidate after more iterations."""
        family, o = candidate.family, self.objective

        def value(numbers: Tensor) -> float:
            try:
                return o.value(family.table(numbers))
            except InputError:  # no table of this family
                return math.inf

        run = levenberg_marquardt(
            family, value, lambda v, i: o.equations(family, v, i), lambda v: self._score(family.table(v)), iterations,
            candidate.run,
        )  # fmt: skip
        return replace(candidate, run=run)

    def _score(self, c: Coefficients) -> float:
        """What decides which iterate and which candidate is kept; on held-out states."""
        held = self.objective.pairs.held
        if callable(self.objective.loss):
            return float(self.objective.losses(c, held).mean())
        errors = Errors.of(self.objective.squares(c, held), 0)
        return errors.excess(self.base)


def formula(start: Start, schedule: Schedule, bounds: tuple[float, float]) -> Formula | None:
    """The family of a start's levels, where it has a solver and inner levels."""
    if start.solver is None or len(start.plan.sigmas) < 3:
        return None
    return Formula(with_levels(start, schedule), start.plan.sigmas[1:-1], float(start.plan.sigmas[0]), bounds)


def searched(
    search: Search, starts: list[Start], schedule: Schedule, names: tuple[str, ...], iterations: int,
    note: Callable[[str], object],
) -> list[Candidate]:  # fmt: skip
    """The candidates, the best first. Short fits see one batch of states, the last ones all of them."""
    o = search.objective
    last, search = search, replace(search, objective=replace(o, fitted=o.fitted[: o.pairs.batch]))
    found, short = list[Candidate](), min(SCOUT, iterations)
    for start in starts:
        note(start.name)
        # where only some numbers are free, the levels of the grid are those of the start
        under = formula(start, schedule, search.bounds) if names in (("levels",), FREE) else None
        levels = None if under is None else search.continued(search.begun(f"{start.name}, levels only", under), short)
        if names == ("levels",):
            found += [] if levels is None else [levels]
            continue
        tables = {start.name: start.table} | ({} if levels is None else {f"{start.name}, levels first": levels.table})
        for name, table in tables.items():
            found.append(
                search.continued(search.begun(name, Free.of(table, names, search.bounds, search.ahead)), short)
            )
        found += [] if levels is None else [levels]
    found.sort(key=lambda c: c.run.score if math.isfinite(c.run.score) else math.inf)
    final = min(FINALISTS, len(starts))
    again = [last.begun(c.name, c.family, c.run.numbers, c.run.iterations) for c in found[:final]]
    again = sorted((last.continued(c, min(SEMIFINAL, iterations)) for c in again), key=lambda c: c.run.score)
    best = last.continued(again[0], max(0, iterations - SEMIFINAL))
    return [best, *again[1:], *found[final:]]
