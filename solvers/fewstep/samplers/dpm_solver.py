"""DPM-Solver: exponential integrators in noise prediction."""

from .dpm import DPMFamily


class DPMSolver(DPMFamily):
    r"""Exponential integrators of the noise prediction in $\lambda = -\log\sigma$, singlestep by default.

    .. math:: x_t = x_s - s\int_0^h e^{-u}\,\varepsilon(\lambda_s + u)\,du, \qquad h = \log(s/t)

    with $\varepsilon$ a polynomial through evaluations inside the step or at earlier levels. Order 1 to 3 at as many
    evaluations per step, or at one with `multistep`. `DPMSolverPP` extrapolates the data instead, which is more robust
    at few steps and under guidance; order 1 is `DDIM`.

    Args:
        order: 1, 2 or 3.
        multistep: True takes one evaluation per step and reuses earlier ones; False takes `order` evaluations inside
            each step, at nodes even in lambda.
        solver_type: "midpoint", or "heun", the paper's Taylor form.
    """

    prediction = "noise"
    summary = "exponential Runge-Kutta or Adams-Bashforth of the noise prediction in log sigma"
    reference = "Lu et al. 2022 (arXiv 2206.00927), Algorithms 1 and 2, Eq. (B.4)"

    def __init__(self, order: int = 2, multistep: bool = False, solver_type: str = "midpoint") -> None:
        super().__init__(order, multistep, solver_type)
