"""Brownian increments that no one will ask for again, at the price of the normals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import _validation
from ..errors import InputError
from .increment import LEVY_ORDER, Increment, check_dtype, check_levy
from .random_normals import key_of, node_seed

_VARIANCES = (1.0, 1 / 12, 1 / 720)


class FreshIncrements:
    """Independent exact draws of (W, H, K), one interval after another. Not a refinable path.

    Args:
        shape: shape of W, batch axes first.
        levy: what is drawn: `"W"`, `"H"` (W and H) or `"K"` (W, H and K).
        seed: every `increments(grid)` starts from it anew, and so does `increment` in a new object.
        dtype: float32 or float64, by default torch's. The normals are float32 in either case, since
            float64 ones take six times as long.
        device: where they are made, by that device's own generator.
        reuse: let `increments` write each draw over the last one. Saves memory traffic; only for
            loops that keep neither the increments nor a graph through them.

    Raises:
        InputError: for arguments out of these ranges.
    """

    def __init__(
        self,
        shape: Sequence[int],
        levy: str = "W",
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        reuse: bool = False,
    ) -> None:
        self.shape: tuple[int, ...] = _validation.check_shape(shape)
        self.levy: str = check_levy(levy)
        self.dtype: torch.dtype = check_dtype(dtype)
        self.device: torch.device = _validation.check_device(device)
        self.seed: int = _validation.check_int("seed", seed, -math.inf)
        self.reuse = reuse
        self._next = itertools.count()

    def increment(self, t0: float, t1: float) -> Increment:
        """A draw over [t0, t1], independent of all others; InputError unless t0 < t1."""
        generator = self._generator(1 + next(self._next))
        return self._draw(_length(t0, t1), generator, self._buffers())

    def increments(self, grid: Tensor | Sequence[float]) -> Iterator[Increment]:
        """The n - 1 draws for `grid`, (n,) increasing times: the same ones each time it is called.

        Raises:
            InputError: at once, for a grid too short or not increasing.
        """
        times = _validation.check_numbers("grid", grid)
        if times.dim() != 1 or len(times) < 2:
            raise InputError(f"grid: got shape {tuple(times.shape)}, expected (n,) with n >= 2.")
        t = times.tolist()
        if not bool(times.isfinite().all()) or not bool((times.diff() > 0).all()):
            raise InputError(f"grid: got {t[:8]}, expected finite increasing times.")
        lengths = [_length(a, b) for a, b in itertools.pairwise(t)]
        return self._stream(lengths)

    def _stream(self, lengths: list[float]) -> Iterator[Increment]:
        generator, buffers = self._generator(0), self._buffers()
        for h in lengths:
            yield self._draw(h, generator, buffers if self.reuse else self._buffers())

    def _generator(self, stream: int) -> torch.Generator:
        # the CPU generator keeps 32 bits of a seed: hash, so that near seeds differ in them
        return torch.Generator(self.device).manual_seed(node_seed(key_of(self.seed), stream + 1))

    def _buffers(self) -> list[Tensor]:
        shape, count = self.shape, LEVY_ORDER[self.levy]
        return [torch.empty(shape, dtype=torch.float32, device=self.device) for _ in range(count)]

    def _draw(self, h: float, generator: torch.Generator, buffers: list[Tensor]) -> Increment:
        # The generator scales as it draws: no second pass over memory.
        for buffer, variance in zip(buffers, _VARIANCES, strict=False):
            buffer.normal_(0.0, math.sqrt(h * variance), generator=generator)
        if self.dtype == buffers[0].dtype:
            return Increment(h, *buffers)
        return Increment(h, *(b.to(self.dtype) for b in buffers))


def _length(t0: float, t1: float) -> float:
    h = _validation.check_float("t1", t1) - _validation.check_float("t0", t0)
    if not 0 < h < math.inf:
        raise InputError(f"time: got the interval [{t0!r}, {t1!r}], expected increasing times.")
    return h
