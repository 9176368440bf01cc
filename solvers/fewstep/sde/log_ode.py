import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import SDE
from ..solver import Card, Step, StochasticSolver
from .iterated import check_differentiable, diffusion_and_bracket


class LogODE(StochasticSolver):
    r"""One midpoint step of the ODE of the truncated log-signature.

    .. math:: y_{n+1} = y_n + h f(z) + g(z) W + \sum_{i<j} [g_i, g_j] A_{ij}, \quad
              z = y_n + \tfrac12 (h f + g W)

    - Strong order: 1.0 for general noise, on a path with its own area (`AreaPath`); 0.5 with an area
      that only has the right law, which `EulerMaruyama` has for a third of the cost.
    - Cost per step: 2 drift and 2 diffusion evaluations, 1 + m derivatives in reverse mode.
      Lévy data: W, A. Calculus: both; the drift of Itô equations is corrected.
    - Source: Castell & Gaines 1996, Eq. (4); brackets as in arXiv 1902.09425.
    """

    card: Card = Card(
        summary="the flow of the truncated log-signature, by the explicit midpoint rule",
        reference="Castell & Gaines 1996, Eq. (4); brackets as in arXiv 1902.09425",
        levy="A",
        sde_types=("ito", "stratonovich"),
        strong_order={"general": 1.0},
        weak_order={"general": 1.0},
        deterministic_order=2.0,
        evaluations=2,
    )

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> None:
        check_differentiable(sde, t0, y0)

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        h, W, A = increment.h, increment.W.unsqueeze(-1), increment.A
        assert A is not None
        # A is antisymmetric: sum_{i<j} [g_i, g_j] A_ij = sum_j D g_j (sum_i g_i A_ij). Ito's correction
        # of the drift, -h/2 sum_j D g_j g_j, has the same form
        weights = A - 0.5 * h * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) if sde.sde_type == "ito" else A
        g, bracket = diffusion_and_bracket(sde, t0, y, weights)
        half = y + 0.5 * (sde.drift(t0, y) * h + (g @ W).squeeze(-1))
        middle = t0 + 0.5 * h
        flow = sde.drift(middle, half) * h + (sde.diffusion(middle, half) @ W).squeeze(-1)
        return Step(y + flow + bracket)
