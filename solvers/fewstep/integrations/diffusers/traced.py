"""Rows of a plan, and their noise, in a step of the scheduler that torch.compile traces.

As Python numbers the weights of a row would be constants of the program, and each row a program of its own. Here a row
is a line of a tensor with a column for each term that any row of the plan has: its weights are 0-d tensors, and one
program serves all rows. The numbers are those of an eager step to the bit, because terms of weight 0 add nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from ..._tracing import while_tracing
from ...executor import Normals, State
from ...plan import Combination, Plan
from ...plan_noise import PlanIncrements, at_least_float32, fresh_normals, own_path
from ...schedule import Schedule
from .configuration import generators_of, seeds_of

ANY, LATE, EARLY = range(3)  # when: whichever; at the row's evaluation; before its stage, which has normals


class TracedRow(NamedTuple):
    """A `Row` whose numbers are 0-d tensors."""

    stage: Combination
    update: Combination
    sigma: Tensor
    opens: Tensor  # ANY for a row that opens no noise interval, else when it does
    on_path: Tensor  # 0 for churn
    kept: tuple[int, int]  # evaluations and noise intervals of a state
    times: tuple[int, ...]  # when the rows of the plan draw normals

    @property
    def evaluations_kept(self) -> int:
        return self.kept[0]

    def start(self, x: Tensor, drawn: Normals) -> State:
        """The state at the first evaluation, from its input; normals of churn are left out."""
        # tensors of their own: torch.compile compiles again for each pattern of equal ones
        evaluations = tuple(torch.zeros_like(x) for _ in range(self.kept[0]))
        empty = [tuple(map(torch.zeros_like, drawn)) for _ in range(self.kept[1] - 1)]
        normals = (tuple(z * self.on_path for z in drawn), *empty) if drawn else ()
        return State(x / self.stage.scale, evaluations, normals)

    def begin(self, state: State, drawn: Normals, when: int) -> State:
        """The state with the normals drawn for the row, if it opens an interval then."""
        opens, kept = self.opens == when, state.normals
        shifted = zip((drawn, *kept[: self.kept[1] - 1]), kept)
        return state._replace(normals=tuple(tuple(torch.where(opens, *z) for z in zip(*two)) for two in shifted))

    def follow(self, state: State, before: Tensor, after: Tensor, keeps: bool) -> State:
        """`executor.follow`, or the state itself where a stage `keeps` it."""
        scale: Any = self.stage.scale
        terms = *self.stage.evaluations, *self.stage.normals
        if len(terms) == 0:
            return state._replace(x=after / scale)
        mixed, absent = has(terms), scale == 0
        scale = torch.where(absent, 1, scale)
        moved = state.x if keeps else torch.where(absent, state.x, state.x + (after - before) / scale)
        return state._replace(x=torch.where(mixed, moved, after / scale))

    def redirected(self, state: State, x0: Tensor, clipped: Tensor) -> tuple[State, Tensor]:
        """`executor.redirected`."""
        scale: Any = self.stage.scale
        weight: Any = self.update.evaluations[0][0]
        last = weight == 0
        keep = torch.where(last, 1, (self.update.scale / scale + weight) / torch.where(last, 1, weight))
        x = torch.where(last, state.x + (clipped - x0) / scale, state.x)
        return state._replace(x=x), torch.lerp(x0, clipped, keep.to(x0.dtype))


def has(terms: Sequence[Any]) -> Tensor:
    """Whether a row has any of these terms of its plan: a weight that is not 0."""
    return torch.stack([weight for weight, *_ in terms]).ne(0).any()


class Table(NamedTuple):
    """The rows of a plan as lines of a tensor, and one for the end of the run."""

    numbers: Tensor  # (R + 1, columns) float64
    number: int  # of the plan, for `row_normals`
    own: int  # columns that are not weights of the plan
    terms: tuple[tuple[tuple[int, ...], tuple[tuple[int, int], ...]], ...]  # of stages and of updates, see Combination
    kept: tuple[int, int]
    times: tuple[int, ...]
    on_path: bool  # whether any row draws from a Brownian path

    def line(self, row: int, device: torch.device) -> tuple[TracedRow, Sequence[Tensor]]:
        """A row, and the columns (R + 1, ...) that `table_of` got."""
        level, opens, on_path, *values = self.numbers.to(device)[row].unbind()
        given, weights = values[: self.own], values[self.own :]
        parts: list[Any] = []
        for evaluations, normals in self.terms:
            scale, *weights = weights
            many = len(evaluations)
            past = tuple((w, j) for w, j in zip(weights, evaluations))
            random = tuple((w, *at) for w, at in zip(weights[many:], normals))
            parts.append(Combination(scale, past, random))
            weights = weights[many + len(normals) :]
        return TracedRow(parts[0], parts[1], level, opens, on_path, self.kept, self.times), given


def table_of(plan: Plan, given: Tensor, schedule: Schedule) -> Table:
    """The table of a plan with columns (R + 1, n) of the caller; its path spans the schedule."""
    opens = [ANY if row.interval is None else EARLY if row.stage.normals else LATE for row in plan.rows]
    columns, terms = [plan.sigma, torch.tensor(opens).double(), plan.on_path.double()], []
    for part in ("stage", "update"):
        scale, past, random = (getattr(plan, f"{part}_{kind}").detach() for kind in ("x", "eval", "noise"))
        ages = [j for j in range(past.shape[1]) if past[:, j].any()]
        letters = [(j, k) for j in range(random.shape[1]) for k in range(random.shape[2]) if random[:, j, k].any()]
        columns += [scale, *(past[:, j] for j in ages), *(random[:, j, k] for j, k in letters)]
        terms.append((tuple(ages), tuple(letters)))
    rows = torch.stack(columns, 1)
    end = torch.zeros_like(rows[:1])
    end[:, 3] = 1  # the stage of the end is the state
    rows = torch.cat([rows, end])
    _plans[id(plan)], _schedules[plan] = plan, schedule
    kept = plan.update_eval.shape[1], plan.stage_noise.shape[1]
    whens = tuple(when for when in (LATE, EARLY) if when in opens)
    numbers = torch.cat([rows[:, :3], given, rows[:, 3:]], 1)
    return Table(numbers, id(plan), given.shape[1], tuple(terms), kept, whens, bool(plan.on_path.any()))


# Noise. The operator draws what an eager step draws, from the same generators in the same order: each draw depends on
# the state that the one before has led to.

_plans: WeakValueDictionary[int, Plan] = WeakValueDictionary()  # those of runs, by id
_schedules: WeakKeyDictionary[Plan, Schedule] = WeakKeyDictionary()
_paths: WeakKeyDictionary[Plan, tuple[Any, PlanIncrements]] = WeakKeyDictionary()  # the path of a plan's last run
_generators: list[torch.Generator | None] = [None]  # of compiled programs, which have no owner to free them


def numbered(generator: Any, batch: int) -> list[int]:
    """The numbers of a step's generators, constants of the program; others compile it again."""
    source = generators_of(generator, batch)
    many = source if isinstance(source, list) else [source]
    return [0 if one is None else _number_of(one, id(one)) for one in many]


