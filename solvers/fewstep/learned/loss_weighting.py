"""How much an error made at a level matters to the sample in the end."""

from __future__ import annotations

from torch import Tensor

from ..errors import InputError


def left_at_end(ends: Tensor, sigmas: Tensor) -> Tensor:
    """(steps,) float64: the part of an error at each level that a stochastic sampler leaves at the end.

    Where the data are Gaussian with variance s^2 along a direction, dy = (D - y) d tau / tau takes an error
    made at level sigma to s^2 / (s^2 + sigma^2) of it; the probability-flow ODE, whose states are in
    proportion to sqrt(s^2 + sigma^2), to the square root of that. Data and errors lie along few directions:
    s^2 is the mean variance along them, each counted by its share of the whole, tr C^2 / tr C.

    Args:
        ends: (n, *event) some samples, at least two.
        sigmas: (steps,) the levels.

    Raises:
        InputError: there is one sample, or all are the same.
    """
    flat = ends.double().flatten(1)
    apart = flat - flat.mean(0)
    if not bool(apart.any()):  # asked once, before training
        raise InputError("data: got samples that are all the same, expected at least two that differ.")
    gram = apart @ apart.T / (len(flat) - 1)
    along = (gram.square().sum() / gram.trace()).to(sigmas.device)
    return along / (along + sigmas.double().square())
