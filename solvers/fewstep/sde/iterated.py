"""Iterated integrals of the noise over a step, and the derivatives that they multiply."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._tracing import transformed
from ..brownian import Increment
from ..problem import CONSTANT, SDE, diffuse


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


def diffusion_and_slope(sde: SDE, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal noise: g, and the derivative of each entry of g with respect to its own entry of y."""
    if sde.derivative is not None:
        return sde.diffusion(t, y), sde.derivative(t, y)
    # the Jacobian is diagonal: its product with ones, from either side, is the diagonal
    if _by_torch_func(y):
        g, pull, *_ = torch.func.vjp(lambda x: sde.diffusion(t, x), y)
        return g, pull(torch.ones_like(g))[0]
    keep, x, g = _graph(sde, t, y)
    if not g.requires_grad:  # a constant, or computed without a graph
        g, slope, *_ = torch.func.jvp(lambda x: sde.diffusion(t, x), (y,), (torch.ones_like(y),))
        return g, slope
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(g, x, torch.ones_like(g), create_graph=keep, materialize_grads=True)
    return g if keep else g.detach(), slope


def diffusion_and_bracket(sde: SDE, t: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix noise: g, and sum_ij D g_j(y) g_i w_ij for weights w (*batch, m, m)."""
    if not _by_torch_func(y):
        keep, x, g = _graph(sde, t, y)
        if g.requires_grad:
            with torch.enable_grad():
                # a derivative along d from two in reverse mode: u -> u' Dg is linear, and its transpose is Dg
                u = torch.zeros_like(g, requires_grad=True)
                (pulled,) = torch.autograd.grad(g, x, u, create_graph=True, allow_unused=True)
                g = g if keep else g.detach()
                if pulled is None:  # g does not depend on y
                    return g, torch.zeros_like(y)
                options: dict[str, Any] = {"retain_graph": True, "create_graph": keep, "allow_unused": True}
                columns = (g @ weights).unbind(-1) if pulled.requires_grad else ()
                found = [torch.autograd.grad(pulled, u, d.expand_as(y), **options)[0] for d in columns]
            if found and all(column is not None for column in found):
                return g, sum((column[..., j] for j, column in enumerate(found)), torch.zeros_like(y))
            # a function of the user's has no second derivative
    g = sde.diffusion(t, y)
    total = torch.zeros_like(y)
    for j, d in enumerate((g @ weights).unbind(-1)):

        def column(x: Tensor, j: int = j) -> Tensor:
            return sde.diffusion(t, x)[..., j]

        total = total + torch.func.jvp(column, (y,), (d.expand_as(y).contiguous(),))[1]
    return g, total


def milstein_noise(sde: SDE, t: Tensor, y: Tensor, increment: Increment) -> Tensor:
    """What the noise adds in a step of Milstein's method, for noise that commutes."""
    if sde.noise_type == "diagonal":
        g, slope = diffusion_and_slope(sde, t, y)
        return g * torch.addcmul(increment.W, slope, iterated(increment, sde))
    if sde.noise_type in CONSTANT:
        return diffuse(sde.diffusion(t, y), increment.W)
    g, bracket = diffusion_and_bracket(sde, t, y, pairs(increment, sde))
    return diffuse(g, increment.W) + bracket


def check_differentiable(sde: SDE, t: Tensor, y: Tensor) -> None:
    """Call the diffusion in a transform, which refuses functions that write to one buffer, or two, or leave torch."""
    if sde.derivative is None and sde.noise_type not in CONSTANT and not _by_torch_func(y):
        for _ in range(2):
            torch.func.vjp(lambda x: sde.diffusion(t, x), y.detach())


def _by_torch_func(y: Tensor) -> bool:
    """Whether derivatives must be those of torch.func, which cost several times more for small states."""
    dual = forward_ad._current_level >= 0  # what the diffusion reads may have a tangent, too
    return (
        torch.compiler.is_compiling() or transformed() or torch.is_inference_mode_enabled() or y.is_inference() or dual
    )


def _graph(sde: SDE, t: Tensor, y: Tensor) -> tuple[bool, Tensor, Tensor]:
    """Whether g has a graph that the caller keeps; a tensor equal to y; g with a graph to it."""
    keep = torch.is_grad_enabled() and (y.requires_grad or sde.diffusion(t, y).requires_grad)
    with torch.enable_grad():
        # another tensor than y, which the diffusion may use in other ways
        x = y.view_as(y) if keep and y.requires_grad else y.detach().requires_grad_()
        return keep, x, sde.diffusion(t, x)
