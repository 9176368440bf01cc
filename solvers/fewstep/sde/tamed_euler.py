import torch
from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver


class TamedEuler(StochasticSolver):
    r"""The tamed Euler method, for drifts that grow faster than linearly.

    .. math:: y_{n+1} = y_n + \frac{h f}{1 + h |f|} + g W,

    with the Euclidean norm of f over the last axis: the drift moves y by less than 1 in a step.

    - Strong order: 0.5; 1.0 for additive noise, for one-sided Lipschitz drifts of polynomial growth such as y - y^3.
      The moments of `EulerMaruyama` diverge there.
    - Cost per step: 1 drift and 1 diffusion evaluation. Lévy data: W. Calculus: Itô.
    - Where the drift is large its error is too: from a far start y approaches by at most 1 per step. `ImplicitEuler`
      follows it at the cost of Jacobians, `TamedMilstein` has order 1.0.
    - Source: Hutzenthaler, Jentzen & Kloeden 2012 (Ann. Appl. Probab. 22; arXiv 1010.3756), Eq. (4).
    """

    card: Card = Card(
        summary="Euler-Maruyama with a bounded step of the drift; for superlinear drifts",
        reference="Hutzenthaler, Jentzen & Kloeden 2012 (arXiv 1010.3756), Eq. (4)",
        levy="W",
        sde_types=("ito",),
        strong_order={"diagonal": 0.5, "scalar": 0.5, "commutative": 0.5, "general": 0.5, "additive": 1.0},
        weak_order=dict.fromkeys(("diagonal", "scalar", "commutative", "general", "additive"), 1.0),
        deterministic_order=1.0,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        g = sde.diffusion(t0, y)
        return Step(y + tamed(sde.drift(t0, y), increment.h) + diffuse(g, increment.W))


def tamed(f: Tensor, h: float | Tensor) -> Tensor:
    """The bounded step h f / (1 + h |f|), with the norm over the last axis."""
    step = h * f
    size = torch.linalg.vector_norm(step, dim=-1, keepdim=True) if step.dim() else step.abs()
    return step / (1 + size)
