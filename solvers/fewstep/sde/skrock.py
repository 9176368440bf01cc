import math

from torch import Tensor

from .. import _validation
from ..brownian import Increment
from ..problem import SDE, diffuse, plus
from ..solver import Card, Step, StochasticSolver

DAMPING = 0.05  # eta of the paper: the stability function is at most 1 - eta in size away from 0


class SKROCK(StochasticSolver):
    r"""The explicit stabilised method SK-ROCK, for stiff drifts without Jacobians.

    .. math:: k_1 = y_n + \mu_1 h f(t_n, y_n + \nu_1 g W) + \kappa_1 g W, \quad
              k_i = \mu_i h f(t_n + c_{i-1} h, k_{i-1}) + \nu_i k_{i-1} + \kappa_i k_{i-2}, \quad y_{n+1} = k_s,

    with k_0 = y_n, g = g(t_n, y_n) and, with Chebyshev polynomials T_i, :math:`\omega_0 = 1 + 0.05 / s^2` and
    :math:`\omega_1 = T_s(\omega_0) / T_s'(\omega_0)`: :math:`\mu_1 = \omega_1 / \omega_0`,
    :math:`\nu_1 = s \omega_1 / 2`, :math:`\kappa_1 = s \mu_1`, then
    :math:`\mu_i = 2 \omega_1 T_{i-1} / T_i`, :math:`\nu_i = 2 \omega_0 T_{i-1} / T_i` and :math:`\kappa_i = 1 - \nu_i`.

    - Strong order: 0.5; 1.0 for additive noise. Weak order: 1.0. Deterministic order: 1.
    - Cost per step: s = `stages` drift evaluations and 1 diffusion evaluation. Lévy data: W. Calculus: Itô.
    - For large systems whose Jacobian has real negative eigenvalues, such as a discretised diffusion equation. It is
      stable for steps up to :math:`1.93 s^2 / |\lambda|`, where `EulerMaruyama` allows :math:`2 / |\lambda|`: s stages
      do the work of about :math:`s^2` Euler steps. The same holds in mean square, for any noise with which the linear
      test equation itself is stable.
    - `ImplicitEuler` is stable in steps of any length, and where eigenvalues are far from the real axis.
      `ExponentialEuler` needs one drift evaluation where the stiff part is a known matrix.
    - Source: after Abdulle, Almuslimani & Vilmart 2018 (SIAM/ASA J. Uncertain. Quantif. 6; arXiv 1708.08145).

    Args:
        stages: s. Take the square root of :math:`h |\lambda| / 1.93` for the largest slope, rounded up.

    Raises:
        InputError: a number of stages that is not a positive integer.
    """

    def __init__(self, stages: int = 5) -> None:
        self.stages: int = _validation.check_int("stages", stages, most=1000)
        self._rows: list[tuple[float, float, float, float]] = _coefficients(self.stages)
        self.card: Card = Card(
            summary="explicit Euler step stabilised by Chebyshev stages; for stiff drifts without Jacobians",
            reference="after Abdulle, Almuslimani & Vilmart 2018 (arXiv 1708.08145)",
            levy="W",
            sde_types=("ito",),
            strong_order={"diagonal": 0.5, "scalar": 0.5, "commutative": 0.5, "general": 0.5, "additive": 1.0},
            weak_order=dict.fromkeys(("diagonal", "scalar", "commutative", "general", "additive"), 1.0),
            deterministic_order=1.0,
            evaluations=self.stages,
        )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        h, noise = increment.h, diffuse(sde.diffusion(t0, y), increment.W)
        (mu, nu, kappa, _), *rows = self._rows
        before, stage = y, plus(y + kappa * noise, mu * h, sde.drift(t0, y + nu * noise))
        for mu, nu, kappa, c in rows:
            before, stage = stage, plus(nu * stage + kappa * before, mu * h, sde.drift(t0 + c * h, stage))
        return Step(stage)


def _coefficients(s: int) -> list[tuple[float, float, float, float]]:
    """The rows (mu, nu, kappa, c) of the stages, where c h is the time of a stage's drift evaluation."""
    w0 = 1 + DAMPING / s**2
    angle = math.acosh(w0)
    T = [math.cosh(i * angle) for i in range(s + 1)]
    w1 = T[s] * math.sinh(angle) / (s * math.sinh(s * angle))
    rows = [(w1 / w0, s * w1 / 2, s * w1 / w0, 0.0)]
    c, before = w1 / w0, 0.0
    for i in range(2, s + 1):
        mu, nu = 2 * w1 * T[i - 1] / T[i], 2 * w0 * T[i - 1] / T[i]
        rows.append((mu, nu, 1 - nu, c))
        c, before = mu + nu * c + (1 - nu) * before, c
    return rows
