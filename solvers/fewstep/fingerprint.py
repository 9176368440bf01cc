"""What a table was fitted to: the schedule, the event, and a model's answers to fixed questions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError
from .problem import DiffusionModel

if TYPE_CHECKING:
    from .learned.labelled_model import Model

PROBES = 3  # levels at which an unlabelled model is asked; one that holds labels, at the middle one
ANSWERS = 3  # numbers that are kept of an answer
LABELS = 64  # that a model with labels is asked for
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Fingerprint:
    """What a table was fitted to: the schedule, the event, and the model's answers to fixed questions.

    Guidance, prediction type and conditioning are part of the denoiser and change its answers.

    Attributes:
        answers: a row for each label asked (one for a model without labels), or the least and the
            largest over labels that are too many to ask.
        labelled: the model holds one label a sample.
        spread: the two rows are bounds.
    """

    schedule: str
    event: tuple[int, ...]
    answers: tuple[tuple[float, ...], ...]
    labelled: bool = False
    spread: bool = False

    @classmethod
    def of(cls, problem: DiffusionModel, like: Tensor) -> Fingerprint:
        """Ask a model without labels; `like` (batch, *event) gives shape, dtype and device."""
        answers = _ask(problem, like, 1, PROBES)
        return cls(repr(problem.schedule), tuple(like.shape[1:]), answers)

    @classmethod
    def of_model(cls, model: Model, like: Tensor) -> Fingerprint:
        """Ask a model that may have labels: each of them where they are few, else for the spread."""
        if model.labels is None:
            return cls.of(model.at(torch.zeros(0)), like)
        distinct = torch.unique(model.labels, dim=0)
        few = len(distinct) <= LABELS and not distinct.is_floating_point()
        places = torch.linspace(0, len(distinct) - 1, min(len(distinct), LABELS)).long()
        asked = type(model)(model.problem, distinct).at(places)
        answers = _ask(asked, like, len(places), 1)
        if not few:
            t = torch.tensor(answers, dtype=torch.float64)
            low, high = t.amin(0), t.amax(0)
            # of labels without end some will lie beyond those that were asked
            room = (high - low) / 2
            answers = tuple(tuple(row) for row in torch.stack([low - room, high + room]).tolist())
        return cls(repr(asked.schedule), tuple(like.shape[1:]), answers, True, not few)

    def ask(self, problem: DiffusionModel, like: Tensor) -> Fingerprint:
        """What a model that is about to be sampled answers to the same questions."""
        answers = _ask(problem, like, len(like) if self.labelled else 1, 1 if self.labelled else PROBES)
        return Fingerprint(repr(problem.schedule), tuple(like.shape[1:]), answers, self.labelled)

    def check(self, other: Fingerprint, name: str) -> None:
        """Refuse another schedule, event or model."""
        for what in ("schedule", "event"):
            if not same_words(getattr(self, what), getattr(other, what)):
                raise InputError(
                    f"{what}: {name} was fitted to {getattr(self, what)}, got {getattr(other, what)}. Fit a "
                    "table for this one with fewstep.distill_dode; fits do not carry over."
                )
        worst = self.miss(other)
        if not worst <= TOLERANCE:
            what = "weights, guidance, prediction type" + (" or labels" if self.labelled else "")
            raise InputError(
                f"problem: its model answers differently from the one {name} was fitted to (by "
                f"{100 * worst:.0f} %: other {what}). Fit a table for this one with fewstep.distill_dode."
            )

    def miss(self, other: Fingerprint) -> float:
        """How far the worst of the other's answers lies off, as a share of their size."""
        own, came = (torch.tensor(f.answers, dtype=torch.float64) for f in (self, other))
        size = own.abs().max() + 1e-12
        if self.spread:
            gap = torch.maximum(own[0] - came, came - own[1]).clamp(min=0).amax(1)
        else:  # each sample's answers must be those of one of the labels
            gap = (came[:, None] - own[None]).abs().amax(2).amin(1)
        return float(gap.max() / size)


@torch.no_grad()
def _ask(problem: DiffusionModel, like: Tensor, copies: int, probes: int) -> tuple[tuple[float, ...], ...]:
    """A row of numbers for each copy of the questions."""
    event, low = tuple(like.shape[1:]), problem.schedule.sigma_min
    places = torch.linspace(0.25, 0.75, PROBES).double()
    places = places if probes == PROBES else places[PROBES // 2 :][:1]
    generator = torch.Generator().manual_seed(0)
    # the norm sees the size, products with fixed directions see signs and places
    noise, *directions = (
        torch.randn((1, *event), generator=generator).to(like).expand(copies, *event) for _ in range(ANSWERS)
    )
    columns: list[Tensor] = []
    for s in (low * (problem.schedule.sigma_max / low) ** places).tolist():
        D = problem.denoiser(noise * s, torch.tensor(s).to(like)).flatten(1)
        columns += [D.norm(dim=1), *((D * d.flatten(1)).sum(1) for d in directions)]
    return tuple(tuple(row) for row in torch.stack(columns, 1).tolist())


def same_words(a: Any, b: Any) -> bool:
    """Whether two descriptions agree, be their numbers written 1 or 1.0."""
    a, b = (re.sub(r"(?<![\w.])(\d+)\.0(?![\w.])", r"\1", v) if isinstance(v, str) else v for v in (a, b))
    return bool(a == b)
