"""Fingerprints of the problem that a table or trajectories belong to: schedule, event shape, model outputs."""

from __future__ import annotations

import math
import re
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError
from .problem import DiffusionModel

if TYPE_CHECKING:
    from .learned.labelled_model import Model

PROBES = 3  # noise levels at which a model without labels is evaluated; a labelled one only at the middle one
ANSWERS = 3  # numbers kept of each evaluation
LABELS = 64  # labels at which a labelled model is evaluated
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Fingerprint:
    """The schedule's repr, the event shape, and the model's answers to fixed inputs.

    Guidance, prediction type and conditioning are part of the denoiser and change its answers.

    Attributes:
        answers: one row for each label (a single row for a model without labels); where there are too many labels,
            the smallest and the largest answers over some of them.
        labelled: the model holds one label per sample.
        spread: the two rows of answers are bounds.
    """

    schedule: str
    event: tuple[int, ...]
    answers: tuple[tuple[float, ...], ...]
    labelled: bool = False
    spread: bool = False

    @classmethod
    def of_model(cls, model: Model, like: Tensor) -> Fingerprint:
        """The fingerprint of a model; `like` (batch, *event) gives shape, dtype and device."""
        if model.labels is None:
            return cls._of(model.at(torch.zeros(0)), like, False)
        distinct = torch.unique(model.labels, dim=0)
        few = len(distinct) <= LABELS and not distinct.is_floating_point()
        places = torch.linspace(0, len(distinct) - 1, min(len(distinct), LABELS)).long()
        problem = type(model)(model.problem, distinct).at(places)
        answers = _answers(problem, like, len(places), 1)
        if not few:
            low, high = torch.aminmax(torch.tensor(answers, dtype=torch.float64), dim=0)
            margin = (high - low) / 2  # for the labels that were not evaluated
            answers = tuple(tuple(row) for row in torch.stack([low - margin, high + margin]).tolist())
        return cls(repr(problem.schedule), tuple(like.shape[1:]), answers, True, not few)

    @classmethod
    def _of(cls, problem: DiffusionModel, like: Tensor, labelled: bool) -> Fingerprint:
        answers = _answers(problem, like, *((len(like), 1) if labelled else (1, PROBES)))
        return cls(repr(problem.schedule), tuple(like.shape[1:]), answers, labelled)

    def check(self, problem: DiffusionModel, like: Tensor, name: str) -> None:
        """Reject a problem whose schedule, event shape or model differs from that of `name`."""
        other = self._of(problem, like, self.labelled)
        for what in ("schedule", "event"):
            if not same_words(getattr(self, what), getattr(other, what)):
                raise InputError(
                    f"{what}: got {getattr(other, what)}, but {name} was fitted to {getattr(self, what)}. Fit another "
                    "one for this problem, for instance with fewstep.fit_table."
                )
        difference = self.miss(other)
        if not difference <= TOLERANCE:
            what = "weights, guidance, prediction type" + (" or labels" if self.labelled else "")
            raise InputError(
                f"problem: its model answers differently from the one {name} was fitted to (by {100 * difference:.0f} "
                f"%: other {what}). Fit another one for this model, for instance with fewstep.fit_table."
            )

    def miss(self, other: Fingerprint) -> float:
        """The largest difference between the answers of `other` and these, relative to the size of these."""
        own, given = (torch.tensor(f.answers, dtype=torch.float64) for f in (self, other))
        size = own.abs().max() + 1e-12
        if self.spread:
            gap = torch.maximum(own[0] - given, given - own[1]).clamp(min=0).amax(1)
        else:  # each sample's answers must be those of one of the labels
            gap = (given[:, None] - own[None]).abs().amax(2).amin(1)
        return float(gap.max() / size)


@torch.no_grad()
def _answers(problem: DiffusionModel, like: Tensor, copies: int, probes: int) -> tuple[tuple[float, ...], ...]:
    """One row of numbers for each copy of the fixed inputs."""
    event, low = tuple(like.shape[1:]), problem.schedule.sigma_min
    places = torch.linspace(0.25, 0.75, PROBES).double()
    places = places if probes == PROBES else places[PROBES // 2 :][:1]
    generator = torch.Generator().manual_seed(0)
    # the norm sees the size, products with fixed directions see signs and positions
    noise, *directions = (
        torch.randn((1, *event), generator=generator).to(like).expand(copies, *event) for _ in range(ANSWERS)
    )
    columns: list[Tensor] = []
    for s in (low * (problem.schedule.sigma_max / low) ** places).tolist():
        D = problem.denoiser(noise * s, torch.tensor(s).to(like)).flatten(1)
        columns += [D.norm(dim=1), *((D * d.flatten(1)).sum(1) for d in directions)]
    return tuple(tuple(row) for row in torch.stack(columns, 1).tolist())


@dataclass(frozen=True, eq=False)
class Fit:
    """What a plan was fitted to, and how.

    Attributes:
        fingerprint: of the model.
        notes: how the plan was made: values that JSON can hold, keyed by name.
        kappa: (rows, terms) of a D-ODE table, in d_i + sum_j kappa_ij (d_i - d_{i-j}): zero where the fit was not
            kept, nan where the weights were refined beyond this form. None for other tables.
    """

    fingerprint: Fingerprint
    notes: dict[str, Any] = field(default_factory=dict)
    kappa: Tensor | None = None

    def check(self, problem: DiffusionModel, like: Tensor, name: str) -> None:
        """Reject a model other than the one fitted to; each problem is evaluated for this only once."""
        labelled = self.fingerprint.labelled
        key = (tuple(like.shape[0 if labelled else 1 :]), like.dtype, like.device)
        known = _CHECKED.setdefault(self, {})
        if key not in known or known[key]() is not problem:
            self.fingerprint.check(problem, like, name)
            known[key] = weakref.ref(problem)

    def meta(self) -> dict[str, Any]:
        """All but kappa, for a file."""
        return vars(self.fingerprint) | {"notes": self.notes}

    @classmethod
    def from_meta(cls, meta: dict[str, Any], kappa: Tensor | None) -> Fit:
        """The inverse of `meta`; version 0.1 wrote `words` for notes, at first a single row of answers."""
        rows = meta["answers"] if isinstance(meta["answers"][0], list) else [meta["answers"]]
        answers = tuple(tuple(map(float, row)) for row in rows)
        labelled, spread = meta.get("labelled") is True, meta.get("spread") is True
        expected = ANSWERS * (1 if labelled else PROBES)
        sound = all(len(row) == expected and all(map(math.isfinite, row)) for row in answers)
        if not answers or not sound or (spread and len(answers) != 2):
            raise InputError(f"answers: got {len(answers)} rows, not of {expected} numbers each; the file is damaged.")
        event = tuple(map(int, meta["event"]))
        fingerprint = Fingerprint(str(meta["schedule"]), event, answers, labelled, spread)
        notes = dict(meta.get("notes", meta.get("words", {})))
        return cls(fingerprint, notes, None if kappa is None else kappa.double())


def same_words(a: Any, b: Any) -> bool:
    """Whether two descriptions agree, with 1 and 1.0 taken for the same number."""
    a, b = (re.sub(r"(?<![\w.])(\d+)\.0(?![\w.])", r"\1", v) if isinstance(v, str) else v for v in (a, b))
    return bool(a == b)


# the problem that each fit was last checked against; not a field of the fits, which are copied and pickled
_CHECKED: weakref.WeakKeyDictionary[Fit, dict[Any, Any]] = weakref.WeakKeyDictionary()
