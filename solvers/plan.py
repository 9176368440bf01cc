"""A diffusion solver on a grid, as a table of coefficients: look at it, save it, load it, run it.

With x = x0 + sigma n every solver of the field is linear in what it has seen. Row i of the table is one
network evaluation:

    input = c x + sum_j d_j D_j + sum_jk m_jk z_jk        where to look
    D_0   = denoiser(input, sigma)                        (or (input - D)/sigma: `prediction="noise"`)
    x     = a x + sum_j b_j D_j + sum_jk n_jk z_jk        where to go

D_j are the evaluations, newest first. z_jk are the unit normals of the noise intervals opened so far,
newest interval first: z_j0 = W/sqrt(h), z_j1 = sqrt(12/h) H of a Brownian path run in tau = 1/sigma^2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .errors import InputError
from .files import whole
from .grid import check_sigmas

FORMAT = "fewstep-plan-1"
PREDICTIONS = ("data", "noise")


class Combination(NamedTuple):
    """scale * x + sum of weight * evaluation[age] + sum of weight * normal[age][letter]; no zeros."""

    scale: float
    past: tuple[tuple[float, int], ...]
    random: tuple[tuple[float, int, int], ...]


class Row(NamedTuple):
    """One evaluation as Python numbers: its level, the interval it opens, where to look, where to go."""

    sigma: float
    interval: tuple[float, float] | None
    look: Combination
    go: Combination


@dataclass(frozen=True, eq=False)
class Plan:
    """R rows, J kept evaluations, S kept noise intervals, L normals an interval; all float64 on the CPU.

    Args:
        name: the solver that made it.
        prediction: what the history holds, `"data"` (D) or `"noise"` ((input - D)/sigma).
        sigmas: (n,) the grid it was made for.
        sigma: (R,) the level of each evaluation.
        c, a: (R,); d: (R, J) over earlier evaluations; b: (R, J) the newest first.
        noise: (R, 2) the interval (tau0, tau1) that a row opens; nan where it opens none, and
            (0, 0) for a normal that belongs to no path (churn).
        m, n: (R, S, L) over noise intervals, the one this row opens first.
    """

    name: str
    prediction: str
    sigmas: Tensor
    sigma: Tensor
    c: Tensor
    d: Tensor
    m: Tensor
    a: Tensor
    b: Tensor
    n: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        for key in (f.name for f in fields(self) if f.name not in ("name", "prediction")):
            column = getattr(self, key)
            if not torch.is_tensor(column) or not column.is_floating_point() or column.dim() == 0:
                raise InputError(f"plan.{key}: got {checks.came(column)}, wanted a floating-point tensor.")
        rows, window = len(self.sigma), self.b.shape[-1]
        wanted = {
            "c": (rows,), "a": (rows,), "d": (rows, window), "b": (rows, window),
            "m": (rows, *self.m.shape[-2:]), "n": tuple(self.m.shape), "noise": (rows, 2),
        }  # fmt: skip
        for key, shape in wanted.items():
            if tuple(getattr(self, key).shape) != shape:
                raise InputError(
                    f"plan.{key}: got shape {tuple(getattr(self, key).shape)}, wanted {shape}. "
                    "A table has one row for each evaluation in `sigma`."
                )
        checks.word("plan.prediction", self.prediction, PREDICTIONS)
        check_sigmas(self.sigmas, repeat=True)
        wrong = [k for k in ("c", "d", "m", "a", "b", "n") if not bool(getattr(self, k).isfinite().all())]
        if not 1 <= self.m.shape[-1] <= len("WHK") or not rows:
            raise InputError(f"plan.m: got shape {tuple(self.m.shape)}, wanted (rows, intervals, letters).")
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
        look, go = _combinations(self.c, self.d, self.m), _combinations(self.a, self.b, self.n)
        return tuple(map(Row, self.sigma.tolist(), noise, look, go))

    @cached_property
    def levy(self) -> str:
        """What the noise intervals must supply: "" for a deterministic plan, else "W" or "H" or "K"."""
        return "" if bool(self.noise.isnan().all()) else "WHK"[self.m.shape[-1] - 1]

    def __repr__(self) -> str:
        return f"<Plan {self.name}: {self.nfe} evaluations>"

    def __str__(self) -> str:
        head = f"{self.name}: {self.nfe} evaluations, {self.prediction} prediction"
        titles = ["sigma", "c", *_titles("d", self.d), *_titles("m", self.m)]
        titles += ["a", *_titles("b", self.b), *_titles("n", self.n)]
        columns = [self.sigma[:, None], self.c[:, None], self.d, self.m.flatten(1)]
        columns += [self.a[:, None], self.b, self.n.flatten(1)]
        table = torch.cat(columns, 1)
        keep = [k for k, t in enumerate(titles) if t in ("sigma", "c", "a") or table[:, k].any()]
        lines = ["".join(f"{titles[k]:>10}" for k in keep)]
        lines += ["".join(f"{v:10.4g}" for v in row[keep].tolist()) for row in table]
        return "\n".join([head, *lines])

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors (tensors) with JSON metadata; nothing in it can run code."""
        from safetensors.torch import save_file

        meta = {"format": FORMAT, "name": self.name, "prediction": self.prediction}
        with whole(path) as part:
            save_file(self.tensors(), str(part), {"fewstep": json.dumps(meta)})

    def tensors(self) -> dict[str, Tensor]:
        """The columns by name."""
        columns = (f.name for f in fields(self) if f.name not in ("name", "prediction"))
        return {name: getattr(self, name).contiguous() for name in columns}

    @classmethod
    def from_tensors(cls, meta: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
        """The inverse of `tensors`; refuses missing columns."""
        names = {f.name for f in fields(cls)} - {"name", "prediction"}
        if missing := sorted(names - tensors.keys()):
            raise InputError(f"plan: columns {', '.join(missing)} are missing; the file is not whole.")
        if strange := [k for k in names if not tensors[k].is_floating_point()]:
            raise InputError(f"plan: {strange[0]} holds {tensors[strange[0]].dtype}; the file is damaged.")
        columns = {k: tensors[k].double() for k in names}
        return cls(str(meta.get("name")), str(meta.get("prediction")), **columns)

    def renamed(self, name: str) -> Plan:
        return replace(self, name=name)


def _combinations(scale: Tensor, past: Tensor, random: Tensor) -> list[Combination]:
    return [
        Combination(
            x, tuple((w, j) for j, w in enumerate(D) if w != 0),
            tuple((w, j, k) for j, letters in enumerate(z) for k, w in enumerate(letters) if w != 0),
        )
        for x, D, z in zip(scale.tolist(), past.tolist(), random.tolist(), strict=True)
    ]  # fmt: skip


def _titles(letter: str, column: Tensor) -> list[str]:
    if column.dim() == 2:
        return [f"{letter}{j}" for j in range(column.shape[1])]
    return [f"{letter}{j}{'WHK'[k]}" for j in range(column.shape[1]) for k in range(column.shape[2])]
