"""SDEs whose answers are known, or whose noise dominates enough that orders show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fewstep import SDE
from fewstep.errors import one_of
from torch import Tensor


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
    sde = SDE(lambda t, y: torch.sin(y), lambda t, y: torch.ones_like(y), noise_type="additive")
    return TestProblem("additive_sine", sde, torch.full((1,), 0.4, dtype=torch.float64))


def ornstein_uhlenbeck(theta: float = 1.0, sigma: float = 0.8) -> TestProblem:
    """dy = -theta y dt + sigma dW: linear, and sees a wrong space-time area."""
    sde = SDE(lambda t, y: -theta * y, lambda t, y: torch.full_like(y, sigma), noise_type="additive")
    return TestProblem("ornstein_uhlenbeck", sde, torch.ones(1, dtype=torch.float64))


def scalar_pair() -> TestProblem:
    """Two components, one channel: dy = (-sin y_1, cos y_0) dt + (0.6 + 0.3 cos y_1, 0.5 sin y_0) dW."""

    def drift(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-torch.sin(y[..., 1]), torch.cos(y[..., 0])], -1)

    def diffusion(t: Tensor, y: Tensor) -> Tensor:
        columns = [0.6 + 0.3 * torch.cos(y[..., 1]), 0.5 * torch.sin(y[..., 0])]
        return torch.stack(columns, -1).unsqueeze(-1)

    start = torch.tensor([0.4, 0.9], dtype=torch.float64)
    return TestProblem("scalar_pair", SDE(drift, diffusion, noise_type="scalar"), start)


def noncommutative_pair() -> TestProblem:
    """Two components and channels whose vector fields do not commute: order 1 needs the Lévy area."""

    def drift(t: Tensor, y: Tensor) -> Tensor:
        return -torch.sin(y)

    def diffusion(t: Tensor, y: Tensor) -> Tensor:
        a, b = y[..., 0], y[..., 1]
        rows = [torch.stack([0.8 + 0 * a, 0.6 * torch.sin(b)], -1),
                torch.stack([0.5 * torch.cos(a), 0.7 + 0 * a], -1)]  # fmt: skip
        return torch.stack(rows, -2)

    start = torch.tensor([0.4, 0.9], dtype=torch.float64)
    return TestProblem("noncommutative_pair", SDE(drift, diffusion, noise_type="general"), start)


PROBLEMS: dict[str, Callable[[], TestProblem]] = {
    f.__name__: f
    for f in (
        geometric_brownian_motion, sine, additive_sine, ornstein_uhlenbeck, scalar_pair,
        noncommutative_pair,
    )
}  # fmt: skip

# the problem on which a card's order is judged: noise dominates and [f, g] != 0
JUDGES = {
    "diagonal": sine, "additive": additive_sine, "scalar": scalar_pair, "general": noncommutative_pair,
}  # fmt: skip


def by_name(name: str) -> TestProblem:
    """The problem of that name with its default parameters."""
    if name not in PROBLEMS:
        raise one_of("problem", name, PROBLEMS)
    return PROBLEMS[name]()
