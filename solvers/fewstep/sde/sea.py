from ..solver import Card
from .additive import AdditiveRungeKutta, Tableau


class SEA(AdditiveRungeKutta):
    r"""The shifted Euler method: one drift evaluation at the time average of the noise.

    .. math:: y_{n+1} = y_n + h f\big(t_n, y_n + g (\tfrac12 W + H)\big) + g W

    - Strong order: 1.0 for additive noise, with a third of the error of `EulerMaruyama`.
    - Cost per step: 1 drift evaluation. Lévy data: W, H. Calculus: both.
    - `ShARK` has order 1.5 for 2 evaluations. As a sampler the denoiser is evaluated at the start of the
      step in tau: halfway (c = 1/2) has 2.4 to 10 times the error, measured at 8 to 128 steps.
    - Source: Foster, dos Reis & Strange 2024 (arXiv 2210.17543), Eq. (5.8).
    """

    card: Card = Card(
        summary="Euler step at the time average of the noise",
        reference="Foster, dos Reis & Strange 2024 (arXiv 2210.17543), Eq. (5.8)",
        levy="H",
        sde_types=("ito", "stratonovich"),
        strong_order={"additive": 1.0},
        weak_order={"additive": 1.0},
        deterministic_order=1.0,
    )
    error_order: float = 0.0  # its only stage is that of the step with which others are compared
    tableau: Tableau = Tableau(c=(0.0,), a=((),), b=(1.0,), w=(0.5,), e=(1.0,))
