"""DPM-Solver++: exponential integrators in data prediction."""

from .dpm import DPMFamily


class DPMSolverPP(DPMFamily):
    r"""Exponential integrators of the denoiser in $\lambda = -\log\sigma$: 2M, 3M, or 2S, 3S.

    .. math:: x_t = \frac ts\,x_s + \int_0^h e^{u-h}\,D(\lambda_s + u)\,du, \qquad h = \log(s/t)

    with D a polynomial through evaluations at earlier levels (M) or inside the step (S). Order 1 to 3. Multistep starts
    with a step of order 1; singlestep needs no start. `UniPC(order=2)` corrects each step with the evaluation it has
    anyway and is more accurate at the same cost; `DDIM` is the member of order 1.

    Args:
        order: 1, 2 or 3. Released codes drop a factor 2 in 3M, which leaves order 2: `compat.OfficialDPM`.
        multistep: True takes one evaluation per step and reuses earlier ones; False takes `order` evaluations inside
            each step, at nodes even in lambda.
        solver_type: "midpoint" or "heun" (the Taylor form) of the second-order term.
    """

    prediction = "data"
    summary = "exponential Adams-Bashforth (2M, 3M) or Runge-Kutta (2S, 3S) of the denoiser in log sigma"
    reference = "Lu et al. 2022 (arXiv 2211.01095), Algorithms 1 and 2; 3M with twice the D2 of its code"

    def __init__(self, order: int = 2, multistep: bool = True, solver_type: str = "midpoint") -> None:
        super().__init__(order, multistep, solver_type)
