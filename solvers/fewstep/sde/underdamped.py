"""What the exponential methods for underdamped Langevin dynamics share: positions, velocities, forces, facts.

Over a step dv = (F - gamma v) dt + sigma dW is solved exactly for a constant force. With phi_k = phi_k(-gamma h) the
flow without noise is x' = x + h phi_1 v + h^2 phi_2 F, v' = phi_0 v + h phi_1 F.
"""

from typing import Any

import torch
from torch import Tensor

from ..problem import SDE
from ..solver import StochasticSolver


def facts(order: float) -> dict[str, Any]:
    """The facts on the card of a method of this order."""
    orders = {"underdamped": order}
    return {"sde_types": ("ito", "stratonovich"), "strong_order": orders, "weak_order": orders}


class Underdamped(StochasticSolver):
    """A method for underdamped Langevin dynamics; its state is (x, v) along the last axis."""

    def force(self, sde: SDE, t: Tensor, x: Tensor) -> Tensor:
        """F(t, x), which is the drift of a particle at rest."""
        return sde.drift(t, torch.cat([x, torch.zeros_like(x)], -1))[..., x.shape[-1] :]


class FirstSameAsLast(Underdamped):
    """A method whose last evaluation is the first one of the next step, which it receives as its carry."""

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> Tensor:
        return self.force(sde, t0, y0.chunk(2, -1)[0])


def constants_of(sde: SDE) -> tuple[float, float]:
    """Friction and size of the noise of a problem."""
    assert sde.langevin is not None
    return sde.langevin
