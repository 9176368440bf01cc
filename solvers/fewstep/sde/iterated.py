"""Iterated integrals of the noise over a step, and the derivatives that they multiply."""

import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import SDE


def iterated(increment: Increment, sde: SDE) -> Tensor:
    """int W dW per channel: (W^2 - h)/2 in Itô's calculus, W^2/2 in Stratonovich's."""
    square = increment.W.square()
    return 0.5 * (square - increment.h if sde.sde_type == "ito" else square)


def pairs(increment: Increment, sde: SDE) -> Tensor:
    """The symmetric parts of the iterated integrals (*W.shape, m), sufficient if the noise commutes."""
    W = increment.W.unsqueeze(-1)
    square = W * W.mT
    if sde.sde_type == "ito":
        square = square - increment.h * torch.eye(W.shape[-2], dtype=W.dtype, device=W.device)
    return 0.5 * square


def along_channels(sde: SDE, t: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """Return sum_j D g_j(y) d_j, one forward-mode derivative per channel, for directions d (*y.shape, m)."""
    total = torch.zeros_like(y)
    for j in range(directions.shape[-1]):

        def column(x: Tensor, j: int = j) -> Tensor:
            return sde.diffusion(t, x)[..., j]

        total = total + torch.func.jvp(column, (y,), (directions[..., j].expand_as(y).contiguous(),))[1]
    return total
