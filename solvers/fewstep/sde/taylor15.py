from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vmap

from ..brownian import Increment
from ..problem import CONSTANT, SDE, diffuse
from ..solver import Card, Step, StochasticSolver


class Taylor15(StochasticSolver):
    r"""The strong Itô-Taylor scheme of order 1.5, with derivatives by automatic differentiation.

    .. math:: y_{n+1} = y_n + h f + g W + \tfrac12 L^1 g (W^2 - h) + L^1 f Z + \tfrac12 h^2 L^0 f
              + L^0 g (W h - Z) + \tfrac12 L^1 L^1 g \big(\tfrac13 W^2 - h\big) W,

    with L^1 = g d/dy, L^0 = d/dt + f d/dy + (1/2) g^2 d^2/dy^2 and Z = int W ds = h (W/2 + H).

    - Strong order: 1.5 for diagonal, scalar and additive noise.
    - Cost per step: 3 drift evaluations, the last with second derivatives along all channels by vmap,
      which is expensive for many channels. Lévy data: W, H. Calculus: Itô.
    - The scheme that others are derived from; `SRID2` has its order without derivatives. Components of
      elementwise noise are on the last axis; the axes before it are batch.
    - Source: Kloeden & Platen 1992, Eqs. (10.4.1), (10.4.6).
    """

    card: Card = Card(
        summary="strong Ito-Taylor scheme of order 1.5, derivatives by autograd",
        reference="Kloeden & Platen 1992, Eqs. (10.4.1), (10.4.6)",
        levy="H",
        sde_types=("ito",),
        strong_order={"diagonal": 1.5, "scalar": 1.5, "additive": 1.5},
        weak_order={"diagonal": 2.0, "scalar": 2.0, "additive": 2.0},
        deterministic_order=2.0,
        evaluations=3,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        h, W, Z = increment.h, increment.W, increment.U
        one = torch.ones_like(t0)
        f, g = sde.drift(t0, y), sde.diffusion(t0, y)
        # h^2/2 (f_t + f_y f) + f_y g Z in one derivative; then h^2/4 sum_j f_yy [g_j, g_j]
        direction = 0.5 * h * h * f + diffuse(g, Z).contiguous()
        moved = jvp(sde.drift, (t0, y), (0.5 * h * h * one, direction))[1]
        bent = vmap(lambda c: curvature(lambda x: sde.drift(t0, x), y, c)[1])(columns(sde, g, y)).sum(0)
        g_t = jvp(lambda t: sde.diffusion(t, y), (t0,), (one,))[1]
        new = y + f * h + diffuse(g, W) + moved + 0.25 * h * h * bent + diffuse(g_t, W * h - Z)
        if sde.noise_type in CONSTANT:
            return Step(new)

        def field(x: Tensor) -> Tensor:
            return sde.diffusion(t0, x).reshape(y.shape)  # drops the channel axis of scalar noise

        # with D = g_y and C = g_yy [g, g]: L1 g = D g, L1 L1 g = C + D D g, L0 g = g_t + D f + C/2
        L1g, C = curvature(field, y, field(y))
        I111, I01 = 0.5 * (W**2 / 3 - h) * W, W * h - Z
        D = jvp(field, (y,), ((I111 * L1g + I01 * f).contiguous(),))[1]
        return Step(new + 0.5 * L1g * (W**2 - h) + D + (I111 + 0.5 * I01) * C)


def curvature(f: Callable[[Tensor], Tensor], y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return f_y v and f_yy [v, v]."""
    both = jvp(lambda x: jvp(f, (x,), (v,))[1], (y,), (v,))
    return both[0], both[1]


def columns(sde: SDE, g: Tensor, y: Tensor) -> Tensor:
    """The vector fields of g, (m, *y.shape); for elementwise noise one per entry of the last axis."""
    if g.dim() == y.dim() + 1:
        return g.expand(*y.shape, g.shape[-1]).movedim(-1, 0).contiguous()
    units = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    fields = units.reshape(-1, *(1,) * (y.dim() - 1), y.shape[-1]) * g
    return fields.expand(-1, *y.shape).contiguous()
