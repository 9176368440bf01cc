"""D-ODE solvers: a base solver's plan with a few fitted numbers a row (arXiv 2309.16421)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..plan import Plan
from ..problem import Denoising
from ..sample import Evaluate
from ..sample import _plain as plain
from .store import DODE_FORMAT

PROBES = 3


@dataclass(frozen=True)
class Fingerprint:
    """What a table was fitted to: the schedule, the event, and the model's answers to fixed questions.

    Guidance, prediction type and conditioning are part of the denoiser and change its answers.
    """

    schedule: str
    event: tuple[int, ...]
    answers: tuple[float, ...]

    @classmethod
    def of(cls, problem: Denoising, like: Tensor) -> Fingerprint:
        """Ask the model; `like` (batch, *event) gives shape, dtype and device."""
        event, low = tuple(like.shape[1:]), problem.schedule.sigma_min
        sigmas = low * (problem.schedule.sigma_max / low) ** torch.linspace(0.25, 0.75, PROBES).double()
        generator = torch.Generator().manual_seed(0)
        noise, *directions = (torch.randn((1, *event), generator=generator).to(like) for _ in range(3))
        with torch.no_grad():
            given = [problem.denoiser(noise * s, torch.tensor(s).to(like)) for s in sigmas.tolist()]
        # the norm sees the size, products with fixed directions see signs and places
        answers = [float(v) for D in given for v in (D.norm(), *((D * d).sum() for d in directions))]
        return cls(repr(problem.schedule), event, tuple(answers))

    def check(self, other: Fingerprint, name: str) -> None:
        """Refuse another schedule, event or model."""
        for what in ("schedule", "event"):
            if getattr(self, what) != getattr(other, what):
                raise InputError(
                    f"{what}: {name} was fitted to {getattr(self, what)}, got {getattr(other, what)}. Fit a "
                    "table for this one with fewstep.distill_dode; fits do not carry over."
                )
        size = max(abs(a) for a in self.answers) + 1e-12
        worst = max(abs(a - b) / size for a, b in zip(self.answers, other.answers, strict=True))
        if worst > 1e-2:
            raise InputError(
                f"problem: its model answers differently from the one {name} was fitted to (by "
                f"{100 * worst:.0f} %: other weights, guidance or prediction type). Fit a table for this one "
                "with fewstep.distill_dode."
            )


@dataclass(frozen=True, eq=False)
class DODE:
    """A fitted plan: look at it, save it, sample with it; it refuses problems that it was not fitted to.

    Attributes:
        plan: the table.
        kappa: (rows, terms) O_i = d_i + sum_j kappa_ij (d_i - d_{i-j}); nought where the fit was not
            kept, nan where the weights were refined beyond this form.
        fitted_to: the problem's fingerprint.
    """

    plan: Plan
    kappa: Tensor
    fitted_to: Fingerprint

    def evaluator(self, problem: Denoising, like: Tensor) -> Evaluate:
        """The problem's own denoiser, once it is known to be the right one."""
        self.fitted_to.check(Fingerprint.of(problem, like), self.plan.name)
        return plain(problem, self.plan, like)

    def __str__(self) -> str:
        lines = str(self.plan).splitlines()
        kappas = [" ".join(f"{k:9.4f}" for k in row) for row in self.kappa.tolist()]
        return "\n".join([lines[0], f"{lines[1]}   kappa", *map("{}   {}".format, lines[2:], kappas)])

    def save(self, path: str | Path) -> None:
        """Write the table with what it was fitted to; `fewstep.load` reads it."""
        from safetensors.torch import save_file

        plan = self.plan
        meta = {
            "format": DODE_FORMAT, "name": plan.name, "prediction": plan.prediction,
            "schedule": self.fitted_to.schedule, "event": self.fitted_to.event,
            "answers": self.fitted_to.answers,
        }  # fmt: skip
        part = Path(f"{path}.part")
        save_file(plan.tensors() | {"kappa": self.kappa}, str(part), {"fewstep": json.dumps(meta)})
        part.replace(path)

    @classmethod
    def from_parts(cls, meta: dict[str, Any], tensors: dict[str, Tensor]) -> DODE:
        """The inverse of `save`."""
        event, answers = tuple(map(int, meta["event"])), tuple(map(float, meta["answers"]))
        if len(answers) != 3 * PROBES:
            raise InputError(f"answers: got {len(answers)}, wanted {3 * PROBES}; the file is damaged.")
        fitted_to = Fingerprint(str(meta["schedule"]), event, answers)
        plan, kappa = Plan.from_tensors(meta, tensors), tensors["kappa"].double()
        if kappa.dim() != 2 or len(kappa) != plan.nfe:
            raise InputError(f"kappa: got shape {tuple(kappa.shape)}, wanted ({plan.nfe}, terms).")
        return cls(plan, kappa, fitted_to)
