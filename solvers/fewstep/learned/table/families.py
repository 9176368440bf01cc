"""Families of tables: coefficients as functions of the numbers that are fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...errors import InputError
from ...plan import Plan
from .coefficients import Coefficients

GAP = 0.02  # the least distance of two levels of a grid, in log sigma
SHIFT = 1e-6  # of a logarithm, in the central differences of a formula


class Family(Protocol):
    """Tables described by a vector of numbers."""

    @property
    def start(self) -> Tensor:
        """The numbers to begin with."""

    def table(self, numbers: Tensor) -> Coefficients:
        """The table."""

    def jacobian(self, numbers: Tensor) -> Tensor:
        """(coefficients, numbers) derivatives of the table's numbers."""

    def clamped(self, numbers: Tensor) -> Tensor:
        """The numbers, moved to where the network was trained."""


@dataclass(frozen=True)
class Free:
    """A table, and the directions (coefficients, numbers) in which it may move."""

    base: Coefficients
    directions: Tensor
    bounds: tuple[float, float]

    @classmethod
    def of(cls, base: Coefficients, names: Sequence[str], bounds: tuple[float, float], ahead: bool = True) -> Free:
        """Free by name: "weights" of earlier evaluations, "scale" of the first state and with it their sum, "given"
        levels of the network, and "noise": the normals of the intervals behind a row and, with `ahead`, of its own."""
        rows, columns = base.rows, base.weights.shape[1]
        unit = torch.eye(base.weights.numel() + rows, dtype=torch.float64)
        cells = unit[: base.weights.numel()].reshape(rows + 1, columns, -1)
        found = list[Tensor]()
        for i in range(1, rows + 1):
            if "scale" in names:
                found.append(cells[i, 0])
            if "weights" in names:
                past = cells[i, 1 : 1 + i]  # without "scale" a row keeps its sum
                found += list(past if "scale" in names else past[1:] - past[:1])
            if "noise" in names:
                seen = min(rows, i + ahead) * (columns - 1 - rows) // rows
                found += list(cells[i, 1 + rows : 1 + rows + seen])
        if "given" in names:
            found += list(unit[-rows:])
        return cls(base, torch.stack(found, 1), bounds)

    @property
    def start(self) -> Tensor:
        return torch.zeros(self.directions.shape[1], dtype=torch.float64)

    def table(self, numbers: Tensor) -> Coefficients:
        c = self.base.like(self.base.flat + self.directions @ numbers)
        return Coefficients(c.weights, c.levels.clamp(*self.bounds))

    def jacobian(self, numbers: Tensor) -> Tensor:
        return self.directions

    def clamped(self, numbers: Tensor) -> Tensor:
        beyond = self.base.like(self.base.flat + self.directions @ numbers).levels
        excess = self.directions[-len(beyond) :].T @ (beyond - beyond.clamp(*self.bounds))
        return numbers - excess


@dataclass(frozen=True)
class Formula:
    """A solver's formula on levels that are fitted, with levels that the network is given apart from them (LD3)."""

    plan_of: Callable[[Tensor], Plan]  # from the inner levels of its grid
    inner: Tensor
    first: float
    bounds: tuple[float, float]

    @property
    def start(self) -> Tensor:
        return torch.cat([self.inner.log(), torch.zeros(self.plan_of(self.inner).nfe, dtype=torch.float64)])

    def table(self, numbers: Tensor) -> Coefficients:
        count = len(self.inner)
        plan = self.plan_of(numbers[:count].exp())
        if plan.nfe != len(numbers) - count:
            raise InputError(f"{plan.name} takes another number of evaluations on these levels.")
        c = Coefficients.of(plan)
        return Coefficients(c.weights, (c.levels + numbers[count:]).clamp(*self.bounds))

    def jacobian(self, numbers: Tensor) -> Tensor:
        steps = SHIFT * torch.eye(len(numbers), dtype=torch.float64)
        gaps = [self.table(numbers + s).flat - self.table(numbers - s).flat for s in steps]
        return torch.stack(gaps, 1) / (2 * SHIFT)

    def clamped(self, numbers: Tensor) -> Tensor:
        count, low = len(self.inner), self.bounds[0]
        inner, above = numbers.clone(), math.log(self.first)
        for i in range(count):  # decreasing, with room for those that follow
            inner[i] = above = min(max(float(numbers[i]), low + GAP * (count - i)), above - GAP)
        return inner
