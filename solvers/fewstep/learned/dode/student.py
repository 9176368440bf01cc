"""D-ODE solvers: a base solver's plan with a few fitted numbers a row (arXiv 2309.16421)."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._serialization import json_text, whole
from ...errors import InputError
from ...executor import Evaluate
from ...plan import Plan
from ...problem import DiffusionModel
from ...resolve import evaluator_of

if TYPE_CHECKING:
    from .fitting_state import Model

PROBES = 3  # levels at which an unlabelled model is asked; one that holds labels, at the middle one
ANSWERS = 3  # numbers that are kept of an answer
LABELS = 64  # that a model with labels is asked for
FORMAT = "fewstep-dode-1"
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


@dataclass(frozen=True, eq=False, repr=False)
class DODE:
    """A fitted plan: look at it, save it, sample with it; it refuses problems that it was not fitted to.

    A model is asked once for a problem object; `fewstep.sample(problem, student.plan, ...)` asks nothing.

    Attributes:
        plan: the table.
        kappa: (rows, terms) O_i = d_i + sum_j kappa_ij (d_i - d_{i-j}); nought where the fit was not
            kept, nan where the weights were refined beyond this form.
        fitted_to: the problem's fingerprint.
        words: how it was made, by name; they go into its file.
    """

    plan: Plan
    kappa: Tensor
    fitted_to: Fingerprint
    words: dict[str, Any] = field(default_factory=dict)

    def evaluator(self, problem: DiffusionModel, like: Tensor) -> Evaluate:
        """The problem's own denoiser, once it is known to be the right one."""
        self.check(problem, like)
        return evaluator_of(problem, self.plan, like)

    def check(self, problem: DiffusionModel, like: Tensor) -> None:
        """Refuse another model than the one fitted to; one that was asked already is not asked again."""
        key = (tuple(like.shape[0 if self.fitted_to.labelled else 1 :]), like.dtype, like.device)
        known = _KNOWN.setdefault(self, {})
        if key not in known or known[key]() is not problem:
            self.fitted_to.check(self.fitted_to.ask(problem, like), self.plan.name)
            known[key] = weakref.ref(problem)

    def __repr__(self) -> str:
        return f"<{self.plan.name}: {self.plan.nfe} evaluations of {self.fitted_to.schedule}>"

    def __str__(self) -> str:
        lines = str(self.plan).splitlines()
        kappas = [" ".join(f"{k:9.4f}" for k in row) for row in self.kappa.tolist()]
        table = [lines[0], f"{lines[1]}   kappa", *map("{}   {}".format, lines[2:], kappas)]
        said = {k: v for k, v in self.words.items() if v not in ("", None)}
        return "\n".join([*table, *(f"{k}: {_said(v)}" for k, v in said.items())])

    def save(self, path: str | Path) -> None:
        """Write the table with what it was fitted to; `fewstep.load` reads it.

        safetensors with JSON words, or JSON alone, for people, where the path ends in `.json`.
        """
        from safetensors.torch import save_file

        tensors = self.plan.tensors() | {"kappa": self.kappa}
        with whole(path) as part:
            if Path(path).suffix == ".json":
                part.write_text(json_text(self._meta(), tensors))
            else:
                save_file(tensors, str(part), {"fewstep": json.dumps(self._meta())})

    def _meta(self) -> dict[str, Any]:
        seen = self.fitted_to
        return {
            "format": FORMAT, "name": self.plan.name, "prediction": self.plan.prediction,
            "schedule": seen.schedule, "event": seen.event, "answers": seen.answers,
            "labelled": seen.labelled, "spread": seen.spread, "words": self.words,
        }  # fmt: skip

    @classmethod
    def from_parts(cls, meta: dict[str, Any], tensors: dict[str, Tensor]) -> DODE:
        """The inverse of `save`; version 0.1.0 wrote one row of answers and no words."""
        rows = meta["answers"] if isinstance(meta["answers"][0], list) else [meta["answers"]]
        answers = tuple(tuple(map(float, row)) for row in rows)
        labelled, spread = meta.get("labelled") is True, meta.get("spread") is True
        expected = ANSWERS * (1 if labelled else PROBES)
        if any(len(row) != expected for row in answers) or (spread and len(answers) != 2):
            raise InputError(
                f"answers: got {len(answers)} x {len(answers[0])}, expected {2 if spread else 'any'} x "
                f"{expected}; the file is damaged."
            )
        event = tuple(map(int, meta["event"]))
        fitted_to = Fingerprint(str(meta["schedule"]), event, answers, labelled, spread)
        plan, kappa = Plan.from_tensors(meta, tensors), tensors["kappa"].double()
        if kappa.dim() != 2 or len(kappa) != plan.nfe or bool(kappa.isinf().any()) or plan.levy:
            raise InputError(f"kappa: got shape {tuple(kappa.shape)}, expected finite ({plan.nfe}, terms).")
        return cls(plan, kappa, fitted_to, dict(meta.get("words", {})))


def same_words(a: Any, b: Any) -> bool:
    """Whether two descriptions agree, be their numbers written 1 or 1.0."""
    a, b = (re.sub(r"(?<![\w.])(\d+)\.0(?![\w.])", r"\1", v) if isinstance(v, str) else v for v in (a, b))
    return bool(a == b)


# the problems that a table was last found to fit; beside the tables, which are copied and pickled
_KNOWN: weakref.WeakKeyDictionary[DODE, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " to ".join(map(_said, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
