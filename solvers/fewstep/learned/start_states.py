"""Start states of a fit in batches, over processes, with a tally of network evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._distributed import part, sum_over_processes
from ..errors import InputError
from ..executor import Evaluate, run
from ..plan import Plan
from ..resolve import evaluator_of
from .labelled_model import Model
from .training import HELD_OUT, held_out


@dataclass(frozen=True)
class Work:
    """Start states x (n, *event) in x0 + sigma n, split into fitted and held-out ones.

    Attributes:
        kept, held: indices of the start states that are fitted to, and of those that judge the fit.
        batch: samples per network call.
        spent: a tally of network evaluations of one sample.
    """

    model: Model
    x: Tensor
    kept: Tensor
    held: Tensor
    batch: int
    spent: list[int] = field(default_factory=lambda: [0])

    @classmethod
    def of(cls, model: Model, noise: Tensor, first: float, batch: int | None, fit: bool = True) -> Work:
        """Start states from the user's noise, alpha x0 + sigma_t n at the first level; a fit holds some of them out."""
        if len(noise) < (2 * HELD_OUT if fit else 2):
            expected = f"at least {2 * HELD_OUT}: two of them are held out" if fit else "at least 2"
            raise InputError(f"noise: got {len(noise)} start states, expected {expected}.")
        if not bool(noise.isfinite().all()):
            raise InputError("noise: got values that are not finite, expected normals.")
        noise = noise.float() if noise.dtype in (torch.float16, torch.bfloat16) else noise
        alpha = model.schedule.alpha(torch.tensor([first], dtype=torch.float64)).item()
        size = float(noise.double().square().mean().sqrt())
        if first > 10 and size > 3 * alpha * first:  # levels at which the noise dominates the state
            raise InputError(
                f"noise: got states of size {size:.3g}, expected alpha x0 + sigma_t n of the first level, of size "
                f"{alpha * first:.3g}: normals for a VP process, sigma_max times normals for EDM and VE."
            )
        batch = batch or min(256, -(-len(noise) // 4))
        return cls(model, noise if alpha == 1 else noise / alpha, *held_out(len(noise)), batch)

    def share(self, which: Tensor) -> list[Tensor]:
        """Split indices into batches; under torch.distributed, return only this process's batches."""
        return list(torch.split(which, self.batch)[part()])

    def start(self, index: Tensor) -> Tensor:
        """These start states."""
        return self.x[index.to(self.x.device)]

    def evaluator(self, plan: Plan, index: Tensor) -> Evaluate:
        """Return a function that evaluates the plan's rows for these start states and counts evaluations."""
        evaluate = evaluator_of(self.model.at(index), plan, self.start(index))

        def counted(i: int, x: Tensor, normals: Any) -> Tensor:
            self.spent[0] += len(x)
            return evaluate(i, x, normals)

        return counted

    def ends(self, plan: Plan, index: Tensor) -> Tensor:
        """The final states of a deterministic plan from these start states."""
        return run(plan, self.start(index), self.evaluator(plan, index), lambda *_: ())

    def evaluations(self) -> int:
        """Network evaluations so far per start state, those on held-out states included."""
        return -(-round(float(sum_over_processes(torch.tensor(float(self.spent[0]))))) // len(self.x))
