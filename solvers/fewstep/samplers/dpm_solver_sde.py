"""SDE-DPM-Solver++: exponential multistep integration of the reverse SDE."""

from .. import _validation
from .dpm import DPMFamily


class DPMSolverSDE(DPMFamily):
    r"""Exponential multistep integration of the denoiser under exact noise.

    .. math:: x_t = \Big(\frac ts\Big)^{1+\eta} x_s + \int_0^q e^{u-q}\,D\,du + t\sqrt{1-e^{-2\eta h}}\,z,
        \qquad q = (1+\eta)\,h,\ h = \log(s/t)

    with D a polynomial through evaluations at earlier levels and z the normal of the path in 1/sigma^2. One evaluation
    per step. Order 1 with eta = 1 is `DDIM(eta=1)` and `EulerMaruyama`. Orders 2 and 3 are those of the drift; along a
    path the strong order stays 1, because only W is used (`ShARK` uses H).

    Args:
        order: 1, 2 or 3.
        eta: the share of the noise, tau^2 of SA-Solver: 0 is `DPMSolverPP`, 1 the reverse SDE.
        solver_type: "midpoint" or "heun" of the second-order term.
    """

    prediction = "data"
    summary = "exponential Adams-Bashforth of the denoiser for the reverse SDE"
    reference = "Lu et al. 2022 (arXiv 2211.01095), Eqs. (18), (19) and Appendix B"

    def __init__(self, order: int = 2, eta: float = 1.0, solver_type: str = "midpoint") -> None:
        eta = _validation.check_float("eta", eta, 0, expected="a number of at least 0")
        super().__init__(order, True, solver_type, eta)
