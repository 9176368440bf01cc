import math

import torch
from torch import Tensor

from ..brownian import Increment
from ..brownian.increment import wedge
from ..problem import CONSTANT, SDE, diffuse
from ..solver import Card, Step, StochasticSolver

ORDERS = {"diagonal": 1.0, "scalar": 1.0, "commutative": 1.0, "additive": 1.0, "general": 0.5}
ROOT = math.sqrt(6)
C, S = 342 / 491, 3 * math.sqrt(38 / 491)  # of the stages that each channel has: their time, their size along g
V = math.sqrt(221 / 4955)  # a quarter of the size of the stages between channels
AREA = math.sqrt(1.5)  # E[A | W, H] has two thirds of the variance of A


class DRI1(StochasticSolver):
    r"""The weak Runge-Kutta method DRI1 of Debrabant and Rößler, of weak order 2.0 for every kind of noise.

    .. math:: y_{n+1} &= y_n + \tfrac16 h (f_1 + 4 f_2 + f_3)
              + \sum_k \big(\beta_1 g^k + \beta_2 (g^k_+ + g^k_-)\big) W_k + \beta_3 (g^k_+ - g^k_-) I_{kk} / \sqrt h \\
              &+ \sum_k \sum_{l \ne k} \beta_4 (g^k_{l+} - 2 g^k + g^k_{l-}) W_k
              + \beta_5 (g^k_{l+} - g^k_{l-}) I_{lk} / \sqrt h,

    with g^k at y_n, g^k_+ and g^k_- at $y_n + c h f_1 \pm s \sqrt h g^k$ at the time t_n + c h, and $g^k_{l\pm}$ at
    $y_n \pm \sqrt h\,(v_1 g^l + v_2 (g^l_+ + g^l_-))$. The drift is evaluated at $y_n$,
    $y_n + \tfrac12 h f_1 + \tfrac{6 - \sqrt 6}{10} g W$ and $y_n + h (2 f_2 - f_1) + \tfrac{3 + 2 \sqrt 6}{5} g W$.

    Its iterated integrals are those of the path as far as W and H give them, $I_{kk} = (W_k^2 - h)/2$ and
    $I_{lk} = \tfrac12 W_l W_k + \sqrt{3/2}\,(H_l W_k - W_l H_k)$. The paper draws variables with three and with two
    values in their place. Both have the moments that weak order 2 needs; these follow the path, which keeps strong
    orders, so that solves at several step sizes can be compared along one path.

    - Weak order: 2.0. Strong order: 1.0; 0.5 for general noise. Deterministic order: 3.
    - Cost per step: 3 drift evaluations; 3 diffusion evaluations for diagonal and scalar noise, 2 for additive noise,
      1 + 4 m for m channels. Lévy data: W, H. Calculus: Itô.
    - For expectations. Where strong errors count `EulerMaruyama` and `GeneralMilstein`, of weak order 1.0, cost
      less, and `SRID2` has strong order 1.5 for diagonal noise. `SlowRK` has weak order 2.0 in Stratonovich's calculus
      for noise that commutes.
    - Source: after Debrabant & Rößler 2009 (arXiv 1303.5103), method DRI1; StochasticDiffEq.jl.
    """

    card: Card = Card(
        summary="three-stage Runge-Kutta of weak order 2 for noise of every kind",
        reference="after Debrabant & Rößler 2009 (arXiv 1303.5103), method DRI1; StochasticDiffEq.jl",
        levy="H",
        sde_types=("ito",),
        strong_order=ORDERS,
        weak_order=dict.fromkeys(ORDERS, 2.0),
        deterministic_order=3.0,
        evaluations=3,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        f, h = sde.drift, increment.h
        f1, g1 = f(t0, y), sde.diffusion(t0, y)
        moved = diffuse(g1, increment.W)
        f2 = f(t0 + 0.5 * h, y + 0.5 * h * f1 + (6 - ROOT) / 10 * moved)
        f3 = f(t1, y + h * (2 * f2 - f1) + (3 + 2 * ROOT) / 5 * moved)
        return Step(y + h / 6 * (f1 + 4 * f2 + f3) + _noise(sde, t0, y, y + C * h * f1, g1, increment))


def _noise(sde: SDE, t0: Tensor, y: Tensor, z: Tensor, g1: Tensor, increment: Increment) -> Tensor:
    """What the noise adds; z is y moved along the drift by the share C of the step."""
    g, h, W = sde.diffusion, increment.h, increment.W
    root, later = abs(h) ** 0.5, t0 + C * h  # an ODE may step back
    if sde.noise_type in CONSTANT:
        return diffuse(193 / 684 * g1 + 491 / 684 * g(later, z), W)
    I_kk, matrix = 0.5 * (W.square() - h) / root, g1.dim() == W.dim() + 1
    if matrix:
        columns = [(k, S * root * column) for k, column in enumerate(g1.unbind(-1))]
        up, down = (torch.stack([g(later, z + sign * s)[..., k] for k, s in columns], -1) for sign in (1, -1))
    else:
        up, down = g(later, z + S * root * g1), g(later, z - S * root * g1)
    noise = diffuse(193 / 684 * g1 + 491 / 1368 * (up + down), W) + diffuse(up - down, I_kk * (0.5 / S))
    if not matrix or W.shape[-1] == 1:
        return noise
    H = increment.H
    assert H is not None
    others = 1 - torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    pairs = others * (0.5 * W.unsqueeze(-1) * W.unsqueeze(-2) + AREA * wedge(H, W)) / root
    stages = (V * root / 513) * (1070 * g1 + 491 * (up + down))
    for l, stage in enumerate(stages.unbind(-1)):
        up, down = g(t0, y + stage), g(t0, y - stage)
        noise = noise + diffuse(up - 2 * g1 + down, 4955 / 14144 * others[l] * W)
        noise = noise + diffuse(up - down, pairs[..., l, :] / (8 * V))
    return noise
