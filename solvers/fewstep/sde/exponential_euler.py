from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _validation
from .._tracing import apart
from ..brownian import Increment
from ..errors import InputError
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver
from .phi import phi_functions


class ExponentialEuler(StochasticSolver):
    r"""The exponential Euler method, for semilinear drifts f(t, y) = A y + N(t, y) with a known stiff A.

    .. math:: y_{n+1} = y_n + \varphi_1(h A) (h f + g W), \quad \varphi_1(z) = \frac{e^z - 1}{z},

    which is :math:`e^{hA} y_n + \varphi_1(h A) (h N + g W)`. The drift of the problem is all of f.

    - Strong order: 0.5; 1.0 for additive noise. Deterministic order: 1; without noise exact where N is constant.
    - Cost per step: 1 drift and 1 diffusion evaluation and a product with :math:`\varphi_1(h A)`, which is computed
      once per step size in float64 (a matrix exponential; with `compile=True` in each step). Lévy data: W.
      Calculus: Itô.
    - For stiff A that are known, such as the Laplacian of a discretised diffusion equation or its eigenvalues. It is
      stable in steps of any length in which N is not stiff, in mean square too: the linear test equation decays
      wherever its solution does.
    - Without `linear` it is `EulerMaruyama`. `ImplicitEuler` and `SKROCK` need no A.
    - Modes with h |a| = z far above 1 have the variance of :math:`\varphi_1`, :math:`\tanh(z/2) / (z/2)` of the
      stationary one; `ImplicitEuler` has :math:`1 / (1 + z/2)` of it.
    - Source: after Lord & Tambue 2013 (IMA J. Numer. Anal. 33; arXiv 1103.1986), where :math:`e^{hA}` multiplies the
      noise. With :math:`\varphi_1` it is the mean, given W, of the noise that decays under A during the step.

    Args:
        linear: A, without a graph: a matrix (d, d) that acts on the last axis of y, its diagonal (d,), or a
            number for all components.

    Raises:
        InputError: another shape, numbers that are not finite, or a size that is not that of y's last axis.
    """

    def __init__(self, linear: float | Sequence[Any] | Tensor = 0.0) -> None:
        self._A: Tensor = _validation.check_numbers("linear", linear)
        square = self._A.dim() < 2 or (self._A.dim() == 2 and self._A.shape[0] == self._A.shape[1])
        if not square or not self._A.isfinite().all():
            got = _validation.describe(linear)
            raise InputError(f"linear: got {got}, expected a finite matrix (d, d), a diagonal (d,) or a number.")
        self.linear: float | Sequence[Any] | Tensor = linear
        self.card: Card = Card(
            summary="Euler step along the exact flow of a linear part; for stiff semilinear drifts",
            reference="after Lord & Tambue 2013 (arXiv 1103.1986)",
            levy="W",
            sde_types=("ito",),
            strong_order={"diagonal": 0.5, "scalar": 0.5, "commutative": 0.5, "general": 0.5, "additive": 1.0},
            weak_order=dict.fromkeys(("diagonal", "scalar", "commutative", "general", "additive"), 1.0),
            deterministic_order=1.0,
        )

    def options(self) -> dict[str, Any]:
        return {} if isinstance(self.linear, float) and self.linear == 0 else {"linear": self.linear}

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> None:
        if self._A.dim() and (y0.dim() == 0 or y0.shape[-1] != len(self._A)):
            raise InputError(
                f"linear: got shape {tuple(self._A.shape)} for y of shape {tuple(y0.shape)}, expected the size of y's "
                "last axis."
            )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        h = increment.h
        change = h * sde.drift(t0, y) + diffuse(sde.diffusion(t0, y), increment.W)
        if torch.compiler.is_compiling() or isinstance(h, Tensor):
            phi = phi1(h * self._A.to(y.device)).to(y.dtype)
        else:  # lengths of equal steps differ by rounding
            phi = apart(_kept, self._A, float(f"{h:.13g}"), y.dtype, y.device)
        return Step(y + (change @ phi.mT if phi.dim() == 2 else phi * change))


@lru_cache(maxsize=64)
def _kept(A: Tensor, h: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """phi_1(h A) for all steps of one length, that of a number as one on the CPU; A is known by its identity."""
    with torch.inference_mode(False):  # a later solve may keep it for a backward pass
        phi = phi1(h * A).to(dtype)
        return phi.to(device) if A.dim() else phi


def phi1(z: Tensor) -> Tensor:
    """(e^z - 1) / z of numbers, or of a matrix."""
    if z.dim() == 2:
        one = torch.eye(len(z), dtype=z.dtype, device=z.device)
        block = torch.cat([torch.cat([z, one], 1), torch.zeros_like(z).repeat(1, 2)])
        flow: Tensor = torch.linalg.matrix_exp(block)
        return flow[: len(z), len(z) :]
    return phi_functions(z, 1)[1]
