"""DPM-Solver++: exponential integrators in data prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..plan import Plan
from ..solver import Card, DiffusionSolver
from ..tape import Tape


class DPMSolverPP(DiffusionSolver):
    """Exponential multistep (2M) or singlestep (2S) integration in lambda = -log sigma.

    Order 2. Multistep costs one evaluation a step and starts with a step of order 1; singlestep costs
    two and needs no start. `UniPC(order=2)` corrects each step with the evaluation it has anyway and is
    more accurate at the same cost; `DDIM` is the order-1 member.

    Args:
        order: 1 or 2.
        multistep: one evaluation a step from the last two, or two evaluations in the step.
    """

    card = Card(
        summary="exponential Adams-Bashforth (2M) or midpoint (2S) of the denoiser in log sigma",
        reference="Lu et al. 2022 (arXiv 2211.01095), Algorithms 1 and 2",
        deterministic_order=2.0,
    )

    def __init__(self, order: int = 2, multistep: bool = True) -> None:
        if order not in (1, 2):
            raise InputError(f"order: got {order!r}, wanted 1 or 2.")
        self.order, self.multistep = order, multistep

    def plan(self, sigmas: Tensor) -> Plan:
        name = f"DPMSolverPP({self.order}{'M' if self.multistep else 'S'})"
        tape = Tape(name, sigmas)
        previous, h_previous = None, None
        for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
            D = tape.evaluate(tape.x, s)
            slope = D
            if t > 0 and self.order == 2:
                h = torch.log(s / t)
                if not self.multistep:
                    r = (s * t).sqrt()  # half way in lambda
                    slope = tape.evaluate(r / s * tape.x + (1 - r / s) * D, r)
                elif previous is not None and h_previous is not None:
                    slope = D + h / (2 * h_previous) * (D - previous)
                previous, h_previous = D, h
            # a last level of 0 takes the first-order step, which is D itself: no logarithm of 0
            tape.advance(t / s * tape.x + (1 - t / s) * slope)
        return tape.finish()
