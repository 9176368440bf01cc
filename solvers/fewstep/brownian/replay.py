"""The increments over a grid again, in chunks, for a pass that goes back."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import _validation
from .._tracing import each_apart
from .fresh import Draws, FreshIncrements
from .increment import Increment


@dataclass(frozen=True)
class Noise:
    """A function that returns the increments of a path over a grid, from its start."""

    path: Any
    grid: Tensor

    def __call__(self) -> Iterable[Increment]:
        if _validation.has_graph(self.grid):  # of an ODE, whose lengths are not constant
            return self.path.increments(self.grid)  # type: ignore[no-any-return]
        return each_apart(self.path.increments, self.grid)


class Replay:
    """The increments over a grid in chunks of `size` steps: once in order, then again in any order.

    The first pass is one `path.increments(grid)`, whose numbers are those of a plain solve. A chunk of it is asked
    again of a path by its part of the grid, and of `FreshIncrements` by the state that its generator had there.
    """

    def __init__(self, noise: Noise, size: int) -> None:
        self.noise: Noise = noise
        self.size: int = size
        self.steps: int = len(noise.grid) - 1
        self._first: Iterator[Increment] | None = None
        self._states: list[list[Tensor]] = []
        self._done = 0

    def __len__(self) -> int:
        return -(-self.steps // self.size)

    def bounds(self, chunk: int) -> tuple[int, int]:
        """The first step of a chunk, and the first step after it."""
        return chunk * self.size, min((chunk + 1) * self.size, self.steps)

    def chunk(self, chunk: int) -> Iterator[Increment]:
        """The increments of a chunk; in the first pass, those of one must be used before the next one is asked."""
        if chunk < self._done:
            return self._again(chunk)
        self._done = chunk + 1
        if self._first is None:
            self._first = iter(self.noise())
        if isinstance(self._first, Draws):
            self._states.append(self._first.state)
        return itertools.islice(self._first, self.size)

    def _again(self, chunk: int) -> Iterator[Increment]:
        first, last = self.bounds(chunk)
        path, grid = self.noise.path, self.noise.grid[first : last + 1]
        if isinstance(path, FreshIncrements):
            return path.draws(_validation.check_times("grid", grid).diff().tolist(), self._states[chunk])
        return iter(path.increments(grid))
