from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import _validation
from ..brownian import Increment
from ..errors import InputError
from ..problem import SDE, plus
from ..solver import Card, ReversibleSolver, Step, StochasticSolver
from .heun import Heun

HEUN = Heun()


class Reversible(ReversibleSolver):
    r"""A scheme whose steps can be undone exactly, made of any one-step scheme.

    .. math:: y_{n+1} = \lambda y_n + (1 - \lambda) z_n + \Psi_h(t_n, z_n), \quad
              z_{n+1} = z_n - \Psi_{-h}(t_{n+1}, y_{n+1}),

    where :math:`\Psi_h(t, x)` is what a step of the base from x adds to it, and :math:`\Psi_{-h}` that of a step back
    along the same noise (`Increment.reversed`). The first z is y.

    - Orders: those of the base. Deterministic, and strong for the noise that the card lists.
    - Cost per step: two steps of the base. Lévy data and noise types: those of the base.
    - Calculus: Stratonovich, since an Itô step back along the noise solves another equation; for additive noise and
      ODEs any base.
    - `solve(..., gradient="reversible")` undoes its steps: exact gradients in memory that does not grow with them.
      `ReversibleHeun` has a fourth of the cost of `Reversible(Heun())`; this one has higher orders (`RK4()`, `SPaRK()`,
      `ShARK()`) and a region of stability.
    - Source: McCallum & Foster 2024 (arXiv 2410.11648), for ODEs. The noise of a step back is the path's, reversed.

    Args:
        base: an SDE solver, whose steps each start anew.
        coupling: :math:`\lambda` in (0, 1]. Undoing n steps multiplies rounding by up to :math:`\lambda^{-n}`; a
            smaller one is more stable.

    Raises:
        InputError: a base that is reversible itself or solves Itô SDEs alone, or a coupling outside (0, 1].
    """

    def __init__(self, base: StochasticSolver = HEUN, coupling: float = 0.999) -> None:
        _validation.check_instance("base", base, StochasticSolver, "an SDE solver such as Heun()")
        self.base: StochasticSolver = base
        self.coupling: float = _validation.check_float("coupling", coupling, expected="a number in (0, 1]")
        if not 0 < self.coupling <= 1:
            raise InputError(f"coupling: got {coupling!r}, expected a number in (0, 1].")
        name, card = type(base).__name__, base.card
        if isinstance(base, ReversibleSolver):
            raise InputError(f"base: got {name}, which is reversible itself. Pass it as the solver.")
        every = "stratonovich" in card.sde_types
        orders = card.strong_order, card.weak_order
        strong, weak = ({k: v for k, v in each.items() if every or k == "additive"} for each in orders)
        if not strong:
            raise InputError(
                f"base: got {name}, which solves Ito SDEs alone, expected a solver of Stratonovich SDEs or of additive "
                "noise, such as Heun(), SPaRK() or ShARK(): along reversed noise an Ito step solves another SDE."
            )
        self.card: Card = replace(
            card,
            summary=f"algebraically reversible scheme of two {name} steps",
            reference=f"after McCallum & Foster 2024 (arXiv 2410.11648); {name}: {card.reference}",
            sde_types=("stratonovich",) if every else card.sde_types,
            strong_order=strong,
            weak_order=weak,
            evaluations=2 * card.evaluations,
        )

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> tuple[Tensor]:
        return (y0,)

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        (z,) = carry
        y = plus(z, self.coupling, y - z) + self._moved(sde, t0, t1, z, increment)
        return Step(y, (z - self._moved(sde, t1, t0, y, increment.reversed()),))

    def undo(
        self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        z = carry[0] + self._moved(sde, t1, t0, y, increment.reversed())
        return plus(z, 1 / self.coupling, y - z - self._moved(sde, t0, t1, z, increment)), (z,)

    def _moved(self, sde: SDE, t0: Tensor, t1: Tensor, x: Tensor, increment: Increment) -> Tensor:
        return self.base.step(sde, t0, t1, x, increment, self.base.init(sde, t0, x)).y - x
