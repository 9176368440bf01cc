"""A diffusion solver on a grid, as a table of coefficients that can be printed, saved, loaded and run.

In x = x0 + sigma n every common solver is linear in the state and the evaluations. Row i is one network evaluation:

    input = stage_x x + sum_j stage_eval_j D_j + sum_jk stage_noise_jk z_jk
    D_0   = denoiser(input, sigma)                (or (input - D)/sigma: `prediction="noise"`)
    x     = update_x x + sum_j update_eval_j D_j + sum_jk update_noise_jk z_jk

D_j are the evaluations, newest first. z_jk are the unit normals of the noise intervals opened so far, newest interval
first: z_j0 = W/sqrt(h), z_j1 = sqrt(12/h) H of a Brownian path run in tau = 1/sigma^2. `executor` applies the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _validation
from ._serialization import write
from .errors import InputError
from .fingerprint import Fit
from .grid import check_sigmas

FORMAT = "fewstep-plan-2"
DODE_FORMAT = "fewstep-dode-1"  # fitted tables of version 0.1
FORMATS = (FORMAT, "fewstep-plan-1", DODE_FORMAT)
PREDICTIONS = ("data", "noise")
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
TOLERANCE = 1e-9  # of the ends of noise intervals
WEIGHTS = ("stage_x", "stage_eval", "stage_noise", "update_x", "update_eval", "update_noise")
LEARNED = ("stage_x", "stage_eval", "update_x", "update_eval")  # gradients flow to them
COLUMNS = ("sigmas", "sigma", *WEIGHTS, "noise")
VERSION_0_1 = dict(zip("cdmabn", WEIGHTS, strict=True))  # names of the weights in files of version 0.1

Weight = float | Tensor
"""A Python number, or a 0-d tensor where the table's column has a graph."""


