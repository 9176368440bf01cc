from typing import Any

from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse, plus
from ..solver import Card, Step, StochasticSolver

# facts of the steps that know W alone: order 1.0 if the channels commute, 0.5 otherwise
ORDERS = {"diagonal": 1.0, "scalar": 1.0, "commutative": 1.0, "additive": 1.0, "general": 0.5}
CHORD: dict[str, Any] = {
    "levy": "W", "sde_types": ("stratonovich",), "strong_order": ORDERS, "weak_order": dict.fromkeys(ORDERS, 1.0),
}  # fmt: skip


class EulerHeun(StochasticSolver):
    r"""The Euler-Heun step: Euler's rule for the drift, Heun's rule for the noise.

    .. math:: y_{n+1} = y_n + h f + \tfrac12 \big(g + g(t_{n+1}, y_n + g W)\big) W

    - Strong order: 1.0; 0.5 for general noise.
    - Cost per step: 1 drift and 2 diffusion evaluations. Lévy data: W. Calculus: Stratonovich.
    - The cheapest Stratonovich solver; `Heun` has a second drift evaluation and a smaller error where the
      drift matters.
    - Source: Kloeden & Platen 1992, Eq. (4.9.15) for the noise, Section 11.1.
    """

    card: Card = Card(
        summary="Euler for the drift, trapezoidal predictor-corrector for the noise",
        reference="Kloeden & Platen 1992, Eq. (4.9.15) of the noise, Section 11.1",
        deterministic_order=1.0,
        **CHORD,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        noise = diffuse(sde.diffusion(t0, y), increment.W)
        after = diffuse(sde.diffusion(t1, y + noise), increment.W)
        return Step(plus(y, increment.h, sde.drift(t0, y)) + 0.5 * (noise + after))
