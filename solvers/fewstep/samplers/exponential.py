"""What the exponential integrators in lambda = -log sigma are made of: a step's weights, integrals, nodes.

The exact step from s to t is x_t = scale x_s + gain int e^{-q(1-u)} q F(u) du with u in [0, 1] and F the
data prediction (q = h), the same under noise (q = 2h), or the noise prediction (q = -h).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..plan_builder import LinearExpr


@dataclass(frozen=True)
class ExponentialStep:
    """One exponential step from s to t > 0.

    Args:
        prediction: "data" or "noise", what F is.
        eta: with "data", the share of the reverse SDE (0: the ODE; 1: the SDE), as tau^2 of SA-Solver.
    """

    s: float
    t: float
    prediction: str = "data"
    eta: float = 0.0

    @property
    def h(self) -> float:
        return math.log(self.s / self.t)

    @property
    def q(self) -> float:
        return -self.h if self.prediction == "noise" else (1 + self.eta) * self.h

    @property
    def noise(self) -> float:
        """The standard deviation of what the step adds."""
        return self.t * math.sqrt(-math.expm1(-2 * self.eta * self.h))

    def weights(self) -> tuple[float, float, float]:
        """Of F, h F' and h^2 F'' at s: q phi_1, q phi_2, q phi_3 of -q, in turn."""
        q = self.q
        e0 = -math.expm1(-q)
        e1 = 1 - e0 / q
        return e0, e1, 0.5 - e1 / q

    def __call__(self, x: LinearExpr, F: LinearExpr, *terms: tuple[float, LinearExpr]) -> LinearExpr:
        """The step with F frozen, plus weighted derivatives of F."""
        gain = self.t if self.prediction == "noise" else 1.0
        scale = 1.0 if self.prediction == "noise" else (self.t / self.s) ** (1 + self.eta)
        out = scale * x + gain * self.weights()[0] * F
        for weight, derivative in terms:
            out = out + gain * weight * derivative
        return out


@cache
def _gauss() -> tuple[Tensor, Tensor]:
    """32 points: exact to rounding for every kernel here, steps of a factor e^20 in sigma included."""
    points, weights = np.polynomial.legendre.leggauss(32)
    return torch.from_numpy(points), torch.from_numpy(weights)


def adams_weights(
    nodes: Sequence[float], start: float, end: float, kernel: Callable[[Tensor], Tensor],
    variable: Callable[[Tensor], Tensor] = lambda u: u,
) -> list[float]:  # fmt: skip
    """w_j = int_start^end kernel(u) l_j(variable(u)) du, l_j Lagrange's polynomial that is 1 at node j."""
    points, weights = _gauss()
    u = start + (end - start) * (points + 1) / 2
    mass, v = kernel(u) * weights * (end - start) / 2, variable(u)
    out = []
    for j, own in enumerate(nodes):
        l = torch.ones_like(v)
        for k, other in enumerate(nodes):
            if k != j:
                l = l * (v - other) / (own - other)
        out.append(float((mass * l).sum()))
    return out


def closed_forms(nodes: list[float], t: float) -> list[float]:
    """int l_j(log rho) d rho for 2 or 3 nodes by its antiderivative, in float32 as diffusers' DEIS has it."""
    sigma = np.array([t, *nodes], dtype=np.float32)
    alpha = 1 / np.sqrt(sigma**2 + np.float32(1))
    rho = (sigma * alpha) / alpha  # rounds as theirs does; what cancels below multiplies it
    log, ends, out = np.log(rho), rho[:2], []
    l, count = log[:2], len(nodes)
    for j in range(count):
        b, c, d = (log[1 + (j + k) % count] for k in range(3))
        if count == 2:
            F = ends * (-c + l - 1) / (b - c)
        else:  # (l - c)(l - d) e^l integrates to e^l (l^2 - (c + d + 2) l + cd + c + d + 2)
            F = ends * (c * (d - l + 1) - d * l + d + l**2 - 2 * l + 2) / ((b - c) * (b - d))
        out.append(float(F[0] - F[1]))
    return out


class Through:
    """UniPC's step from s to t through p past evaluations, the newest at s (arXiv 2302.04867, Theorem 3.1).

    Args:
        x: the state at s.
        past: evaluations with their lambda, newest first.
        step: from s to t.
        variant: B is -q ("bh1") or e^-q - 1 ("bh2"), q of the step.
    """

    def __init__(
        self, x: LinearExpr, past: list[tuple[LinearExpr, float]], step: ExponentialStep, variant: str
    ) -> None:
        lam0 = past[0][1]
        self.F0: LinearExpr = past[0][0]
        self.nodes: list[tuple[float, LinearExpr]] = [((l - lam0) / step.h, F) for F, l in past[1:]]
        self.base: LinearExpr = step(x, self.F0)
        self.hh: float = -step.q
        self.gain: float = step.t if step.prediction == "noise" else 1.0
        self.B: float = self.hh if variant == "bh1" else math.expm1(self.hh)

    def predict(self) -> LinearExpr:
        """UniP: the nodes are the past ones."""
        return self._through(self.nodes)

    def correct(self, F: LinearExpr) -> LinearExpr:
        """UniC: the evaluation at t is one node more."""
        return self._through([*self.nodes, (1.0, F)])

    def _through(self, nodes: list[tuple[float, LinearExpr]]) -> LinearExpr:
        p, hh = len(nodes), self.hh
        if p == 0:
            return self.base
        # R a = b with R_jk = r_k^(j-1), b_j = j! phi_{j+1}(hh) hh / B(hh)
        k, b = math.expm1(hh) / hh - 1, []
        for j in range(1, p + 1):
            b.append(math.factorial(j) * k / self.B)
            k = k / hh - 1 / math.factorial(j + 1)
        r = torch.tensor([r for r, _ in nodes], dtype=torch.float64)
        R = r.repeat(p, 1) ** torch.arange(p, dtype=torch.float64)[:, None]
        a = torch.linalg.solve(R, torch.tensor(b, dtype=torch.float64)).tolist()
        # UniP-2 and UniC-1 have one node: the paper sets its weight to 1/2, which keeps the order
        a = [0.5] if p == 1 else a
        x = self.base
        for weight, (ratio, F) in zip(a, nodes, strict=True):
            x = x - self.gain * self.B * weight / ratio * (F - self.F0)
        return x
