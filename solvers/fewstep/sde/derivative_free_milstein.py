from torch import Tensor

from ..brownian import Increment
from ..problem import CONSTANT, SDE, added, diffuse, plus
from ..solver import Card, Step, StochasticSolver
from .iterated import iterated, pairs
from .milstein import FACTS


class DerivativeFreeMilstein(StochasticSolver):
    r"""The Milstein step with a finite difference instead of the derivative.

    .. math:: y_{n+1} = y_n + h f + g W + \frac{g(y_n + h f + \sqrt h g) - g}{2\sqrt h} (W^2 - h)

    In Stratonovich's calculus the last term is (g(y + g W) - g) W / 2.

    - Strong order: 1.0 for diagonal, scalar, commutative and additive noise.
    - Cost per step: 1 drift and 2 diffusion evaluations (commutative noise: 1 + m). Lévy data: W. Calculus: both.
    - For diffusions that autograd cannot differentiate; `Milstein` has the smaller error constant.
    - Source: Kloeden & Platen 1992, Eqs. (11.1.3), (11.1.7); Stratonovich: after (4.9.15).
    """

    card: Card = Card(
        summary="Milstein with a finite difference along the noise",
        reference="Kloeden & Platen 1992, Eqs. (11.1.3), (11.1.7); Stratonovich's after (4.9.15)",
        **FACTS,
    )

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: object) -> Step:
        g = sde.diffusion(t0, y)
        drifted = plus(y, increment.h, sde.drift(t0, y))
        noise = diffuse(g, increment.W)
        new = drifted + noise
        if sde.noise_type in CONSTANT:
            return Step(new)
        if sde.sde_type == "stratonovich":
            # a support at distance sqrt(h) has an error of h^1.5 whose mean is not zero, which gives order
            # 0.5; the error of the support at g W is odd in W
            return Step(new + 0.5 * diffuse(sde.diffusion(t0, y + noise) - g, increment.W))
        root = increment.h**0.5
        if sde.noise_type == "diagonal":
            slope = (sde.diffusion(t0, plus(drifted, root, g)) - g) / root
            return Step(added(new, slope * iterated(increment, sde)))
        weights = pairs(increment, sde) / root
        for i in range(g.shape[-1]):
            ahead = sde.diffusion(t0, plus(drifted, root, g[..., i]))
            new = new + diffuse(ahead - g, weights[..., i, :])
        return Step(new)
