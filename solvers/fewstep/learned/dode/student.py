"""D-ODE solvers: a base solver's plan with a few fitted numbers a row (arXiv 2309.16421)."""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._serialization import atomic_write, json_text
from ...errors import InputError
from ...executor import Evaluate
from ...fingerprint import ANSWERS, PROBES, Fingerprint
from ...plan import Plan
from ...problem import DiffusionModel
from ...resolve import evaluator_of

FORMAT = "fewstep-dode-1"


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
        with atomic_write(path) as part:
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


# the problems that a table was last found to fit; beside the tables, which are copied and pickled
_KNOWN: weakref.WeakKeyDictionary[DODE, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " to ".join(map(_said, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
