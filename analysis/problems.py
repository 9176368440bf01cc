"""SDEs whose answers are known, or whose noise dominates enough that orders show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import SDE
from fewstep.errors import one_of


@dataclass(frozen=True)
class TestProblem:
    """An SDE with what a measurement needs to know of it.

    Attributes:
        name: how the command line calls it.
        sde: the equation.
        y0: (*event) the initial value of one path.
        t1: the end; time starts at 0.
        exact: `(y0, t, W_t) -> y_t` where there is a closed form along the path. Such problems cannot
            see a wrong space-time area.
    """

    __test__ = False  # not a test class, whatever pytest thinks of the name

    name: str
    sde: SDE
    y0: Tensor
    t1: float = 1.0
    exact: Callable[[Tensor, float, Tensor], Tensor] | None = None


def geometric_brownian_motion(mu: float = 0.5, sigma: float = 0.7) -> TestProblem:
    """dy = mu y dt + sigma y dW; y_t = y_0 exp((mu - sigma^2/2) t + sigma W_t)."""
    return TestProblem(
        "geometric_brownian_motion",
        SDE(lambda t, y: mu * y, lambda t, y: sigma * y),
        torch.ones(1, dtype=torch.float64),
        exact=lambda y0, t, W: y0 * torch.exp((mu - sigma**2 / 2) * t + sigma * W),
    )


def sine(a: float = 2.0, b: float = 0.8, c: float = 0.6) -> TestProblem:
    """dy = -a sin y dt + (b + c cos y) dW: non-linear, [f, g] != 0, noise from 0.2 to 1.4; no closed form."""
    return TestProblem(
        "sine",
        SDE(lambda t, y: -a * torch.sin(y), lambda t, y: b + c * torch.cos(y)),
        torch.full((1,), 0.4, dtype=torch.float64),
    )


def additive_sine() -> TestProblem:
    """dy = sin y dt + dW: additive noise and [f, g] != 0."""
    sde = SDE(
        lambda t, y: torch.sin(y), lambda t, y: torch.ones_like(y), noise_type="additive"
    )
    return TestProblem("additive_sine", sde, torch.full((1,), 0.4, dtype=torch.float64))


def ornstein_uhlenbeck(theta: float = 1.0, sigma: float = 0.8) -> TestProblem:
    """dy = -theta y dt + sigma dW: linear, and sees a wrong space-time area."""
    sde = SDE(
        lambda t, y: -theta * y, lambda t, y: torch.full_like(y, sigma), noise_type="additive"
    )
    return TestProblem("ornstein_uhlenbeck", sde, torch.ones(1, dtype=torch.float64))


PROBLEMS: dict[str, Callable[[], TestProblem]] = {
    f.__name__: f
    for f in (geometric_brownian_motion, sine, additive_sine, ornstein_uhlenbeck)
}


def by_name(name: str) -> TestProblem:
    """The problem of that name with its default parameters."""
    if name not in PROBLEMS:
        raise one_of("problem", name, PROBLEMS)
    return PROBLEMS[name]()
