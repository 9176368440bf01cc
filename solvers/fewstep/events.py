"""Events: the time at which a function of the state changes its sign, in each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _validation
from .errors import InputError
from .solver import Step

if TYPE_CHECKING:
    from .adaptive import Knot, Problem

Event = Callable[[Tensor, Tensor], Tensor]
# positions in a step at which the solver is asked: Chebyshev points, at which interpolation is stable
POINTS = [0.5 - 0.5 * torch.tensor(k * torch.pi / 8, dtype=torch.float64).cos().item() for k in range(9)]
SIGNS = [0.5, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.5]  # of the barycentric formula at these points
HALVINGS = 50  # to the resolution of float64


class Stopped:
    """The samples whose event has happened, with the times and the states.

    For an ODE the time is a root: the solver is asked at nine times of the step in which the sign changes, and the root
    is bisected on the polynomial through them. A path of an SDE has no derivative, and crosses again within any
    interval after a crossing: there the time is the end of the first step after which the sign has changed.

    Attributes:
        mask: (*batch) whether the event has happened.
        t: (*batch) float64, its time; nan where it has not.
        all: whether it has happened in every sample.
    """

    def __init__(self, event: Event, t: Tensor, y: Tensor, smooth: bool) -> None:
        self.event: Event = event
        self.smooth: bool = smooth
        self.sign: Tensor = self._value(t, y).sign()
        self.mask: Tensor = torch.zeros_like(self.sign, dtype=torch.bool)
        self.t: Tensor = torch.full(self.sign.shape, torch.nan, dtype=torch.float64, device=y.device)
        self.all: bool = False

    def _value(self, t: Tensor, y: Tensor) -> Tensor:
        value = self.event(t, y)
        batch = y.shape[: max(1, y.dim() - 1)]
        if not (isinstance(value, Tensor) and value.shape == batch[: value.dim()]):
            raise InputError(
                f"event: got {_validation.describe(value)} for y of shape {tuple(y.shape)}, expected one number per "
                "sample, (*batch,). Return for example y[..., 0]."
            )
        return value

    def update(self, step: Step, start: Knot, end: float, problem: Problem) -> Step:
        """The step with the samples that have stopped held where they did."""
        step = step._replace(y=torch.where(self._wide(self.mask, step.y), start.y, step.y))
        sign = self._value(problem.place(end), step.y).sign()
        crossed = ~self.mask & (self.sign != 0) & (sign != self.sign)
        # a value of 0 at the start is no crossing: the sign that follows counts
        self.sign = torch.where(sign == 0, self.sign, sign)
        happened, finished = torch.stack([crossed.any(), (crossed | self.mask).all()]).tolist()
        if not happened:
            return step
        self.all = finished
        t, y = self._root(step, start, end, problem) if self.smooth else (torch.full_like(self.t, end), step.y)
        self.mask, self.t = self.mask | crossed, torch.where(crossed, t, self.t)
        return step._replace(y=torch.where(self._wide(crossed, y), y, step.y))

    def _root(self, step: Step, start: Knot, end: float, problem: Problem) -> tuple[Tensor, Tensor]:
        """The root of each sample in a step and the state there, by bisection on a polynomial."""
        inner = [problem.step(start, start.t + c * (end - start.t)).y for c in POINTS[1:-1]]
        states = torch.stack([start.y, *inner, step.y])  # (9, *batch, *event)
        low, high = torch.zeros_like(self.t), torch.ones_like(self.t)
        with torch.no_grad():
            before = self._value(problem.place(start.t), start.y).sign()
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                late = self._value(self._time(start.t, end, middle), self._at(states, middle)).sign() != before
                low, high = torch.where(late, low, middle), torch.where(late, middle, high)
        return self._time(start.t, end, high), self._at(states, high)

    def _time(self, t: float, end: float, part: Tensor) -> Tensor:
        return t + (end - t) * part

    def _at(self, states: Tensor, part: Tensor) -> Tensor:
        """The polynomials at (*batch) positions in [0, 1], by the barycentric formula."""
        points = torch.tensor(POINTS, dtype=torch.float64, device=part.device)
        signs = torch.tensor(SIGNS, dtype=torch.float64, device=part.device)
        gaps = part.unsqueeze(-1) - points
        exact = gaps == 0
        weights = torch.where(exact.any(-1, keepdim=True), exact.to(gaps), signs / torch.where(exact, 1.0, gaps))
        weights = (weights / weights.sum(-1, keepdim=True)).movedim(-1, 0).to(states.dtype)
        return (self._wide(weights, states) * states).sum(0)

    def _wide(self, x: Tensor, like: Tensor) -> Tensor:
        return x.reshape(x.shape + (1,) * (like.dim() - x.dim()))
