"""A diffusion solver on a grid, as a table of coefficients: look at it, save it, load it, run it.

With x = x0 + sigma n every solver of the field is linear in what it has seen. Row i of the table is one
network evaluation:

    input = stage_x x + sum_j stage_eval_j D_j + sum_jk stage_noise_jk z_jk
    D_0   = denoiser(input, sigma)                (or (input - D)/sigma: `prediction="noise"`)
    x     = update_x x + sum_j update_eval_j D_j + sum_jk update_noise_jk z_jk

D_j are the evaluations, newest first. z_jk are the unit normals of the noise intervals opened so far,
newest interval first: z_j0 = W/sqrt(h), z_j1 = sqrt(12/h) H of a Brownian path run in tau = 1/sigma^2.
`executor` applies the rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _validation
from ._serialization import atomic_write
from .errors import InputError
from .grid import check_sigmas

FORMAT = "fewstep-plan-1"
PREDICTIONS = ("data", "noise")
WEIGHTS = ("stage_x", "stage_eval", "stage_noise", "update_x", "update_eval", "update_noise")
# names of the weights in files of format 1
FORMAT_1 = dict(zip("cdmabn", WEIGHTS, strict=True))


Weight = float | Tensor  # a Python number, or a 0-d tensor where gradients to the table are needed


class Combination(NamedTuple):
    """scale * x + sum of weight * evaluation[age] + sum of weight * normal[age][letter], zeros left out."""

    scale: Weight
    evaluations: tuple[tuple[Weight, int], ...]
    normals: tuple[tuple[Weight, int, int], ...]


class Row(NamedTuple):
    """One evaluation: its level, the noise interval it opens, its stage and its update.

    Attributes:
        sigma: the noise level of the evaluation.
        interval: (tau0, tau1) of the normals that the row opens, None for no normals.
        stage: the input of the evaluation.
        update: the state after it.
        evaluations_kept, normals_kept: how many of each the rows of this plan look back.
    """

    sigma: float
    interval: tuple[float, float] | None
    stage: Combination
    update: Combination
    evaluations_kept: int
    normals_kept: int


@dataclass(frozen=True, eq=False)
class Plan:
    """R rows, J kept evaluations, S kept noise intervals, L normals an interval; all float64 on the CPU.

    Args:
        name: the solver that made it.
        prediction: what the history holds, `"data"` (D) or `"noise"` ((input - D)/sigma).
        sigmas: (n,) the grid it was made for.
        sigma: (R,) the level of each evaluation.
        stage_x, update_x: (R,) weights of the state.
        stage_eval: (R, J) weights of earlier evaluations, newest first.
        update_eval: (R, J) weights of the row's own evaluation and of earlier ones, newest first.
        noise: (R, 2) the interval (tau0, tau1) that a row opens; nan where it opens none, and
            (0, 0) for a normal that belongs to no path (churn).
        stage_noise, update_noise: (R, S, L) weights of the unit normals of the noise intervals, the one
            this row opens first.
    """

    name: str
    prediction: str
    sigmas: Tensor
    sigma: Tensor
    stage_x: Tensor
    stage_eval: Tensor
    stage_noise: Tensor
    update_x: Tensor
    update_eval: Tensor
    update_noise: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        for key in (f.name for f in fields(self) if f.name not in ("name", "prediction")):
            column = getattr(self, key)
            if not torch.is_tensor(column) or not column.is_floating_point() or column.dim() == 0:
                raise InputError(
                    f"plan.{key}: got {_validation.describe(column)}, expected a floating-point tensor."
                )
        rows, window = len(self.sigma), self.update_eval.shape[-1]
        intervals = tuple(self.stage_noise.shape[-2:])
        expected = {
            "stage_x": (rows,), "stage_eval": (rows, window), "stage_noise": (rows, *intervals),
            "update_x": (rows,), "update_eval": (rows, window), "update_noise": (rows, *intervals),
            "noise": (rows, 2),
        }  # fmt: skip
        for key, shape in expected.items():
            if tuple(getattr(self, key).shape) != shape:
                raise InputError(
                    f"plan.{key}: got shape {tuple(getattr(self, key).shape)}, expected {shape}. "
                    "A table has one row for each evaluation in `sigma`."
                )
        _validation.check_choice("plan.prediction", self.prediction, PREDICTIONS)
        check_sigmas(self.sigmas, repeat=True)
        wrong = [k for k in WEIGHTS if not bool(getattr(self, k).isfinite().all())]
        if not 1 <= self.stage_noise.shape[-1] <= len("WHK") or not rows:
            raise InputError(
                f"plan.stage_noise: got shape {tuple(self.stage_noise.shape)}, expected (rows, intervals, "
                "letters)."
            )
        if wrong or not bool(((self.sigma > 0) & self.sigma.isfinite()).all()):
            raise InputError(f"plan.{(wrong or ['sigma'])[0]}: got values that are not levels or weights.")

    @property
    def nfe(self) -> int:
        """Network evaluations: one a row."""
        return len(self.sigma)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The table as Python numbers with the zeros left out, read once and kept."""
        noise = [None if t0 != t0 else (t0, t1) for t0, t1 in self.noise.tolist()]
        stages = _combinations(self.stage_x, self.stage_eval, self.stage_noise)
        updates = _combinations(self.update_x, self.update_eval, self.update_noise)
        kept = self.update_eval.shape[1], self.stage_noise.shape[1]
        columns = zip(self.sigma.tolist(), noise, stages, updates, strict=True)
        return tuple(Row(*columns_of_row, *kept) for columns_of_row in columns)

    @cached_property
    def levy(self) -> str:
        """What the noise intervals must supply: "" for a deterministic plan, else "W" or "H" or "K"."""
        return "" if bool(self.noise.isnan().all()) else "WHK"[self.stage_noise.shape[-1] - 1]

    def __repr__(self) -> str:
        return f"<Plan {self.name}: {self.nfe} evaluations>"

    def __str__(self) -> str:
        head = f"{self.name}: {self.nfe} evaluations, {self.prediction} prediction"
        titles = ["sigma", "x", *_titles(self.stage_eval), *_titles(self.stage_noise)]
        titles += ["-> x", *_titles(self.update_eval), *_titles(self.update_noise)]
        columns = [self.sigma[:, None], self.stage_x[:, None], self.stage_eval, self.stage_noise.flatten(1)]
        columns += [self.update_x[:, None], self.update_eval, self.update_noise.flatten(1)]
        table = torch.cat(columns, 1)
        keep = [k for k, t in enumerate(titles) if t in ("sigma", "x", "-> x") or table[:, k].any()]
        lines = ["".join(f"{titles[k]:>10}" for k in keep)]
        lines += ["".join(f"{v:10.4g}" for v in row[keep].tolist()) for row in table]
        return "\n".join([head, *lines])

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors (tensors) with JSON metadata; nothing in it can run code."""
        from safetensors.torch import save_file

        meta = {"format": FORMAT, "name": self.name, "prediction": self.prediction}
        with atomic_write(path) as part:
            save_file(self.tensors(), str(part), {"fewstep": json.dumps(meta)})

    def tensors(self) -> dict[str, Tensor]:
        """The columns by name."""
        columns = (f.name for f in fields(self) if f.name not in ("name", "prediction"))
        return {name: getattr(self, name).contiguous() for name in columns}

    @classmethod
    def from_tensors(cls, meta: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
        """The inverse of `tensors`; refuses missing columns."""
        tensors = {FORMAT_1.get(k, k): v for k, v in tensors.items()}
        names = {f.name for f in fields(cls)} - {"name", "prediction"}
        if missing := sorted(names - tensors.keys()):
            raise InputError(f"plan: columns {', '.join(missing)} are missing; the file is not whole.")
        if strange := [k for k in names if not tensors[k].is_floating_point()]:
            raise InputError(f"plan: {strange[0]} holds {tensors[strange[0]].dtype}; the file is damaged.")
        columns = {k: tensors[k].double() for k in names}
        return cls(str(meta.get("name")), str(meta.get("prediction")), **columns)

    def renamed(self, name: str) -> Plan:
        return replace(self, name=name)

    def tail(self, row: int) -> Plan:
        """The rows from this one on as a plan, to start in the middle of a run.

        Evaluations that are missing there are replaced by the first one that exists: a first-order start.

        Raises:
            InputError: the row is not the start of a step, or needs noise of an earlier interval.
        """
        if row == 0:
            return self
        stage = self.rows[row].stage if row < self.nfe else None
        if stage is None or stage.scale == 0 or stage.evaluations:
            raise InputError(
                f"begin index: got {row}, which is in the middle of a step of {self.name}; expected the "
                "start of one. Choose another strength, or a solver of one evaluation per step."
            )
        columns = {k: getattr(self, k)[row:].clone() for k in (*WEIGHTS, "sigma", "noise")}
        for i in range(self.nfe - row):
            for name, known in (("update_eval", i + 1), ("stage_eval", i)):
                weights = columns[name]
                if known and known < weights.shape[1]:
                    weights[i, known - 1] += weights[i, known:].sum()
                    weights[i, known:] = 0
            if columns["update_noise"][i, i + 1 :].any() or columns["stage_noise"][i, i + 1 :].any():
                raise InputError(f"begin index: got {row}, but {self.name} needs noise from before it.")
        first = int((self.sigmas >= self.sigma[row] * (1 - 1e-9)).sum()) - 1
        return replace(self, sigmas=self.sigmas[first:], **columns)


def _combinations(scale: Tensor, past: Tensor, random: Tensor) -> list[Combination]:
    return [
        Combination(
            x, tuple((w, j) for j, w in enumerate(D) if w != 0),
            tuple((w, j, k) for j, letters in enumerate(z) for k, w in enumerate(letters) if w != 0),
        )
        for x, D, z in zip(scale.tolist(), past.tolist(), random.tolist(), strict=True)
    ]  # fmt: skip


def _titles(weights: Tensor) -> list[str]:
    """Headings: D0 is the newest evaluation, W0, H0, K0 the normals of the newest interval."""
    if weights.dim() == 2:
        return [f"D{j}" for j in range(weights.shape[1])]
    return [f"{letter}{j}" for j in range(weights.shape[1]) for letter in "WHK"[: weights.shape[2]]]
