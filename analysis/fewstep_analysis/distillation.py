"""Fitting a sampler to a named diffusion model: what `fewstep fit-table` and `fewstep distill dode` do."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep import _validation
from fewstep.learned.dode.distill import DODEReport
from fewstep.learned.table.report import TableReport
from fewstep.sampler_names import diffusion_solver_named

from . import diffusion_problems, teachers


@dataclass(frozen=True)
class Task:
    """A diffusion model with the information that a fit needs.

    Attributes:
        name: as on the command line.
        problem: the model, or a function from labels (batch,) to the model.
        schedule: the schedule of the model.
        event: the shape of one sample.
        classes: number of classes; 0 for models without labels.
        dtype: of the samples.
    """

    name: str
    problem: fs.DiffusionModel | Callable[[Tensor], fs.DiffusionModel]
    schedule: Any
    event: tuple[int, ...]
    classes: int = 0
    dtype: torch.dtype = torch.float64

    def noise(self, n: int, seed: int) -> Tensor:
        """(n, *event) initial states at the largest noise level."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.tensor(self.schedule.sigma_max, dtype=torch.float64)
        size = float(first * self.schedule.alpha(first))
        return size * torch.randn((n, *self.event), generator=generator, dtype=self.dtype)

    def labels(self, n: int, seed: int) -> Tensor | None:
        """(n,) labels in equal shares and random order; None for models without labels."""
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 7))
        return order % self.classes if self.classes else None

    def at(self, labels: Tensor | None) -> fs.DiffusionModel:
        """The model with these labels."""
        if isinstance(self.problem, fs.DiffusionModel):
            return self.problem
        assert labels is not None
        return self.problem(labels)


def _mixture(name: str, device: str) -> Task:
    found = diffusion_problems.by_name(name)
    return Task(name, found.problem, found.schedule, (found.mixture.means.shape[1],))


def _digits(device: str) -> Task:
    return Task("digits", teachers.digits(device), teachers.DIGITS, (1, 8, 8), dtype=torch.float32)


def mnist(device: str = "cpu", guidance: float = 1.0) -> Task:
    """The MNIST teacher with one class per sample; without a class it is weak."""
    net = teachers.mnist_network().to(device)
    return Task(
        "mnist" if guidance == 1 else "mnist_guided", lambda labels: teachers.mnist(labels, guidance, net),
        teachers.mnist_schedule(), (1, 28, 28), classes=10, dtype=torch.float32,
    )  # fmt: skip


TASKS: dict[str, Callable[[str], Task]] = {
    **{name: partial(_mixture, name) for name in diffusion_problems.PROBLEMS},
    "digits": _digits,
    "mnist": mnist,
    "mnist_guided": partial(mnist, guidance=3.0),
}


@lru_cache(maxsize=1)
def task(name: str, device: str = "cpu") -> Task:
    """The model of that name."""
    return TASKS[_validation.check_choice("problem", name, TASKS)](device)


def numbers(name: str, samples: int) -> int:
    """The numbers of the largest tensors of a network, which of a U-Net are many times those of its samples."""
    model = task(name, "cpu")
    return samples * math.prod(model.event) * (teachers.MNIST_CONFIG["channels"][0] if model.classes else 1)


def distill_dode(
    problem: str, base: str, out: Path, *, samples: int, seed: int, device: str = "cpu", **options: Any
) -> tuple[fs.Plan, DODEReport]:
    """Fit a D-ODE student to a named model and save it.

    Args:
        problem: a name in TASKS.
        base: the name of a solver, for instance "unipc:3".
        out: the file of the student.
        samples: number of initial states.
        options: further arguments of `fewstep.distill_dode`.
    """
    model, given = _given(problem, samples, seed, device)
    solver = diffusion_solver_named(base, "base", lambda known: not known.card.levy)
    if not isinstance(solver, fs.DiffusionSolver):
        raise fs.InputError(f"base: got {base!r}, expected a diffusion solver such as ddim or unipc:2.")
    student, report = fs.distill_dode(model.problem, solver, **given, **options)
    student.save(out)
    return student, report


def fit_table(
    problem: str, out: Path, *, nfe: int, samples: int, seed: int, device: str = "cpu", **options: Any
) -> tuple[fs.Plan, TableReport]:
    """Fit a table to a named model and save it.

    Args:
        problem: a name in TASKS.
        out: the file of the table.
        nfe: network evaluations.
        samples: number of initial states, with `levy` of paths.
        options: further arguments of `fewstep.fit_table`.
    """
    model, given = _given(problem, samples, seed, device)
    table, report = fs.fit_table(model.problem, nfe=nfe, seed=seed, **given, **options)
    table.save(out)
    return table, report


def _given(problem: str, samples: int, seed: int, device: str) -> tuple[Task, dict[str, Any]]:
    """The model, and the arguments that all fits have."""
    device = str(_validation.check_device(device))
    model = task(problem, device)
    noise, labels = model.noise(samples, seed), model.labels(samples, seed)
    return model, {
        "noise": noise.to(device), "labels": None if labels is None else labels.to(device),
        "progress": True, "notes": {"problem": problem, "seed": seed},
    }  # fmt: skip


def report_lines(report: DODEReport) -> list[str]:
    """A report as lines of text."""
    rows = [f"{r:.3f}" if k else "base" for r, k in zip(report.r2, report.kept)]
    out = [
        f"R^2 by row: {' '.join(rows)}",
        f"held-out RMSE to the teacher: {report.student_rmse:.4g}, of the base {report.base_rmse:.4g}",
        f"{report.evaluations} evaluations per initial state, {report.seconds:.1f} s",
    ]
    return [*out, f"fallback to the base: {report.fallback}"] if report.fallback else out


def report_document(student: fs.Plan, report: DODEReport) -> dict[str, Any]:
    """A report as a JSON document."""
    assert student.fit is not None
    assert student.fit.kappa is not None
    return {**vars(report), "notes": student.fit.notes, "kappa": student.fit.kappa.tolist()}


def table_lines(report: TableReport) -> list[str]:
    """A report as lines of text."""
    return [
        *str(report).splitlines(),
        f"teacher: {report.teacher}",
        f"{report.evaluations} evaluations per initial state, {report.seconds:.1f} s",
    ]


def table_document(table: fs.Plan, report: TableReport) -> dict[str, Any]:
    """A report as a JSON document."""
    assert table.fit is not None
    scores = {name: score if math.isfinite(score) else None for name, score in report.candidates.items()}
    return asdict(report) | {"candidates": scores, "notes": table.fit.notes}
