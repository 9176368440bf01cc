"""torchsde's Brownian paths as paths of this library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..brownian import Increment
from ..errors import InputError


class TorchsdePath:
    """A `torchsde.BrownianInterval` behind this library's interface, for W and H of the very same path.

    H = U/h - W/2 where U is torchsde's integral of W - W(t0). Its areas `A` are not offered: in
    torchsde 0.2.6 they have the wrong variance and are not those of the path.

    Args:
        interval: made with `levy_area_approximation="space-time"` for H, or "none" for W alone.
    """

    def __init__(self, interval: Any) -> None:
        approximation = getattr(interval, "levy_area_approximation", None)
        if approximation is None:
            raise InputError(f"interval: got {type(interval).__name__}, wanted a torchsde.BrownianInterval.")
        self.interval = interval
        self.levy = "W" if approximation == "none" else "H"
        self.shape = tuple(interval.shape)
        self.dtype, self.device = interval.dtype, interval.device
        # the object keeps its ends to itself; they are only wanted for a check before work starts
        self.t0, self.t1 = float(interval._start), float(interval._end)

    def increment(self, t0: float, t1: float) -> Increment:
        """The increment of [t0, t1]."""
        if self.levy == "W":
            return Increment(t1 - t0, self.interval(t0, t1))
        W, U = self.interval(t0, t1, return_U=True)
        return Increment(t1 - t0, W, U / (t1 - t0) - W / 2)

    def increments(self, grid: Tensor) -> Iterator[Increment]:
        """The increments between neighbouring times of a grid."""
        times = torch.as_tensor(grid).tolist()
        return map(self.increment, times[:-1], times[1:])
