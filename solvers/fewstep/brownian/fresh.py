"""Independent Brownian increments for a single solve; they cost no more than their normals."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import _validation
from .._tracing import made_outside, new_generator
from ..errors import InputError
from .bridge import VARIANCES
from .increment import LEVY_ORDER, Increment, check_dtype
from .levy_area import levy_area
from .random_normals import key_of, node_seed


class FreshIncrements:
    """Independent exact draws of (W, H, K), one interval after another. It is not a refinable path.

    Args:
        shape: shape of W, batch axes first.
        levy: what is drawn: `"W"`, `"H"` (W and H) or `"K"` (W, H and K).
        seed: each call of `increments(grid)` starts again from it, and so does `increment` of a new object.
        dtype: float32 or float64, by default torch's. The normals are float32 in either case, since
            float64 normals take six times as long.
        device: where they are drawn, by that device's own generator.
        reuse: let `increments` overwrite each draw with the next. Saves memory traffic; only for
            loops that keep neither the increments nor a graph through them.
        area: give each increment an area A with the right law (`levy_area` with method "foster").

    Raises:
        InputError: for invalid arguments.
    """

    def __init__(
        self, shape: Sequence[int], levy: str = "W", seed: int = 0, dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu", reuse: bool = False, area: bool = False,
    ) -> None:  # fmt: skip
        made_outside("path")
        self.shape: tuple[int, ...] = _validation.check_shape(shape)
        self.levy: str = _validation.check_choice("levy", levy, LEVY_ORDER)
        self.dtype: torch.dtype = check_dtype(dtype)
        self.device: torch.device = _validation.check_device(device)
        self.seed: int = _validation.check_seed(seed)
        self.reuse: bool = reuse
        self.area: bool = area
        self._next = itertools.count(2)

    def increment(self, t0: float, t1: float) -> Increment:
        """Return a draw over [t0, t1], independent of all others; raises InputError unless t0 < t1."""
        h = _validation.check_float("t1", t1) - _validation.check_float("t0", t0)
        if not 0 < h < math.inf:
            raise InputError(f"t0, t1: got {t0!r} and {t1!r}, expected increasing times.")
        generator = self._generator(next(self._next))
        return self._draw(h, generator, self._buffers(), generator)

    def increments(self, grid: Tensor | Sequence[float]) -> Iterator[Increment]:
        """Return the n - 1 draws for `grid`, (n,) increasing times (else InputError); the same in each call."""
        return self.draws(_validation.check_times("grid", grid).diff().tolist())

    def draws(self, lengths: Sequence[float], state: Sequence[Tensor] | None = None) -> "Draws":
        """Return the draws over intervals of these lengths, from the start or from the `state` of earlier draws."""
        return Draws(self, lengths, state)

    def _generator(self, stream: int) -> torch.Generator:
        # the CPU generator keeps 32 bits of a seed: hash, so that close seeds differ in them, and so that
        # no stream is the one that a user's own y0 was drawn from
        return new_generator(self.device).manual_seed(node_seed(key_of(self.seed), stream))

    def _buffers(self) -> list[Tensor]:
        return [torch.empty(self.shape, dtype=torch.float32, device=self.device) for _ in range(LEVY_ORDER[self.levy])]

    def _draw(self, h: float, generator: torch.Generator, buffers: list[Tensor], areas: torch.Generator) -> Increment:
        for buffer, variance in zip(buffers, VARIANCES):
            buffer.normal_(0.0, math.sqrt(h * variance), generator=generator)
        same = self.dtype == buffers[0].dtype
        drawn = Increment(h, *(buffers if same else [b.to(self.dtype) for b in buffers]))
        return replace(drawn, A=levy_area(drawn, "foster", areas)) if self.area else drawn


class Draws(Iterator[Increment]):
    """The draws of a `FreshIncrements`, one after another; `state` is where the next ones can be drawn again from."""

    def __init__(self, source: FreshIncrements, lengths: Sequence[float], state: Sequence[Tensor] | None) -> None:
        self.source: FreshIncrements = source
        self.generators: list[torch.Generator] = [
            source._generator(1),
            *([source._generator(0)] if source.area else []),
        ]
        for generator, start in zip(self.generators, state or ()):
            generator.set_state(start)
        self.lengths: Iterator[float] = iter(lengths)
        self.buffers: list[Tensor] | None = source._buffers() if source.reuse else None

    @property
    def state(self) -> list[Tensor]:
        """The states of the generators, 5 kB each on a CPU."""
        return [generator.get_state() for generator in self.generators]

    def __next__(self) -> Increment:
        h, source = next(self.lengths), self.source
        return source._draw(h, self.generators[0], self.buffers or source._buffers(), self.generators[-1])
