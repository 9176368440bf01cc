"""A plan walked by somebody who calls the network himself, as the owners of diffusers' `step` do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from ...executor import State, combine
from ...plan import Combination, Plan, Row

Draw = Callable[[float, float], tuple[Tensor, ...]]


class Walk:
    """Where a plan stands between two evaluations: the state, what it has seen, the row that is next.

    For each row call `enter` with the input that the network was given, then `leave` with what it said;
    the result is the next row's input, and after the last row the final state. The owner may change
    an input on the way: the change is carried on in the state.

    The first input is the given state itself: noise that a plan adds to look at its first level is left
    out there, and churn of the first level is taken to be in the given state already.

    Args:
        plan: the table.
        scale: (R + 1,) from x to the owner's state, alpha for states alpha x, at each row and at the end.
    """

    def __init__(self, plan: Plan, scale: list[float]) -> None:
        self.plan = plan
        self.rows: tuple[Row, ...] = plan.rows
        self.scale = scale
        self.row: int = 0
        # in the owner's coordinates
        self.looks: list[Combination] = [_scaled(row.stage, s) for row, s in zip(plan.rows, scale)]
        self.x: Tensor | None = None
        self.history: deque[Tensor] = deque(maxlen=plan.update_eval.shape[1])
        self.normals: deque[tuple[Tensor, ...]] = deque(maxlen=plan.stage_noise.shape[1])
        self._handed: Tensor | None = None  # the input as it was given out
        self._opened = 0  # rows whose noise is drawn

    @property
    def over(self) -> bool:
        """Whether all rows are done."""
        return self.row == len(self.rows)

    def enter(self, given: Tensor, draw: Draw) -> Tensor:
        """The row's input in x, from the owner's; the state follows what the owner has changed."""
        at = given if self.scale[self.row] == 1 else given / self.scale[self.row]
        at = at.float() if at.dtype in (torch.float16, torch.bfloat16) else at
        scale, past, random = self.looks[self.row]
        if self.x is None or not (past or random):
            whole = given.to(at.dtype)
            self.x = at if scale == self.scale[self.row] else whole if scale == 1 else whole / scale
        elif scale != 0 and self._handed is not None:
            self.x = torch.add(self.x, (given - self._handed).to(at.dtype), alpha=1 / scale)
        self._open(self.row, draw)
        return at

    def leave(self, seen: Tensor, draw: Draw, dtype: torch.dtype) -> Tensor:
        """The next input in the owner's coordinates and dtype; seen is what `plan.prediction` names."""
        assert self.x is not None
        self.history.appendleft(seen)
        self.x = combine(self.rows[self.row].update, State(self.x, tuple(self.history), tuple(self.normals)))
        self.row += 1
        if self.over:
            self._handed = (self.x if self.scale[-1] == 1 else self.x * self.scale[-1]).to(dtype)
            return self._handed
        if self.looks[self.row].normals:
            self._open(self.row, draw)
        self._handed = combine(
            self.looks[self.row], State(self.x, tuple(self.history), tuple(self.normals))
        ).to(dtype)
        return self._handed

    def _open(self, row: int, draw: Draw) -> None:
        interval = self.rows[row].interval
        if self._opened > row or interval is None:
            return
        self._opened = row + 1
        normals = draw(*interval)
        if row == 0 and interval[0] == interval[1]:
            normals = tuple(torch.zeros_like(z) for z in normals)
        self.normals.appendleft(normals)


def _scaled(look: Combination, scale: float) -> Combination:
    """A combination times a number; a product of inverses is 1."""
    whole = look.scale * scale
    return Combination(
        1.0 if abs(whole - 1) < 1e-12 else whole,
        tuple((w * scale, j) for w, j in look.evaluations),
        tuple((w * scale, j, k) for w, j, k in look.normals),
    )
