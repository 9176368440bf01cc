from torch import Tensor

from ..brownian import Increment
from ..problem import SDE, diffuse
from ..solver import Card, Step, StochasticSolver


class SRID2(StochasticSolver):
    r"""Rößler's stochastic Runge-Kutta method SRI2, which is torchsde's `srk`.

    .. math:: y_{n+1} = y_n + \tfrac16 h (f_1 + f_2 + 4 f_3) + \sum_{k=1}^4 \beta_k g_k, \quad
              \begin{aligned}
              \beta_1 &= -W + I_{11} + 2 I_{10} - 2 I_{111}, &
              \beta_2 &= \tfrac43 (W - I_{11} - I_{10}) + \tfrac53 I_{111}, \\
              \beta_3 &= \tfrac13 (2 W + I_{11} - 2 I_{10} - 2 I_{111}), & \beta_4 &= I_{111},
              \end{aligned}

    with I_10 = W/2 + H, I_11 = (W^2 - h)/(2 sqrt(h)), I_111 = (W^3 - 3 h W)/(6 h).

    - Strong order: 1.5 for diagonal, scalar and additive noise.
    - Cost per step: 3 drift and 4 diffusion evaluations. Lévy data: W, H. Calculus: Itô.
    - For additive noise `ShARK` has this order for 2 evaluations; `SlowRK` is the counterpart in
      Stratonovich's calculus.
    - Source: Rößler 2010 (SIAM J. Numer. Anal. 48), Eqs. (6.6)-(6.7), Table 6.2 (SRI2).
    """

    card: Card = Card(
        summary="four-stage stochastic Runge-Kutta for diagonal noise",
        reference="Rößler 2010 (SIAM J. Numer. Anal. 48), Eqs. (6.6)-(6.7), Table 6.2 (SRI2)",
        levy="H",
        sde_types=("ito",),
        strong_order={"diagonal": 1.5, "scalar": 1.5, "additive": 1.5},
        weak_order={"diagonal": 1.5, "scalar": 1.5, "additive": 2.0},
        deterministic_order=3.0,
        evaluations=3,
    )
    error_order: float = 1.5

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        return self._step(sde, t0, t1, y, increment, False)

    def step_with_error(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        """The step and its terms beyond Euler's drift and Milstein's noise: those of f, of I_10 and of I_111."""
        return self._step(sde, t0, t1, y, increment, True)

    def _step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, estimate: bool) -> Step:
        f, g, h, W = sde.drift, sde.diffusion, increment.h, increment.W
        root = abs(h) ** 0.5  # an ODE may step back
        I10, I11, I111 = increment.U / h, (W**2 - h) / (2 * root), (W**3 - 3 * h * W) / (6 * h)
        quarter, middle = t0 + 0.25 * h, t0 + 0.5 * h
        # the stages move along g sqrt(h), not along g W
        one = (W.new_ones(1) * root).expand_as(W)
        f1, g1 = f(t0, y), g(t0, y)
        n1 = diffuse(g1, one)
        f2 = f(t1, y + h * f1)
        g2 = g(quarter, y + 0.25 * h * f1 - 0.5 * n1)
        f3 = f(middle, y + 0.25 * h * (f1 + f2) + diffuse(g1 + 0.5 * g2, I10))
        n2 = diffuse(g2, one)
        g3 = g(t1, y + h * f1 + n1)
        g4 = g(quarter, y + 0.25 * h * f3 + 2 * n1 - n2 + 0.5 * diffuse(g3, one))
        y = y + h / 6 * (f1 + f2 + 4 * f3)
        y = y + diffuse(g1, -W + I11 + 2 * I10 - 2 * I111)
        y = y + diffuse(g2, 4 / 3 * (W - I11 - I10) + 5 / 3 * I111)
        y = y + diffuse(g3, (2 * W + I11 - 2 * I10 - 2 * I111) / 3) + diffuse(g4, I111)
        if not estimate:
            return Step(y)
        error = h / 6 * (f2 + 4 * f3 - 5 * f1) + diffuse(g1 - (2 * g2 + g3) / 3, 2 * I10)
        return Step(y, error=error + diffuse(g4 - 2 * g1 + (5 * g2 - 2 * g3) / 3, I111))
