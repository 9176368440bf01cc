from torch import Tensor

from ..brownian import Increment
from ..plan import Plan
from ..problem import SDE, added, diffuse, plus
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver, Step, StochasticSolver
from .additive import Tableau, snr_plan

TABLEAU = Tableau(c=(0.0,), a=((),), b=(1.0,), w=(0.0,), e=(0.0,))


class EulerMaruyama(StochasticSolver, DiffusionSolver):
    r"""The Euler-Maruyama step (Kloeden & Platen 1992, Eq. (10.2.4)).

    .. math:: y_{n+1} = y_n + h f + g W

    - Strong order: 0.5; 1.0 for additive noise.
    - Cost per step: 1 drift and 1 diffusion evaluation. Lévy data: W. Calculus: Itô.
    - For diagonal noise `Milstein` has order 1.0 for one derivative. As a sampler (its plan in the clock
      tau = 1/sigma^2) it is SDE-DPM-Solver++(1), the ancestral step of DDPM; `ShARK` is closer to the path.
    """

    card: Card = Card(
        summary="explicit Euler step of the Ito integral",
        reference="Kloeden & Platen 1992, Eq. (10.2.4)",
        levy="W",
        sde_types=("ito",),
        strong_order={"diagonal": 0.5, "scalar": 0.5, "commutative": 0.5, "general": 0.5, "additive": 1.0},
        weak_order=dict.fromkeys(("diagonal", "scalar", "commutative", "general", "additive"), 1.0),
        deterministic_order=1.0,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        g = sde.diffusion(t0, y)
        y = plus(y, increment.h, sde.drift(t0, y))
        return Step(added(y, diffuse(g, increment.W)))

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        return snr_plan("EulerMaruyama", TABLEAU, "W", sigmas)
