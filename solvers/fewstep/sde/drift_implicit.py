"""Steps whose drift is taken at their end, by Newton's method with batched Jacobians."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _validation
from ..brownian import Increment
from ..errors import InputError
from ..problem import SDE, plus
from ..solver import StochasticSolver

Residual = Callable[[Tensor], Tensor]
Root = Callable[[Residual, Tensor], Tensor]


class DriftImplicit(StochasticSolver):
    """A theta method: its options, and the equation of its step."""

    def __init__(self, theta: float = 1.0, iterations: int = 3, event_dims: int = 1, solve: Root | None = None) -> None:
        self.theta: float = _validation.check_float("theta", theta, expected="a number in (0, 1]")
        if not 0 < self.theta <= 1:
            raise InputError(f"theta: got {theta!r}, expected a number in (0, 1]. EulerMaruyama is the method for 0.")
        self.iterations: int = _validation.check_int("iterations", iterations)
        self.event_dims: int = _validation.check_int("event_dims", event_dims, 0)
        if solve is not None:
            _validation.check_callable("solve", solve, "a function (residual, guess) -> tensor")
        self.solve: Root | None = solve

    @property
    def evaluations(self) -> int:
        """Drift evaluations per step."""
        return self.iterations + (self.theta < 1)

    def solved(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, noise: Tensor) -> Tensor:
        """The root x of x = y + h ((1 - theta) f(t0, y) + theta f(t1, x)) + noise."""
        guess = y + noise
        known = plus(guess, (1 - self.theta) * increment.h, sde.drift(t0, y)) if self.theta < 1 else guess
        length = self.theta * increment.h

        def residual(x: Tensor) -> Tensor:
            return x - known - length * sde.drift(t1, x)

        if self.solve is not None:
            return self.solve(residual, guess)
        x = guess
        for _ in range(self.iterations):
            x = _newton(residual, x, min(self.event_dims, x.dim()))
        return x


def _newton(residual: Residual, x: Tensor, event_dims: int) -> Tensor:
    """Newton's iterate after x, where samples do not depend on each other and have `event_dims` trailing axes."""
    if event_dims == 0:  # the Jacobian is diagonal: its product with ones is the diagonal
        value, slope, *_ = torch.func.jvp(residual, (x,), (torch.ones_like(x),))
        return torch.sub(x, value / slope)
    event = x.shape[x.dim() - event_dims :]
    size = event.numel()
    units = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *[1] * (x.dim() - event_dims), *event)

    def column(unit: Tensor) -> tuple[Tensor, Tensor]:
        value, derivative, *_ = torch.func.jvp(residual, (x,), (unit,))
        return value, derivative

    # the value too has the axis of the units: in an outer vmap it could not be returned without
    values, columns = torch.func.vmap(column, randomness="same")(units.expand(size, *x.shape))
    jacobian = columns.reshape(size, -1, size).permute(1, 2, 0)
    # not linalg.solve, which reads back whether a matrix was singular
    change: Tensor = torch.linalg.solve_ex(jacobian, values[0].reshape(-1, size, 1))[0]
    return x - change.reshape(x.shape)
