"""What a solve returns: states at chosen times, and the solution between them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _validation
from .adaptive import Run
from .brownian.time_scale import rounding
from .errors import InputError, StepSizeError
from .solver import Step

if TYPE_CHECKING:
    from .adaptive import Knot, Problem


@dataclass(frozen=True)
class Solution:
    """The result of a solve.

    Attributes:
        y: (*batch, *event) the final state.
        nfe: number of drift evaluations.
        grid: (n,) float64 times.
        ys: (k, *batch, *event) the states selected by `save`; None with `"last"`.
        carry: what the solver carries to a next step, for a solve that goes on from here; None for most solvers.
        ts: (k,) the float64 times of `ys`.
        accepted, rejected: the number of steps, with `steps=Adaptive(...)`.
        event_t: (*batch) float64, the time of each sample's event; nan where it has not happened.
        dense: with `dense=True`, a function of a time, or of (k,) times, inside the grid; also `sol(t)`.
    """

    y: Tensor
    nfe: int
    grid: Tensor
    ys: Tensor | None = None
    carry: Any = None
    ts: Tensor | None = None
    accepted: int | None = None
    rejected: int | None = None
    event_t: Tensor | None = None
    dense: Callable[[Any], Tensor] | None = None

    def __call__(self, t: float | Tensor | Sequence[float]) -> Tensor:
        """The state at a time (*batch, *event), or at (k,) times (k, *batch, *event).

        Raises:
            InputError: the solve had no `dense=True`, or a time outside of it.
        """
        if self.dense is None:
            raise InputError("t: got a time for a solution without its steps, expected one of solve(..., dense=True).")
        return self.dense(t)


class Dense:
    """The solution at any time: what the solver gives there, by one step from the last time of its own before.

    For an SDE that step takes the increment of the same path, so the states at any times are those of one solution.
    """

    def __init__(self, problem: Problem, knots: Sequence[Knot], dtype: torch.dtype) -> None:
        self.problem: Problem = problem
        self.knots: Sequence[Knot] = knots
        self.dtype: torch.dtype = dtype
        self.sign: float = math.copysign(1.0, knots[-1].t - knots[0].t)
        self.keys: list[float] = [self.sign * knot.t for knot in knots]

    def __call__(self, t: Any) -> Tensor:
        times = _validation.as_numbers("t", t).to("cpu", torch.float64)
        if times.dim() > 1:
            raise InputError(f"t: got {_validation.describe(t)}, expected a time or (k,) times.")
        states = [self._at(u) for u in times.reshape(-1).tolist()]
        return (torch.stack(states) if times.dim() else states[0]).to(self.dtype)

    def _at(self, t: float) -> Tensor:
        i = bisect_right(self.keys, self.sign * t) - 1
        first, last = self.knots[0].t, self.knots[-1].t
        if i < 0 or self.sign * (t - last) > 0 or math.isnan(t):
            raise InputError(f"t: got {t!r}, expected a time of the solution, {first!r} to {last!r}.")
        knot = self.knots[i]
        return knot.y if t == knot.t else self.problem.step(knot, t).y


def kept_indices(save: Any, count: int) -> Sequence[int]:
    """The indices of the grid whose states are kept."""
    if isinstance(save, str) and save in ("last", "all"):
        return range(count if save == "all" else 0)
    listed = isinstance(save, Sequence) and not isinstance(save, str) and len(save) <= count
    indices = list(save) if listed else []
    valid = all(type(i) is int and 0 <= i < count for i in indices)
    if not indices or not valid or indices != sorted(set(indices)):
        raise InputError(
            f"save: got {_validation.describe(save)}, expected 'last', 'all' or increasing indices, 0 to {count - 1}."
        )
    return indices


def with_outputs(ts: Any, save: Any, grid: Any, times: Tensor) -> tuple[Tensor, Sequence[int]]:
    """The times of the grid with those of ts, and the indices of ts in them."""
    if save != "last":
        raise InputError(
            f"ts: got times and save={save!r}, expected one of them. Omit save: `ys` are the states at ts."
        )
    if _validation.has_graph(_validation.as_numbers("grid", grid)):
        raise InputError("ts: got times for a grid that requires grad, expected none. Choose states of it by save=.")
    chosen = _validation.check_numbers("ts", ts)
    if chosen.shape != (1,):
        chosen = _validation.check_times("ts", ts, decreasing=bool(times[-1] < times[0]))
    slack = max(rounding(ts), rounding(grid))
    found = list(times.tolist())
    for t in chosen.tolist():
        near = min(found, key=lambda u: abs(u - t))
        if abs(near - t) > slack * max(abs(t), abs(near)):
            found.append(t)
    merged = torch.tensor(sorted(found, reverse=bool(times[-1] < times[0])), dtype=torch.float64)
    if len(merged) and (merged[0] != times[0] or merged[-1] != times[-1]):
        ends = [float(times[0]), float(times[-1])]
        raise InputError(f"ts: got times from {float(chosen[0])!r} to {float(chosen[-1])!r}, expected them in {ends}.")
    return merged, [int((merged - t).abs().argmin()) for t in chosen.tolist()]


def collected(
    steps: Iterator[Step], y0: Tensor, kept: Sequence[int], done: Callable[[Step, Sequence[Tensor]], Solution]
) -> tuple[Tensor, Solution]:
    """The last state and the solution; after an early end the states remain as they are."""
    at: Container[int] = kept if isinstance(kept, range) else frozenset(kept)
    step, ys = Step(y0), [y0] if 0 in at else []
    try:
        for i, step in enumerate(steps, 1):
            if i in at:
                ys.append(step.y)
    except StepSizeError as error:
        error.solution = done(Step(error.y), ys)
        raise
    return step.y, done(step, ys + [step.y] * (len(kept) - len(ys)))


def solution(
    calls: Sequence[None], times: Tensor, kept: Sequence[int], dtype: torch.dtype, run: Run | None, last: Step,
    ys: Sequence[Tensor],
) -> Solution:  # fmt: skip
    """The result of a solve in the dtype of its start."""
    more: dict[str, Any] = {"ts": times[list(kept[: len(ys)])]} if ys else {}
    if run is not None:
        times = torch.tensor(run.times, dtype=torch.float64)
        if run.control is not None:
            more |= {"accepted": len(run.times) - 1, "rejected": run.rejected}
        if run.stopped is not None:
            more["event_t"] = run.stopped.t
        if run.knots is not None and run.problem is not None:
            more["dense"] = Dense(run.problem, run.knots, dtype)
    stacked = torch.stack(list(ys)).to(dtype) if ys else None
    return Solution(last.y.to(dtype), len(calls), times, stacked, last.carry, **more)
