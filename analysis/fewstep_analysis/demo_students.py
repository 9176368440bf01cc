"""The demo's students: a 5-step sampler of digits and a step of an SDE, shipped with the package or trained again.

`analysis/experiments/demo_students.py` trained those that are shipped.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep.fingerprint import Fingerprint, Fit
from fewstep.learned.labelled_model import Model
from fewstep.learned.training import Report

from . import teachers

TEACHER_STEPS, EVENT = 300, (1, 8, 8)
# the student's levels among 21 that are even in log sigma: sigma = 20, 2.5, 1.3, 0.74, 0.30, 0.05. Which digit a
# sample becomes is decided between 3 and 0.3. The default, all even in log sigma, spends a step on 20 to 6, and the
# student of the same short training then ends 1.3 times as far from its teacher.
FINE, KEPT = 20, (0, 7, 9, 11, 14, 20)
STEPS = len(KEPT) - 1
FILES = {"digits": "digits_sigdeg.safetensors", "step": "sine_sigstep.safetensors"}


def sampler(path: str | Path = teachers.WEIGHTS / FILES["digits"]) -> fs.SigSampler:
    """The shipped student of 5 steps, read in float32."""
    student = fs.load(path)
    assert isinstance(student, fs.SigSampler)
    student.network.float()
    return student


def step(path: str | Path = teachers.WEIGHTS / FILES["step"]) -> fs.SigStep:
    """The shipped step for `problems.sine()`."""
    student = fs.load(path)
    assert isinstance(student, fs.SigStep)
    return student


def save_half(student: fs.SigSampler, path: str | Path) -> Path:
    """Write a student in half precision, which `sampler` reads; the student keeps its precision."""
    student.network.half()
    try:
        student.save(path)
    finally:
        student.network.float()
    return Path(path)


def levels() -> Tensor:
    """(STEPS + 1,) the noise levels of the student."""
    return fs.sigma_grid(teachers.DIGITS, FINE, final="sigma_min")[list(KEPT)]


def train_sampler(
    problem: fs.DiffusionModel, *, trajectories: int, training: fs.TrainingOptions, seed: int,
    folder: Path | None = None, device: torch.device | str = "cpu", notes: dict[str, Any] | None = None,
) -> tuple[fs.SigSampler, Report]:  # fmt: skip
    """Distil 300 steps of the digits teacher to 5; the student is bound to its teacher.

    Args:
        folder: for teacher data and checkpoints; the same call resumes an interrupted one.
        notes: what the student's file is to state about its training.
    """
    data = fs.make_trajectories(
        problem, fs.sigma_grid(problem.schedule, FINE, final="sigma_min"), count=trajectories, event_shape=EVENT,
        substeps=TEACHER_STEPS // FINE, levy="K", seed=seed, folder=folder and folder / "teacher", device=device,
        progress=True,
    )  # fmt: skip
    student, report = fs.distill_sigdeg(
        problem, data=data.coarsen(KEPT), head="graded", training=training, folder=folder, device=device, seed=seed,
        progress=True,
    )  # fmt: skip
    like = torch.empty(1, *EVENT, device=device)
    fit = Fit(Fingerprint.of_model(Model.of(problem, None, like), like), notes or {})
    student.plan = replace(student.plan, fit=fit)
    return student, report


def train_step(sde: fs.SDE, *, trajectories: int, training: fs.TrainingOptions, seed: int) -> tuple[fs.SigStep, Report]:
    """Fit the coefficients of a learned step to Milstein's fine solution on starts from -2.5 to 2.5."""
    y0 = torch.linspace(-2.5, 2.5, 512, dtype=torch.float64).unsqueeze(1)
    options = fs.TeacherOptions(trajectories=trajectories)
    return fs.distill_sigdeg_step(
        sde, steps=64, y0=y0, teacher_options=options, training=training, seed=seed, progress=True
    )
