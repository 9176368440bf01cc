from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step
from .drift_implicit import DriftImplicit, Root


class ImplicitEuler(DriftImplicit):
    r"""The drift-implicit Euler method (stochastic theta method), for stiff drifts.

    .. math:: y_{n+1} = y_n + h \big((1 - \theta) f(t_n, y_n) + \theta f(t_{n+1}, y_{n+1})\big) + g(t_n, y_n) W,

    solved for y_{n+1} by a fixed number of Newton iterations from y_n + g W.

    - Strong order: 0.5; 1.0 for additive noise. Deterministic order: 1, or 2 for theta = 1/2.
    - Cost per step: `iterations` drift evaluations with Jacobians in forward mode, one more for theta < 1, and
      1 diffusion evaluation. Lévy data: W. Calculus: Itô.
    - For stiff drifts. From theta = 1/2 on it is stable in steps of any length for a linear drift that decays, while an
      explicit method needs h < 2 / |slope|. Monotone superlinear drifts (-y^3) keep their moments.
    - For drifts that are not stiff `EulerMaruyama` is cheaper. Noise stays explicit: stiff noise needs small steps.
    - Gradients pass through all iterations: they are those of the returned numbers.
    - Source: Kloeden & Platen 1992, Section 12.2; Higham, Mao & Stuart 2002 (SIAM J. Numer. Anal. 40), Section 5.

    Args:
        theta: weight in (0, 1] of the drift at the end of the step. 1/2 is the trapezoidal rule, of deterministic order
            2, which keeps fast modes instead of damping them.
        iterations: of Newton's method. 1 is the linearly implicit method, exact where the drift is linear in y.
        event_dims: trailing axes of y whose entries depend on each other; Jacobians are batched over the others. 0 for
            a drift that acts on each entry by itself, whose Jacobian is a diagonal.
        solve: your own solver of the equation, `(residual, guess) -> x`, with a residual function (*batch, *event) ->
            (*batch, *event) that is zero at x. `iterations` then only states on the card how often it calls it.

    Raises:
        InputError: a theta outside (0, 1], or invalid counts.
    """

    def __init__(self, theta: float = 1.0, iterations: int = 3, event_dims: int = 1, solve: Root | None = None) -> None:
        super().__init__(theta, iterations, event_dims, solve)
        self.card: Card = Card(
            summary="Euler step with the drift at its end, by Newton's method; for stiff drifts",
            reference="Kloeden & Platen 1992, Section 12.2",
            levy="W",
            sde_types=("ito",),
            strong_order={"diagonal": 0.5, "scalar": 0.5, "commutative": 0.5, "general": 0.5, "additive": 1.0},
            weak_order=dict.fromkeys(("diagonal", "scalar", "commutative", "general", "additive"), 1.0),
            deterministic_order=2.0 if self.theta == 0.5 else 1.0,
            evaluations=self.evaluations,
        )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        noise = diffuse(sde.diffusion(t0, y), increment.W)
        return Step(self.solved(sde, t0, t1, y, increment, noise))
