"""The border: whatever a network predicts becomes `denoiser(x, sigma) -> x0`, once."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .problem import Denoiser
from .schedule import Schedule

Model = Callable[[Tensor, Tensor], Tensor]


def from_epsilon(model: Model, schedule: Schedule) -> Denoiser:
    """A network trained to predict the noise, `model(x_t, t) -> eps` with t of shape (batch,).

    x_t = alpha_t x0 + sigma_t eps, hence x0 = x - sigma eps in variance-exploding coordinates.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.double()
        t = schedule.time(level).to(x.dtype).expand(len(x))
        eps = model(schedule.alpha(level).to(x.dtype) * x, t)
        return x - sigma * eps

    return denoise
