"""A run of the scheduler: the rows of its plan, and the state between two evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import executor
from ...denoiser import to_x0
from ...executor import Evaluate, Normals, State
from ...plan import Combination, Plan, Row
from ...plan_noise import PlanIncrements, at_least_float32
from ...schedule import Schedule
from .traced import ANY, EARLY, LATE, Table, TracedRow, table_of

END = Row(0.0, None, Combination(1.0, (), ()), Combination(1.0, (), ()), 0, 0)


class Entry(NamedTuple):
    """What a step needs of a row: Python numbers, or 0-d tensors in a compiled step."""

    at: int
    row: Any  # a `Row`, or a `TracedRow`
    label: Any
    scale: Any  # from x to the pipeline's state, alpha where that is alpha x
    numbers: Sequence[Any] = ()  # (p, q) that give x0 = p x + q output, and (p, q) that give the noise

    def read(self, sample: Tensor) -> Tensor:
        """x from the pipeline's state, in float32 at least."""
        x = at_least_float32(sample)
        return x if isinstance(self.scale, float) and self.scale == 1 else x / self.scale

    def write(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The pipeline's state from x."""
        return (x if isinstance(self.scale, float) and self.scale == 1 else x * self.scale).to(dtype)

    def stage(self, state: State) -> Tensor:
        """The input of the row's evaluation."""
        return executor.combine(self.row.stage, state)

    def start(self, x: Tensor, draw: Draw) -> State:
        """The state at the first evaluation of a run.

        The pipeline calls the network before the scheduler: the first input is the state itself, without the noise
        that a plan adds to it, and contains the churn of the first level.
        """
        row = self.row
        if isinstance(row, TracedRow):
            return row.start(x, draw(self, ANY) if row.times else ())
        state = executor.begin(row, executor.entered(row, x), lambda *_: draw(self, ANY))
        if row.interval is not None and row.interval[0] == row.interval[1]:
            state = state._replace(normals=(tuple(map(torch.zeros_like, state.normals[0])),))
        return state

    def follow(self, state: State, x: Tensor, dtype: torch.dtype, keeps: bool) -> State:
        """The state whose stage is the network's input x, which a pipeline may have edited.

        Args:
            keeps: edits of a stage that has evaluations or normals reach the network only.
        """
        row, pure = self.row, len(self.row.stage.evaluations) + len(self.row.stage.normals) == 0
        if keeps and not pure and isinstance(row, Row):
            return state
        # what was handed out, with its rounding to the pipeline's dtype
        before = x if pure else self.read(self.write(self.stage(state), dtype))
        if isinstance(row, TracedRow):
            return row.follow(state, before, x, keeps)
        return executor.follow(row, state, before, x)

    def redirected(self, state: State, x0: Tensor, clipped: Tensor) -> tuple[State, Tensor]:
        """The state and the evaluation that step from the clipped x0, see `executor.redirected`."""
        row = self.row
        if isinstance(row, TracedRow):
            return row.redirected(state, x0, clipped)
        return executor.redirected(row, state, x0, clipped)

    def begin(self, state: State, draw: Draw, when: int) -> State:
        """The state with the normals of the interval that the row opens, if it opens one then."""
        row = self.row
        if isinstance(row, TracedRow):
            return row.begin(state, draw(self, when), when) if when in row.times else state
        own = EARLY if row.stage.normals else LATE
        return executor.begin(row, state, lambda *_: draw(self, when)) if when == own else state


class Direct(NamedTuple):
    """A row of data prediction that reads the sample and its own evaluation alone, in the pipeline's coordinates.

    x0 = p sample + q output, and the next sample is a sample + b x0.
    """

    p: Any  # Python numbers, or 0-d tensors in a compiled step
    q: Any
    a: Any
    b: Any

    @classmethod
    def of(cls, row: Row, after: Row, scales: tuple[float, float], p: float, q: float) -> Direct | None:
        """The row before `after`, with the factors from x to the pipeline's state at both, if it is one of these."""
        stage, update, later = row.stage, row.update, after.stage
        if stage[1:] != ((), ()) or later[1:] != ((), ()) or update.normals or row.interval is not None:
            return None
        numbers = stage.scale, update.scale, later.scale, *(w for w, age in update.evaluations if age == 0)
        if len(update.evaluations) != 1 or len(numbers) != 4 or any(map(torch.is_tensor, numbers)) or not stage.scale:
            return None  # with a history, with a graph, or away from the sample
        enter, keep, leave, weight = map(float, numbers)
        here, there = scales
        return cls(p / here, q, keep * leave * there / (enter * here), weight * leave * there)

    def step(self, sample: Tensor, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The next sample and x0 in memory of their own, from the sample and from the same in float32 at least."""
        x0 = to_x0(x, output, self.p, self.q)
        new = to_x0(x, x0, self.a, self.b)
        return new.to(sample.dtype), x0.to(sample.dtype)


Draw = Callable[[Entry, int], Normals]
"""`(entry, when) -> unit normals` of the interval that a row opens then."""


class Run(NamedTuple):
    """A run between two evaluations; immutable, each step makes the next one."""

    plan: Plan  # the rows from entry `first` of the timesteps on
    first: int
    columns: list[list[float]]  # per row, and at the end: label, scale and numbers of an `Entry`
    direct: list[Direct]  # the rows, if all are such steps
    table: Table  # the columns for compiled steps, and the numbers of direct ones
    row: int = 0  # the next one
    state: State | None = None  # before that row; None before the first step
    path: PlanIncrements | Tensor | None = None  # in a compiled run its seeds
    evaluate: Evaluate | None = None  # a student's own network

    @classmethod
    def of(cls, plan: Plan, first: int, columns: Tensor, schedule: Schedule) -> Run:
        """The run of a plan, from columns (R + 1, 6) and the level to which its Brownian path reaches."""
        listed = columns.tolist()
        after = [*plan.rows[1:], END]
        found = [
            Direct.of(row, later, (here[1], there[1]), *here[2:4]) if plan.prediction == "data" else None
            for row, later, (here, there) in zip(plan.rows, after, pairwise(listed), strict=True)
        ]
        direct = [d for d in found if d is not None]
        if len(direct) < len(found):
            direct = []
        else:
            numbers = torch.tensor([*direct, [0.0] * 4], dtype=columns.dtype)
            columns = torch.cat([columns, numbers], 1)
        return cls(plan, first, listed, direct, table_of(plan, columns, schedule))

    def direct_row(self, device: torch.device) -> Direct | None:
        """The next row, if all rows are direct."""
        if not self.direct:
            return None
        if torch.compiler.is_compiling():
            return Direct(*self.table.line(self.row, device)[1][6:])
        return self.direct[self.row]

    @property
    def over(self) -> bool:
        return self.row == self.plan.nfe

    def entry(self, row: int, device: torch.device) -> Entry:
        """A row, or the end of the run."""
        if torch.compiler.is_compiling():
            line, given = self.table.line(row, device)
            return Entry(row, line, given[0], given[1], given[2:6])
        label, scale, *numbers = self.columns[row]
        return Entry(row, END if row == self.plan.nfe else self.plan.rows[row], label, scale, numbers)