@while_tracing
def _number_of(generator: torch.Generator, identity: int) -> int:
    found = [i for i, known in enumerate(_generators) if known is generator]
    if not found:
        _generators.append(generator)
    return found[0] if found else len(_generators) - 1


def _source(numbers: Sequence[int]) -> Any:
    """The generators with these numbers, as `fresh_normals` takes them."""
    many = [_generators[i] for i in numbers]
    return many[0] if len(many) == 1 else many


@torch.library.custom_op("fewstep::row_normals", mutates_args=())
def row_normals(
    generators: Sequence[int], seeds: Tensor | None, plan: int, row: int, when: int, like: Tensor, letters: int,
) -> list[Tensor]:  # fmt: skip
    """The unit normals of the interval that a row opens at this time, zeros where it opens none then."""
    own = _plans[plan]
    line = own.rows[row] if row < own.nfe else None
    if line is None or line.interval is None or when == (LATE if line.stage.normals else EARLY):
        return [at_least_float32(torch.zeros_like(like)) for _ in range(letters)]
    if seeds is None or line.interval[0] == line.interval[1]:
        return list(fresh_normals(like, _source(generators), letters))
    x = at_least_float32(like)
    key = (seeds.tolist(), x.shape, x.dtype, x.device)
    known, path = _paths.get(own, (None, None))
    if path is None or known != key:
        path = own_path(own, x, _schedules[own], key[0])
        _paths[own] = key, path
    return [z.to(x.dtype) for z in path.increment(*line.interval).coordinates()[:letters]]


@row_normals.register_fake
def _(
    generators: Sequence[int], seeds: Tensor | None, plan: int, row: int, when: int, like: Tensor, letters: int,
) -> list[Tensor]:  # fmt: skip
    return [at_least_float32(torch.empty_like(like)) for _ in range(letters)]


@torch.library.custom_op("fewstep::sample_seeds", mutates_args=())
def sample_seeds(generators: Sequence[int], batch: int) -> Tensor:
    """(batch,) one seed per sample, drawn as by an eager step."""
    return torch.tensor(seeds_of(_source(generators), batch))


@sample_seeds.register_fake
def _(generators: Sequence[int], batch: int) -> Tensor:
    return torch.empty(batch, dtype=torch.int64)