class Combination(NamedTuple):
    """scale * x + sum of weight * evaluation[age] + sum of weight * normal[age][letter], without zeros."""

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
    """Coefficients of a solver: R rows, J kept evaluations, S kept noise intervals of L normals; CPU float64.

    A plan is immutable: an edited one is a new one, as `dataclasses.replace` makes.

    Args:
        name: the solver that made it.
        prediction: what the evaluations are, `"data"` (D) or `"noise"` ((input - D)/sigma).
        sigmas: (n,) the grid it was made for.
        sigma: (R,) the noise level of each evaluation.
        stage_x, update_x: (R,) weights of the state.
        stage_eval: (R, J) weights of earlier evaluations, newest first.
        update_eval: (R, J) weights of the row's own evaluation and of earlier ones, newest first.
        noise: (R, 2) the interval (tau0, tau1) that a row opens; nan where it opens none, and (0, 0) for a normal
            that belongs to no path (churn).
        stage_noise, update_noise: (R, S, L) weights of the unit normals of the noise intervals, this row's first.
        fit: what a learned table was fitted to; sampling another model with it is refused.

    Raises:
        InputError: columns whose shapes do not belong together, values that float32 cannot hold, a weight of an
            evaluation or a normal that does not exist yet, noise intervals that overlap or are reversed.
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
    fit: Fit | None = None

    def __post_init__(self) -> None:
        for key in COLUMNS:
            column = getattr(self, key)
            dense = torch.is_tensor(column) and column.layout == torch.strided and not column.is_meta
            if not dense or not column.is_floating_point() or column.dim() == 0:
                raise InputError(f"plan.{key}: got {_validation.describe(column)}, expected a floating-point tensor.")
            if key not in LEARNED:
                _validation.check_no_graph(f"plan.{key}", column)
        _validation.check_instance("plan.name", self.name, str, "a string")
        _validation.check_instance("plan.fit", self.fit, (Fit, type(None)), "a Fit or None")
        rows, intervals = len(self.sigma), tuple(self.stage_noise.shape[-2:])
        shapes = ((rows,), (rows, self.update_eval.shape[-1]), (rows, *intervals))
        for key, shape in [*zip(WEIGHTS, shapes * 2, strict=True), ("noise", (rows, 2))]:
            if (given := tuple(getattr(self, key).shape)) != shape:
                raise InputError(f"plan.{key}: got shape {given}, expected {shape}: one row for each level in `sigma`.")
        _validation.check_choice("plan.prediction", self.prediction, PREDICTIONS)
        grid = check_sigmas(self.sigmas, repeat=True, rising=True)
        if grid[-1] > grid[0] and not bool(self.noise.isnan().all()):
            raise InputError("plan.sigmas: got increasing levels with noise, expected decreasing ones.")
        if len(intervals) != 2 or not 1 <= intervals[1] <= len("WHK") or not rows:
            given = tuple(self.stage_noise.shape)
            raise InputError(f"plan.stage_noise: got shape {given}, expected (rows, intervals, letters).")
        _check_values(self)
        kappa = self.fit.kappa if self.fit else None
        if kappa is not None and (kappa.dim() != 2 or len(kappa) != rows or bool(kappa.isinf().any())):
            raise InputError(f"kappa: got shape {tuple(kappa.shape)}, expected ({rows}, terms), none infinite.")

    @property
    def nfe(self) -> int:
        """Network evaluations: one per row."""
        return len(self.sigma)

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The first and the last level of the grid."""
        return float(self.sigmas[0]), float(self.sigmas[-1])

    @property
    def letters(self) -> int:
        """The normals of a noise interval."""
        return self.stage_noise.shape[-1]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The table as Python numbers, read once; the weights of a column with a graph are 0-d tensors."""
        noise = [None if t0 != t0 else (t0, t1) for t0, t1 in self.noise.tolist()]
        stages = _combinations(self.stage_x, self.stage_eval, self.stage_noise, newest=0)
        updates = _combinations(self.update_x, self.update_eval, self.update_noise, newest=1)
        kept = self.update_eval.shape[1], self.stage_noise.shape[1]
        return tuple(Row(*row, *kept) for row in zip(self.sigma.tolist(), noise, stages, updates, strict=True))

    @cached_property
    def levy(self) -> str:
        """What the noise intervals must supply: "" for a deterministic plan, else "W", "H" or "K"."""
        return "" if bool(self.noise.isnan().all()) else "WHK"[self.stage_noise.shape[-1] - 1]

    @cached_property
    def on_path(self) -> Tensor:
        """(R,) whether a row opens an interval of a path; False also for churn."""
        return self.noise[:, 1] > self.noise[:, 0]

    def __repr__(self) -> str:
        fitted = f", fitted to {self.fit.fingerprint.schedule}" if self.fit else ""
        return f"<Plan {self.name}: {self.nfe} evaluations{fitted}>"

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
        if self.fit and self.fit.kappa is not None:
            kappas = ["".join(f"{k:10.4f}" for k in row) for row in self.fit.kappa.tolist()]
            lines = [a + b for a, b in zip(lines, ["     kappa", *kappas], strict=True)]
        notes = [f"{k}: {_text(v)}" for k, v in (self.fit.notes if self.fit else {}).items() if v not in ("", None)]
        return "\n".join([head, *lines, *notes])

    def save(self, path: str | Path) -> None:
        """Write the table, for `fewstep.load`: as JSON to a name that ends in `.json`, else as safetensors."""
        write(path, {"format": FORMAT} | self.meta(), self.tensors())

    def meta(self) -> dict[str, Any]:
        """All that is not a tensor, as JSON values."""
        meta: dict[str, Any] = {"name": self.name, "prediction": self.prediction}
        return meta | ({"fit": self.fit.meta()} if self.fit else {})

    def tensors(self) -> dict[str, Tensor]:
        """The columns by name, and kappa where the table has it."""
        columns: dict[str, Tensor] = {name: getattr(self, name) for name in COLUMNS}
        return columns | ({"kappa": self.fit.kappa} if self.fit and self.fit.kappa is not None else {})

    @classmethod
    def from_tensors(cls, meta: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
        """The inverse of `meta` and `tensors`, also those of version 0.1; InputError for other columns."""
        tensors = {VERSION_0_1.get(k, k): v for k, v in tensors.items()}
        kappa = tensors.pop("kappa", None)
        for what, names in (
            ("is missing", set(COLUMNS) - tensors.keys()), ("is unknown", tensors.keys() - set(COLUMNS)),
            ("is not real", {k for k, v in tensors.items() if not v.is_floating_point()}),
        ):  # fmt: skip
            if names:
                raise InputError(f"plan: column {min(names)!r} {what}; the file is damaged or of another version.")
        fitted = meta if meta.get("format") == DODE_FORMAT else meta.get("fit")
        fit = Fit.from_meta(fitted, kappa) if fitted is not None else None
        columns = {k: v.double() for k, v in tensors.items()}
        return cls(meta.get("name"), meta.get("prediction"), **columns, fit=fit)  # type: ignore[arg-type]

    def renamed(self, name: str) -> Plan:
        """The same table under another name."""
        return replace(self, name=name)

    def tail(self, row: int) -> Plan:
        """The plan from this row on. Its first evaluation replaces the earlier ones, so it starts at first order.

        Raises:
            InputError: the row is not the start of a step, or needs noise of an earlier interval.
        """
        row = _validation.check_int("begin index", row, 0, self.nfe - 1)
        if row == 0:
            return self
        stage = self.rows[row].stage
        if stage.scale == 0 or stage.evaluations:
            raise InputError(
                f"begin index: got {row}, which is in the middle of a step of {self.name}; expected the start of one. "
                "Choose another strength, or a solver of one evaluation per step."
            )
        columns = {k: getattr(self, k)[row:].clone() for k in (*WEIGHTS, "sigma", "noise")}
        for i in range(self.nfe - row):
            for name, known in (("update_eval", i + 1), ("stage_eval", i)):
                weights = columns[name]
                if known and known < weights.shape[1]:
                    weights[i, known - 1] += weights[i, known:].sum()
                    weights[i, known:] = 0
            if columns["update_noise"][i, i + 1 :].any() or columns["stage_noise"][i, i + 1 :].any():
                cure = "Choose another strength, or a solver of one evaluation per step."
                raise InputError(f"begin index: got {row}, but {self.name} needs noise from before it. {cure}")
        # steps begin at rows that evaluate at the state; their levels may be others (churn, a learned shift)
        first = sum(not r.stage.evaluations for r in self.rows[:row])
        fit = self.fit and replace(self.fit, kappa=None)
        return replace(self, sigmas=self.sigmas[first:], **columns, fit=fit)


def _check_values(plan: Plan) -> None:
    """Reject values that float32 cannot hold, weights of what does not exist yet, and intervals that do not fit."""
    # numpy: several times faster than torch on arrays of this size
    found = {k: getattr(plan, k).detach().cpu().double().numpy() for k in COLUMNS}
    for key in ("sigmas", "sigma", *WEIGHTS):
        size, expected = np.abs(found[key]), f"numbers that float32 holds, at most {LARGEST:.3g}"
        usable = size <= LARGEST
        if key == "sigma" or key == "sigmas":  # divided by; the last of a grid may be zero
            usable &= (found[key] >= SMALLEST) | ((key == "sigmas") & (size == 0))
            expected = f"levels from {SMALLEST:.3g} to {LARGEST:.3g}, or a last one of 0: raise sigma_min, or end at 0"
        _check(key, usable, expected, found[key])
    opened, made = np.cumsum(~np.isnan(found["noise"][:, 0])), np.arange(plan.nfe)
    known = (made, opened, made + 1, opened)
    for key, count in zip(("stage_eval", "stage_noise", "update_eval", "update_noise"), known, strict=True):
        weights = found[key].reshape(*found[key].shape[:2], -1).any(2)  # (rows, evaluations or intervals)
        exists = np.arange(weights.shape[1]) < count[:, None]
        what = "evaluations that are made" if key.endswith("eval") else "noise intervals that are open"
        _check(key, exists | ~weights, f"weights of {what} by then, the newest first, and zeros after", found[key])
    _check_intervals(found["noise"], float(found["sigmas"][0]) ** -2)


def _check_intervals(noise: np.ndarray[Any, Any], start: float) -> None:
    """Reject noise intervals that are reversed or overlap, or that begin before the path, which begins at `start`."""
    tau0, tau1 = noise.T
    on_path = (start * (1 - TOLERANCE) <= tau0) & (tau0 < tau1) & np.isfinite(tau1)
    other = np.isnan(noise).all(1) | (noise == 0).all(1)
    _check("noise", on_path | other, f"start < end, from 1/sigmas[0]^2 = {start:.6g} on", noise)
    last = np.maximum.accumulate(np.where(on_path, tau1, 0.0))
    after = np.append(True, tau0[1:] >= last[:-1] * (1 - TOLERANCE))
    _check("noise", after | ~on_path, "an interval that begins where the one before ends, or later", noise)


def _check(key: str, right: np.ndarray[Any, Any], expected: str, column: np.ndarray[Any, Any]) -> None:
    """Raise an `InputError` for the first row of a column that is not right."""
    if not right.all():
        row = int(np.argmin(right.reshape(len(right), -1).all(1)))
        values = ", ".join(f"{v:.6g}" for v in column[row].flatten()[:8].tolist())
        raise InputError(f"plan.{key}: got {values} in row {row}, expected {expected}.")


def _combinations(scale: Tensor, past: Tensor, random: Tensor, newest: int) -> list[Combination]:
    """One combination per row; `newest` is 1 where the row's own evaluation is one of the past."""
    graph = past.requires_grad  # then each weight may become other than zero
    scales, pasts = (c.unbind() if c.requires_grad else c.tolist() for c in (scale, past))
    out = []
    for i, (x, D, z) in enumerate(zip(scales, pasts, random.tolist(), strict=True)):
        evaluations = tuple((w, j) for j, w in enumerate(D) if (j < i + newest if graph else w != 0))
        normals = tuple((w, j, k) for j, letters in enumerate(z) for k, w in enumerate(letters) if w != 0)
        out.append(Combination(x, evaluations, normals))
    return out


def _titles(weights: Tensor) -> list[str]:
    """Headings: D0 is the newest evaluation, W0, H0, K0 the normals of the newest interval."""
    if weights.dim() == 2:
        return [f"D{j}" for j in range(weights.shape[1])]
    return [f"{letter}{j}" for j in range(weights.shape[1]) for letter in "WHK"[: weights.shape[2]]]


def _text(value: Any) -> str:
    """A note for people."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " to ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
